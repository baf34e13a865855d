"""One part in a process of its own: ``python -m benchmarks.cpu.child``, started by the parent."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.cpu.parts import PARTS
from benchmarks.cpu.run import Run
from benchmarks.process import ROOT, run_until

__all__ = ["main", "start"]


def start(
    part: str,
    rows: Path,
    deadline: float,
    smoke: bool,
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> str | None:
    """Run a part to its end in a new process.

    Args:
        part: Its name.
        rows: File that it appends to.
        deadline: ``time.time()`` by which it should end.
        smoke: To no end but to see that it runs.
        folder: Where ``adakv_compile`` and ``benchmarks`` are.
        environment: Variables besides those of this process.

    Returns:
        Why it ended early, None if it did not.
    """
    command = [sys.executable, "-m", __name__, part, "--rows", str(rows.resolve()), "--deadline", str(deadline)]
    # The folder's code, not that of an installation.
    variables = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder), **(environment or {})}
    return run_until([*command, *(["--smoke"] if smoke else [])], deadline, variables, folder)


def main() -> None:
    """Run what the command line names; :func:`start` writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    run = Run(given.part, given.rows, given.deadline, given.smoke)
    if given.smoke:
        import torch

        torch.set_num_threads(1)
    try:
        importlib.import_module(f"benchmarks.cpu.{PARTS[given.part].module}").run(run)
    except Exception as error:
        run.fail(given.part, error)
        raise


if __name__ == "__main__":
    main()
