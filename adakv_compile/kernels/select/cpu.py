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
    valid = None if padding is None and sliding_window is None else live(scores, padding, sliding_window)
    count = num_heads * length
    if slots != count or (valid is not None and not bool(valid.all())):
        everything = scores.new_ones((1, 1, length), dtype=torch.bool) if valid is None else valid
        return pack(everything.expand(batch, num_heads, length), slots)
    # Few operators: what a short prompt costs is the calls of each layer.
    positions = torch.arange(count, dtype=torch.int32).remainder_(length)
    offsets = torch.arange(0, count + 1, length, dtype=torch.int32)
    if batch == 1:
        return positions[None], offsets[None]
    return positions.repeat(batch, 1), offsets.repeat(batch, 1)
