"""Selection on the CPU: what is kept whole is not ranked."""

from __future__ import annotations

import torch

from adakv_compile.kernels._checks import check_shape
from adakv_compile.kernels.select.reference import capacity, live, pack, select
from adakv_compile.policy import Policy, keeps_all

__all__ = ["select_cpu"]


def select_cpu(
    scores: torch.Tensor, padding: torch.Tensor | None, sliding_window: int | None, policy: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions and offsets of what is kept; see :mod:`adakv_compile.kernels.select.op`."""
    check_shape("select", "scores", scores, (None, None, None))
    batch, num_heads, length = scores.shape
    rules = Policy.decode(policy)
    if not keeps_all(rules, length):
        return select(scores, padding, sliding_window, policy)
    slots = capacity(rules, num_heads, length, sliding_window, padding is not None)
    valid = live(scores, padding, sliding_window)
    if valid is not None and not bool(valid.all()):
        return pack(valid.expand(batch, num_heads, length), slots)
    positions = torch.zeros((batch, slots), dtype=torch.int32)
    if length:
        kept = positions[:, : num_heads * length].unflatten(1, (num_heads, length))
        kept.copy_(torch.arange(length, dtype=torch.int32))
    offsets = torch.arange(num_heads + 1, dtype=torch.int32).mul_(length).expand(batch, -1).contiguous()
    return positions, offsets
