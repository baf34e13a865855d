"""What eviction does to the attention output of one query, and the paper's bound on it.

Ada-KV (arXiv 2407.11550), section 3: with ``y = sum_i A_i V_i W_i^O`` over the query heads and ``I_i`` the mask of what
head ``i`` keeps, the weights are divided by the mass that is kept, ``F_i = sum(I_i * A_i)``. Theorem 3.1:
``||y - y^||_1 <= 2hC - 2C * sum_i F_i`` with ``C = max_i ||V_i W_i^O||_inf``, the largest L1 norm of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Measured", "measure", "project"]


@dataclass(frozen=True, slots=True)
class Measured:
    """One query of one layer.

    Attributes:
        loss: L1 norm of the difference that eviction makes to the attention output.
        norm: L1 norm of that output without eviction.
        bound: Upper bound of the loss (Theorem 3.1).
        mass: Share of the attention weights that is kept, mean over the query heads.
    """

    loss: float
    norm: float
    bound: float
    mass: float


def project(values: Tensor, output: Tensor) -> Tensor:
    """Return ``V_i W_i^O`` for every query head, ``[Hq, L, hidden]``.

    Args:
        values: ``[Hkv, L, D]``.
        output: ``[Hq, D, hidden]``.
    """
    return values.repeat_interleave(output.shape[0] // values.shape[0], 0) @ output


def measure(weights: Tensor, projected: Tensor, keep: Tensor) -> Measured:
    """Return what eviction does to one query.

    Args:
        weights: ``[Hq, n]``, the query's attention over what is cached, without eviction.
        projected: ``[Hq, n, hidden]``, see :func:`project`.
        keep: Bool ``[Hkv, n]``, True where a KV head keeps an entry.

    Raises:
        ValueError: A head keeps nothing that the query attends to: there is no attention left.
    """
    heads = weights.shape[0]
    kept = weights * keep.repeat_interleave(heads // keep.shape[0], 0)
    mass = kept.sum(-1)
    if not bool((mass > 0).all()):
        raise ValueError(f"heads {(mass <= 0).nonzero().flatten().tolist()} keep nothing that the query attends to")
    constant = float(projected.abs().sum(-1).max())
    full = torch.einsum("hn,hnd->d", weights, projected)
    evicted = torch.einsum("hn,hnd->d", kept / mass[:, None], projected)
    return Measured(
        loss=float((full - evicted).abs().sum()),
        norm=float(full.abs().sum()),
        bound=2 * heads * constant - 2 * constant * float(mass.sum()),
        mass=float(mass.mean()),
    )
