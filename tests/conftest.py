"""What every test starts from: one thread, fixed seeds, no network, caches of its own, no compiled code left over."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_CACHES = Path(os.environ["ADAKV_TEST_CACHES"]) if _IS_WORKER else Path(tempfile.mkdtemp(prefix="adakv-test-"))

# Before torch is imported. Workers and subprocesses of tests inherit all of it, so that a run's compilations are shared
# between the workers and never taken from, or left to, another run.
os.environ.update(
    ADAKV_TEST_CACHES=str(_CACHES),
    HF_HUB_OFFLINE="1",
    MPLBACKEND="agg",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    TORCHINDUCTOR_CACHE_DIR=str(_CACHES / "inductor"),
    TORCHINDUCTOR_COMPILE_THREADS="1",
    TRITON_CACHE_DIR=str(_CACHES / "triton"),
)
# Triton's kernels run natively where there is a GPU, and in Triton's interpreter, on the CPU, elsewhere.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")


def pytest_unconfigure() -> None:
    """Remove the caches of the run, once, at its end."""
    if not _IS_WORKER:
        shutil.rmtree(_CACHES, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine can't run."""
    wants_network = "network" in (config.getoption("markexpr") or "")
    for item in items:
        if item.get_closest_marker("network") and not wants_network:
            item.add_marker(pytest.mark.skip(reason="needs the internet: ask for it with `-m network`"))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _fresh_torch() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """Give the test one thread and a fixed seed, and throw away what it compiled."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
