"""One part of the benchmark in a process of its own: ``python -m benchmarks.gpu.child``, started by the parent."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.run import Run
from benchmarks.process import run_until

__all__ = ["main", "start"]


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
    environment = {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1" if smoke else "0"}
    return run_until(command, deadline, environment)


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


if __name__ == "__main__":
    main()
