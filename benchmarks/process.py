"""A process of its own for a part of a benchmark: ended behind its deadline, and what it said last is its reason."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["GRACE", "ROOT", "run_until"]

ROOT = Path(__file__).parents[1]
"""Of the repository, from which ``python -m benchmarks...`` finds its modules."""
GRACE = 60.0
"""Seconds after its deadline in which a process may end by itself; one that hangs is killed."""


def run_until(
    command: Sequence[str], deadline: float, environment: Mapping[str, str], folder: Path = ROOT, grace: float = GRACE
) -> str | None:
    """Run a command to its end.

    Args:
        command: The command.
        deadline: ``time.time()`` by which it should end.
        environment: Variables that it has besides those of this process.
        folder: Where it runs.
        grace: Seconds after the deadline in which it may end by itself.

    Returns:
        Why it ended early, None if it did not.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(deadline - time.time(), 0) + grace,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return f"killed {grace:.0f} s after its time was over; last words: {_last_words(error.output)}"
    if done.returncode:
        return f"exit status {done.returncode}; last words: {_last_words(done.stdout)}"
    return None


def _last_words(output: str | bytes | None) -> str:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return " | ".join(text.strip().splitlines()[-3:])[-600:] or "none"
