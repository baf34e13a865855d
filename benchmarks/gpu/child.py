"""One part of the benchmark in a process of its own: ``python -m benchmarks.gpu.child``, started by the parent."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.run import Run

__all__ = ["main", "start"]

_ROOT = Path(__file__).parents[2]
GRACE = 60.0
"""Seconds after its deadline in which a part may end by itself; one that hangs is killed."""


def start(part: str, rows: Path, deadline: float, smoke: bool, checks: Sequence[str] = ()) -> str | None:
    """Run a part to its end in a new process.

    Args:
        part: A module of this package, which has a function ``run``.
        rows: File that it appends to.
        deadline: ``time.time()`` by which it should end.
        smoke: Whether to run on the CPU, to no end but to see that it runs.
        checks: Names of the checks to run, for the part of this name.

    Returns:
        Why it ended early, None if it did not.
    """
    command = [sys.executable, "-m", __name__, part, "--rows", str(rows.resolve()), "--deadline", str(deadline)]
    command += [*(["--smoke"] if smoke else []), *(["--checks", *checks] if checks else [])]
    # Nothing is loaded from the network. Ahead of anything that imports Triton, which reads it at every @jit.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1" if smoke else "0"}
    try:
        done = subprocess.run(
            command,
            cwd=_ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(deadline - time.time(), 0) + GRACE,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return f"killed {GRACE:.0f} s after its time was over; last words: {_last_words(error.output)}"
    if done.returncode:
        return f"exit status {done.returncode}; last words: {_last_words(done.stdout)}"
    return None


def main() -> None:
    """Run what the command line names; :func:`start` writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--checks", nargs="+")
    given = parser.parse_args()
    run = Run(given.part, given.rows, given.deadline, given.smoke)
    if given.smoke:
        import torch

        torch.set_num_threads(1)
    module = importlib.import_module(f"benchmarks.gpu.{given.part}")
    try:
        module.run(run, *([given.checks] if given.checks else []))
    except Exception as error:
        run.fail(given.part, error)
        raise


def _last_words(output: str | bytes | None) -> str:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return " | ".join(text.strip().splitlines()[-3:])[-600:] or "none"


if __name__ == "__main__":
    main()
