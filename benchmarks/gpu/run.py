"""What a part of the benchmark is given: the device, the time it has, and where its results go."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch._ops import OpOverload

from benchmarks.part import Part, Row, append_rows, read_rows

__all__ = ["Row", "Run", "append_rows", "read_rows"]

_SPOILT: Final = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "launch failure",
    "device-side assert",
)
"""Of messages behind which nothing runs on the device any more in this process."""


@dataclass
class Run(Part):
    """One part, in a process of its own.

    In smoke mode it is to show that everything runs: tiny shapes on the CPU, Triton's interpreter, no measurement.
    """

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return torch.device("cpu" if self.smoke else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Of models and caches. Triton's interpreter can't compute with bfloat16."""
        return torch.float32 if self.smoke else torch.bfloat16

    def has_memory(self, what: str, size: int) -> bool:
        """Tell whether ``size`` bytes are free on the device; if not, the results say that it was skipped."""
        if self.smoke:
            return True
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if size < 0.92 * free:
            return True
        self.skip(what, f"memory: {size / 2**30:.0f} GiB needed, {free / 2**30:.0f} GiB free")
        return False

    @contextmanager
    def attempt(self, what: str) -> Generator[None, None, None]:
        """Go on behind whatever raises in here, the reason being a result; not on a device that it has spoilt."""
        try:
            yield
        except Exception as error:
            self.fail(what, error)
            if any(word in str(error) for word in _SPOILT):
                raise
        if not self.smoke:
            gc.collect()
            torch.cuda.empty_cache()

    def op(self, name: str) -> OpOverload:
        """Return an op of the dialect as it runs on the device: the Triton implementation."""
        import adakv_compile.kernels as _  # noqa: F401  # registers the ops

        return getattr(getattr(torch.ops.adakv, name), "triton" if self.smoke else "default")
