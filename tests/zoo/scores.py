"""What the paper's algorithm keeps of the attention that a model really computes, against what a cache holds."""

from __future__ import annotations

from fractions import Fraction
from typing import Final

import torch
from torch import Tensor

from tests.oracles import paper

__all__ = ["wrongly_kept"]

#: Scores nearer to each other than this share may be ranked either way: they were computed in other precisions.
TIE: Final = 1e-4
#: The options' defaults.
KERNEL: Final = 7
ALPHA: Final = Fraction(1, 5)


def wrongly_kept(
    keep: Tensor, weights: Tensor, mask: Tensor | None, *, budget: int, window: int, method: str
) -> list[str]:
    """Return the heads that hold other entries than the paper's algorithm keeps, a line each.

    Args:
        keep: ``[B, Hkv, n]``, the entries held out of the last ``n``: a sliding layer caches fewer than it attends to.
        weights: ``[B, Hq, T, L]``, what the model gives to every key.
        mask: ``[B, L]`` int64, 0 for padding, or None.
        budget: Entries of a head on average.
        window: Observation window.
        method: ``"ada-snapkv"`` or ``"snapkv"``.
    """
    batch, heads, length = keep.shape
    # A preallocated cache has room behind the last query's own key, which no query sees.
    weights = weights[..., : int(weights[:, :, -1].sum((0, 1)).nonzero()[-1]) + 1]
    means = weights[:, :, -window:].mean(2).unflatten(1, (heads, -1)).mean(2)[..., -length:]
    real = torch.ones(batch, weights.shape[-1]) if mask is None else mask.clone()
    for row in range(batch):
        # What the last query can't see any more, no later query sees; where the edge moves with every query, as in a
        # sliding window, not what it can just see either.
        before, left = (int(weights[row, :, query].sum(0).nonzero()[0]) for query in (-2, -1))
        real[row, : left + (left > before)] = 0
    wrong: list[str] = []
    for row in range(batch):
        valid = [[bool(value) for value in real[row, -length:]]] * heads
        scores = means[row].tolist()
        expected = paper.algorithm_2(
            scores,
            valid,
            total=heads * budget,
            window=window,
            alpha=ALPHA if method == "ada-snapkv" else Fraction(1),
            pool_kind="max",
            kernel_size=KERNEL,
        )
        for head in range(heads):
            found = set(keep[row, head].nonzero().flatten().tolist())
            if not _same(found, expected[head], _pooled(scores[head], valid[head], window)):
                wrong.append(f"row {row}, head {head} keeps {sorted(found)}, the paper {sorted(expected[head])}")
    return wrong


def _pooled(scores: list[float], valid: list[bool], window: int) -> dict[int, float]:
    """Return position to pooled score of the candidates: what is real and not in the window."""
    positions = [position for position, is_real in enumerate(valid) if is_real][:-window]
    pooled = paper.pool([scores[position] for position in positions], "max", KERNEL)
    return dict(zip(positions, pooled, strict=True))


def _same(found: set[int], expected: set[int], scores: dict[int, float]) -> bool:
    threshold = min((scores[position] for position in expected if position in scores), default=0.0)
    differing = found ^ expected
    if len(found) != len(expected) or not differing <= scores.keys():
        return False
    return all(abs(scores[position] - threshold) <= TIE * threshold for position in differing)
