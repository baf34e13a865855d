"""What a part of the CPU benchmark is given, and the lines that it writes: figures and series."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.part import Part

__all__ = ["PLAIN", "Bound", "Run", "at_least", "at_most", "ratios", "spread"]

PLAIN = "plain Inductor"
"""The other side of most ratios: the same model under ``backend="inductor"``."""


@dataclass(frozen=True)
class Bound:
    """What a figure's median should be.

    Attributes:
        sign: ``"<="`` or ``">="``.
        value: The bound.
    """

    sign: str
    value: float

    def met(self, figure: float) -> bool:
        """Tell whether a figure keeps to it."""
        return figure <= self.value if self.sign == "<=" else figure >= self.value

    def __str__(self) -> str:
        return f"{self.sign} {self.value:g}"


def at_most(value: float) -> Bound:
    """Return an upper bound."""
    return Bound("<=", value)


def at_least(value: float) -> Bound:
    """Return a lower bound."""
    return Bound(">=", value)


class Run(Part):
    """One part, in a process of its own."""

    def figure(
        self,
        name: str,
        unit: str,
        values: Sequence[float] | float,
        against: str | None = None,
        target: Bound | None = None,
        **facts: Any,
    ) -> float:
        """Write a figure.

        Args:
            name: What was measured, and where.
            unit: Of the values; ``"x"`` for a ratio.
            values: Of all rounds, or one where there is nothing to repeat.
            against: What the ratio's other side is.
            target: What the median should be; a smoke run claims nothing.
            facts: What else belongs to it.

        Returns:
            The median.
        """
        seen = spread([values] if isinstance(values, (int, float)) else values)
        claim: dict[str, Any] = {}
        if target is not None and not self.smoke:
            claim = {"target": str(target), "met": target.met(seen["median"])}
        self.write("figure", name=name, unit=unit, **seen, against=against, **claim, **facts)
        return seen["median"]

    def series(self, plot: str, line: str, x: Sequence[float], y: Sequence[Sequence[float]]) -> None:
        """Write a line of a plot.

        Args:
            plot: Name of the plot, see :mod:`benchmarks.cpu.plot`.
            line: Its label.
            x: Where.
            y: The values of all rounds at each.
        """
        spreads = [spread(values) for values in y]
        of = {name: [one[name] for one in spreads] for name in ("median", "low", "high")}
        self.write("series", plot=plot, line=line, x=list(x), **of)


@dataclass(frozen=True)
class _Spread:
    median: float
    low: float
    high: float
    min: float
    max: float
    count: int


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return ``median``, ``min``, ``max``, ``count``, and the quartiles ``low`` and ``high``."""
    if len(values) > 1:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    else:
        low = median = high = values[0]
    return asdict(_Spread(median, low, high, min(values), max(values), len(values)))


def ratios(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> list[float]:
    """Return the ratio of the medians of each round: what disturbs one side in a round disturbs the other."""
    return [statistics.median(a) / statistics.median(b) for a, b in zip(ours, theirs, strict=True)]
