"""Whether two programs kept the same entries, and if not, whether the others were as good: ties."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import Tensor

from adakv_compile.policy.scores import pool_scores
from benchmarks.theory.allocation import window_scores
from benchmarks.theory.dense import DenseLayer

__all__ = ["TIE", "Agreement", "Kept", "agree", "pooled_scores", "total"]

TIE: Final = 1e-4
"""Scores nearer to each other than this share are a tie: they were computed by different code in float32."""

Kept = Sequence[Sequence[Sequence[int]]]
"""Positions in ascending order, of every head of every layer."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two kept sets agree.

    Attributes:
        heads: Heads compared, over all layers and prompts.
        equal: Heads that kept the same entries.
        tied: Heads that differ, in layers in which all differing entries have the same score.
        entries: Entries kept by the first, over all heads.
        shared: Entries kept by both.
        lowest: Smallest share of a head's entries that both kept, of the larger of the two sets.
        lengths: Largest difference of the entries of a head.
        gap: Largest relative difference of the scores of the entries of a layer that only one of them kept.
    """

    heads: int
    equal: int
    tied: int
    entries: int
    shared: int
    lowest: float
    lengths: int
    gap: float

    def row(self) -> dict[str, Any]:
        """Return it as part of a line of the results; a gap that has no size is None."""
        return asdict(self) | {"gap": self.gap if math.isfinite(self.gap) else None}


def agree(first: Kept, second: Kept, scores: Sequence[Tensor] | None) -> Agreement:
    """Compare what two programs kept of one prompt.

    Args:
        first: Of the one.
        second: Of the other.
        scores: For each layer ``[Hkv, n]``, the pooled scores of the candidates, see :func:`pooled_scores`; what lies
            behind them is the window. None if they are not at hand: nothing then counts as tied.
    """
    result = total([])
    for number, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        pairs = [(set(a), set(b)) for a, b in zip(ours, theirs, strict=True)]
        differing = [(head, entry) for head, (a, b) in enumerate(pairs) for entry in a ^ b]
        gap = 0.0
        if differing:
            gap = _gap(scores[number], differing) if scores is not None else float("inf")
        equal = sum(a == b for a, b in pairs)
        layer = Agreement(
            heads=len(pairs),
            equal=equal,
            tied=len(pairs) - equal if gap <= TIE else 0,
            entries=sum(len(a) for a, _ in pairs),
            shared=sum(len(a & b) for a, b in pairs),
            lowest=min(len(a & b) / max(len(a), len(b)) for a, b in pairs),
            lengths=max(abs(len(a) - len(b)) for a, b in pairs),
            gap=gap,
        )
        result = total([result, layer])
    return result


def total(parts: Sequence[Agreement]) -> Agreement:
    """Return the agreement over several prompts."""
    return Agreement(
        heads=sum(part.heads for part in parts),
        equal=sum(part.equal for part in parts),
        tied=sum(part.tied for part in parts),
        entries=sum(part.entries for part in parts),
        shared=sum(part.shared for part in parts),
        lowest=min((part.lowest for part in parts), default=1.0),
        lengths=max((part.lengths for part in parts), default=0),
        gap=max((part.gap for part in parts), default=0.0),
    )


def pooled_scores(layers: Sequence[DenseLayer], way: Mapping[str, Any]) -> list[Tensor]:
    """Return for each layer ``[Hkv, n - window]``: the scores by which both programs should choose, in float64.

    Args:
        layers: The prompt's dense attention, its last ``way["window"]`` queries.
        way: ``window`` and ``kernel``, the width of the average pooling.
    """
    pooled: list[Tensor] = []
    for layer in layers:
        observed = window_scores(layer.weights[:, -way["window"] :], layer.values.shape[0], way["kernel"], "avg")
        candidates = observed.scores[None, :, : -observed.window]
        pooled.append(pool_scores(candidates, kind="avg", kernel_size=way["kernel"])[0])
    return pooled


def _gap(scores: Tensor, entries: Sequence[tuple[int, int]]) -> float:
    """Return the relative spread of the scores of some entries; an entry of the window has none: that is no tie."""
    if any(entry >= scores.shape[1] for _, entry in entries):
        return float("inf")
    found = [float(scores[head, entry]) for head, entry in entries]
    return (max(found) - min(found)) / max(*found, 1e-30)
