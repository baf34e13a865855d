"""The Triton kernels compile to good code for every architecture, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.aot.kernel import ARCHITECTURES
from tests.kernels.checks import OPS

ROOT = Path(__file__).parents[2]


def run(*arguments: str, interpret: str) -> subprocess.CompletedProcess[str]:
    """Run the table in a process of its own: Triton reads ``TRITON_INTERPRET`` when it is imported."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("architecture", [f"{major}.{minor}" for major, minor in ARCHITECTURES])
def test_code(architecture: str, tmp_path: Path) -> None:
    """No spilled registers, shared memory within limits, tensor cores where expected."""
    path = tmp_path / "rows.json"
    done = run("--arch", architecture, "--json", str(path), interpret="0")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert {row["op"] for row in rows} == set(OPS)
    for row in rows:
        assert row["arch"] == architecture
        assert 0 < row["registers"] <= 255, row
        assert row["spilled"] == 0, row
        assert row["shared"] <= row["shared_limit"], row
        assert row["tensor_cores"] or not row["wants_tensor_cores"], row


def test_interpreted_kernels_are_refused() -> None:
    done = run(interpret="1")
    assert done.returncode == 2
    assert "unset it" in done.stderr
