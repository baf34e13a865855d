"""Means, their intervals and paired differences of scores, in per cent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["Difference", "Interval", "interval", "paired"]

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, a fit that is right to 0.01.
_T: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_NORMAL: Final = 1.960


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and half the width of its 95 % confidence interval, None if there is one value only."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.half is None else f"{self.mean:.2f} ± {self.half:.2f}"


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean of paired differences, its standard error (None if there is one pair only) and the number of pairs."""

    mean: float
    error: float | None
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" if self.error is None else f"{self.mean:+.2f} ± {self.error:.2f}"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of the values of several seeds and its 95 % confidence interval by Student's t.

    Args:
        values: At least one.
    """
    mean, degrees = statistics.fmean(values), len(values) - 1
    if not degrees:
        return Interval(mean, None)
    quantile = _T[degrees - 1] if degrees <= len(_T) else _NORMAL + 2.4 / degrees
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(len(values)))


def paired(pairs: Sequence[tuple[float, float]]) -> Difference:
    """Return the mean of ``first - second`` in per cent, with its standard error.

    Args:
        pairs: Scores in [0, 1] of the same sample under two methods; at least one pair.
    """
    differences = [100 * (ours - theirs) for ours, theirs in pairs]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return Difference(statistics.fmean(differences), error, len(differences))
