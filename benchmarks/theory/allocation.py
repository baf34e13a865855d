"""What each allocation keeps of a layer, for given scores, and how much of the scores that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from adakv_compile.policy import Policy, select
from adakv_compile.policy.policy import Pool
from adakv_compile.policy.scores import pool_scores

__all__ = ["ALLOCATIONS", "Observed", "kept_scores", "oracle", "window_scores"]

ALLOCATIONS: Final[Mapping[str, float]] = {"uniform": 1.0, "adaptive 0.2": 0.2, "adaptive 0": 0.0}
"""Name to ``alpha``, the share of the budget that is uniform."""


@dataclass(frozen=True, eq=False, slots=True)
class Observed:
    """Scores of a layer's entries and how they are to be read.

    Attributes:
        scores: ``[Hkv, n]``, not pooled, none negative.
        window: The last entries, which every head keeps.
        kernel_size: Width of the pooling.
        pool: Kind of the pooling.
    """

    scores: Tensor
    window: int
    kernel_size: int
    pool: Pool = "max"

    def keep(self, budget: int, alpha: float) -> Tensor:
        """Return bool ``[Hkv, n]``, what is kept with ``budget`` entries per head on average."""
        policy = Policy(budget=budget, window=self.window, pool=self.pool, kernel_size=self.kernel_size, alpha=alpha)
        return select(policy, self.scores[None].float())[0]


def oracle(weights: Tensor, heads: int) -> Observed:
    """Return the true scores of one query: its own weights, nothing pooled, nothing but its own entry kept anyway.

    Args:
        weights: ``[Hq, n]``.
        heads: KV heads.
    """
    return Observed(weights.unflatten(0, (heads, -1)).mean(1), window=1, kernel_size=1)


def window_scores(weights: Tensor, heads: int, kernel_size: int, pool: Pool = "max") -> Observed:
    """Return what an observation window sees (Ada-KV, Algorithm 2, lines 1 to 3).

    Args:
        weights: ``[Hq, W, n]``, those of the window's queries.
        heads: KV heads.
        kernel_size: Width of the pooling.
        pool: Kind of the pooling.
    """
    means = weights.mean(1).unflatten(0, (heads, -1)).mean(1)
    return Observed(means, window=weights.shape[1], kernel_size=kernel_size, pool=pool)


def kept_scores(observed: Observed, keep: Tensor) -> float:
    """Return the sum of the pooled scores of what is kept outside the window; ``alpha = 0`` makes it the largest.

    Args:
        observed: The scores.
        keep: Bool ``[Hkv, n]``.
    """
    candidates = observed.scores[None, :, : -observed.window].float()
    pooled = pool_scores(candidates, kind=observed.pool, kernel_size=observed.kernel_size)[0]
    return float(pooled.double()[keep[:, : -observed.window]].sum())
