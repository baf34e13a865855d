"""How a layer's budget is shared by its heads (Ada-KV, Algorithms 1 and 2)."""

from __future__ import annotations

import torch

from adakv_compile.policy.policy import Policy

__all__ = ["head_budgets", "uniform_budgets"]


def head_budgets(policy: Policy, counts: torch.Tensor, total: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    """Return the entries of each head: ``alpha`` of its uniform share, the rest as counted.

    Exact: ``alpha`` is a rational, the arithmetic is on integers, and the largest remainders get
    what rounding down leaves (ties to the lower head), so a row's budgets sum to its total. A head
    that holds less than its uniform share leaves the rest to the others; both terms are then within
    ``available`` and so is their mixture.

    Args:
        policy: Gives ``alpha``; methods that are not adaptive have ``alpha = 1``.
        counts: Int64 ``[B, H]``, how many of the row's global top ``total`` each head has.
        total: Int64 ``[B]``, entries to share over the heads of the row, at most
            ``available.sum(-1)``.
        available: Int64 ``[B, H]``, entries each head has.

    Returns:
        Int64 ``[B, H]``, summing to ``total`` over the heads, nowhere above ``available``.
    """
    uniform = uniform_budgets(total, available)
    alpha = policy.uniform_share
    if alpha == 1:
        return uniform
    mixed = alpha.numerator * uniform + (alpha.denominator - alpha.numerator) * counts
    rounded = mixed // alpha.denominator
    # Never reaches a head without a remainder: each is below one and they add up to ``missing``.
    missing = total - rounded.sum(-1)
    return rounded + (_ranks(mixed % alpha.denominator) < missing[:, None])


def uniform_budgets(total: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    """Return equal budgets as far as the heads have entries.

    What a short head cannot use goes to the others, and what does not divide to the lower heads.

    Args:
        total: Int64 ``[B]``, at most ``available.sum(-1)``.
        available: Int64 ``[B, H]``.

    Returns:
        Int64 ``[B, H]``, summing to ``total`` over the heads.
    """
    num_heads = available.shape[-1]
    ascending = available.sort(dim=-1).values
    below = ascending.cumsum(-1) - ascending
    # The water level: with the ``i`` smallest heads full, the ``H - i`` others would share
    # ``total - below_i``. That is too little for every ``i`` but the true one, hence the maximum.
    others = torch.arange(num_heads, 0, -1, device=available.device)
    level = ((total[:, None] - below) // others).amax(-1, keepdim=True)
    budgets = available.minimum(level)
    open_heads = available > level
    missing = total[:, None] - budgets.sum(-1, keepdim=True)
    return budgets + (open_heads & (open_heads.cumsum(-1) <= missing))


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Rank along the last dimension, largest first, ties to the lower index."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1)
