"""Selection on the CPU, where it costs nothing to see that everything stays."""

from __future__ import annotations

import torch

from adakv_compile.kernels._checks import check_shape
from adakv_compile.kernels.select.reference import capacity, select
from adakv_compile.policy import Policy, layer_budget

__all__ = ["select_cpu"]


def select_cpu(
    scores: torch.Tensor, padding: torch.Tensor | None, sliding_window: int | None, policy: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions and offsets of what is kept; see :mod:`adakv_compile.kernels.select.op`.

    A prompt within the budget is kept whole, whatever its scores are: nothing is ranked then.
    """
    check_shape("select", "scores", scores, (None, None, None))
    batch, num_heads, length = scores.shape
    rules = Policy.decode(policy)
    within = length > 0 and sliding_window is None and layer_budget(rules, length) >= length
    # Rows of several lengths may have other budgets: they are left to the general implementation.
    if not within or (padding is not None and not (padding.dtype == torch.bool and bool(padding.all()))):
        return select(scores, padding, sliding_window, policy)
    if padding is not None:
        check_shape("select", "padding", padding, (None if padding.shape[0] == 1 else batch, length))
    slots = capacity(rules, num_heads, length, sliding_window, padding is not None)
    positions = torch.zeros((batch, slots), dtype=torch.int32)
    positions[:, : num_heads * length].unflatten(1, (num_heads, length))[:] = torch.arange(length, dtype=torch.int32)
    offsets = torch.arange(0, num_heads * length + 1, length, dtype=torch.int32).repeat(batch, 1)
    return positions, offsets
