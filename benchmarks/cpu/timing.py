"""Times of contenders in turn, in one process: what disturbs one disturbs all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

__all__ = ["Rounds", "flat", "interleave"]

Rounds = list[list[float]]
"""Seconds of each call of each round."""


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    calls: int,
    warm: int = 3,
    deadline: float = float("inf"),
) -> dict[str, Rounds]:
    """Call every contender a few times, round by round, each round beginning with another one.

    Args:
        contenders: By name.
        rounds: Rounds.
        calls: Calls of each contender in a round.
        warm: Calls of each ahead of all rounds, which compile.
        deadline: ``time.time()`` behind which no round begins, but for the first two.

    Returns:
        The seconds of each contender; all have the same rounds.
    """
    for call in contenders.values():
        for _ in range(warm):
            call()
    order = list(contenders)
    seconds: dict[str, Rounds] = {name: [] for name in order}
    for number in range(rounds):
        if number >= 2 and time.time() > deadline:
            break
        start = number % len(order)
        for name in order[start:] + order[:start]:
            seconds[name].append([_timed(contenders[name]) for _ in range(calls)])
    return seconds


def flat(rounds: Sequence[Sequence[float]], factor: float = 1.0) -> list[float]:
    """Return the seconds of all rounds, times a factor."""
    return [second * factor for each in rounds for second in each]


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
