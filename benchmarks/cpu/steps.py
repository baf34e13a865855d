"""A decode step as a call without arguments, and the times of several in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.cpu.run import Run
from benchmarks.cpu.timing import Rounds, interleave

__all__ = ["stepper", "time_steps"]


def stepper(model: Callable[..., Any], cache: Any) -> Callable[[], object]:
    """Return what appends one token to a cache."""
    token = torch.ones(1, 1, dtype=torch.long)

    def step() -> object:
        with torch.no_grad():
            return model(token, past_key_values=cache, use_cache=True)

    return step


def time_steps(
    run: Run, contenders: Mapping[str, Callable[[], object]], rounds: int, calls: int = 3, share: float = 1.0
) -> dict[str, Rounds]:
    """Time steps in turn: few at a time, so that caches hardly grow.

    Args:
        run: The part.
        contenders: By name.
        rounds: Rounds at most.
        calls: Steps of each in a round.
        share: Of the time that is left, what this may take.
    """
    if run.smoke:
        rounds, calls = 2, 1
    until = time.time() + share * run.left
    return interleave(contenders, rounds, calls, warm=2 if run.smoke else 4, deadline=until)
