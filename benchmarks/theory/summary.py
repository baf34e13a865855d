"""Samples of many prompts in a few figures: means, and how often adaptive budgets lower the loss and the bound."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from benchmarks.theory.samples import Sample

__all__ = ["Cell", "summarise"]

_SAME: Final = 1e-9
"""Relative difference below which two figures are one: the sums of one set of entries in another order."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer, budget, case and allocation, over all prompts.

    Attributes:
        case: Who decides what is kept and where the loss is measured.
        layer: The layer; None for all of them together.
        budget: Entries per KV head on average.
        allocation: How the budget is shared.
        samples: Prompts, or prompts times layers.
        loss: Mean loss, relative to the norm of the output.
        bound: Mean bound, relative to the same.
        mass: Mean attention mass kept.
        loss_change: Mean difference of the loss to the uniform allocation, paired.
        loss_error: Standard error of that.
        lower_loss: Share of the samples in which the loss is lower than with the uniform allocation.
        same_loss: Share in which it is the same.
        lower_bound: Share in which the bound is lower.
        same_bound: Share in which it is the same.
    """

    case: str
    layer: int | None
    budget: int
    allocation: str
    samples: int
    loss: float
    bound: float
    mass: float
    loss_change: float
    loss_error: float
    lower_loss: float
    same_loss: float
    lower_bound: float
    same_bound: float

    def row(self) -> dict[str, Any]:
        """Return it as a line of the results."""
        return asdict(self)


def summarise(samples: Iterable[Sample], reference: str = "uniform") -> list[Cell]:
    """Return a cell for every case, layer, budget and allocation, and one for all layers together.

    Args:
        samples: Those of every prompt, prompts in one order for all allocations.
        reference: The allocation that the others are compared with.

    Raises:
        ValueError: An allocation has other samples than the reference.
    """
    groups: dict[tuple[str, int | None, int, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        for layer in (None, sample.layer):
            groups[sample.case, layer, sample.budget, sample.allocation].append(sample)
    return [
        _cell((case, layer, budget, allocation), members, groups.get((case, layer, budget, reference), []))
        for (case, layer, budget, allocation), members in groups.items()
    ]


def _cell(key: tuple[str, int | None, int, str], found: Sequence[Sample], uniform: Sequence[Sample]) -> Cell:
    if len(found) != len(uniform):
        raise ValueError(f"{key} has {len(found)} samples, the reference {len(uniform)}: they can't be paired")
    count = len(found)
    losses = [_compare(a.loss, b.loss) for a, b in zip(found, uniform, strict=True)]
    bounds = [_compare(a.bound, b.bound) for a, b in zip(found, uniform, strict=True)]
    changes = [a.loss - b.loss for a, b in zip(found, uniform, strict=True)]
    mean = sum(changes) / count
    spread = sum((change - mean) ** 2 for change in changes) / max(1, count - 1)
    return Cell(
        *key,
        samples=count,
        loss=sum(sample.loss for sample in found) / count,
        bound=sum(sample.bound for sample in found) / count,
        mass=sum(sample.mass for sample in found) / count,
        loss_change=mean,
        loss_error=math.sqrt(spread / count),
        lower_loss=losses.count(-1) / count,
        same_loss=losses.count(0) / count,
        lower_bound=bounds.count(-1) / count,
        same_bound=bounds.count(0) / count,
    )


def _compare(value: float, reference: float) -> int:
    """Return -1, 0 or 1: lower, the same, higher."""
    if abs(value - reference) <= _SAME * max(abs(value), abs(reference)):
        return 0
    return -1 if value < reference else 1
