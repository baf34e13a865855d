"""Append to a store with one KV head and lay out everything it holds, in plain PyTorch."""

from __future__ import annotations

import torch

from adakv_compile.kernels._checks import check_shape
from adakv_compile.kernels._visibility import Visibility

__all__ = ["entries"]


def entries(
    key_new: torch.Tensor,
    value_new: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    cursor: torch.Tensor,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    sliding_window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Append and lay out; see :mod:`adakv_compile.kernels.entries.op`."""
    batch, _, count, key_dim = key_new.shape
    slots, capacity = keys.shape[1], tail_keys.shape[2]
    check_shape("entries", "key_new", key_new, (batch, 1, None, None))
    check_shape("entries", "keys", keys, (batch, None, key_dim))
    check_shape("entries", "tail_keys", tail_keys, (batch, 1, None, key_dim))
    slot = torch.arange(capacity, device=keys.device)
    fresh = cursor[:1] + slot[:count]
    tail_keys.index_copy_(2, fresh, key_new)
    tail_values.index_copy_(2, fresh, value_new)
    first = cursor[0] + cursor[1]
    cursor[:1].add_(count)
    held_in_tail = slot < cursor[:1]
    held = torch.cat(
        (torch.arange(slots, device=keys.device) < offsets[:, 1:], held_in_tail.expand(batch, capacity)), 1
    )
    # Positions of slots that hold nothing may be anything.
    at = torch.cat((positions, (slot + cursor[1:2]).to(positions.dtype).expand(batch, capacity)), 1)
    heads = 1 if mask is None else mask.shape[1]
    visible = torch.zeros((batch, heads * count, slots + capacity), dtype=torch.float32, device=keys.device)
    rule = Visibility(
        first=first,
        count=count,
        group=heads,
        num_heads=1,
        mask=mask,
        padding=padding,
        sliding_window=sliding_window,
        start=0,
        rows=count,
    )
    rule.hide(visible, torch.arange(batch, device=keys.device), at.masked_fill(~held, 0), past=False)
    visible = visible.unflatten(1, (heads, count)).masked_fill(~held[:, None, None], -torch.inf)
    # What lies behind the cursor may be NaN, which no weight of zero takes away.
    return (
        torch.cat((keys[:, None], tail_keys), 2).masked_fill(~held[:, None, :, None], 0),
        torch.cat((values[:, None], tail_values), 2).masked_fill(~held[:, None, :, None], 0),
        visible.to(key_new.dtype),
    )
