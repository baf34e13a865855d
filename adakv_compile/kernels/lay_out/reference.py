"""Lay out what a store with one KV head holds, and the new tokens behind it, in plain PyTorch."""

from __future__ import annotations

import torch

from adakv_compile.kernels._checks import check_shape
from adakv_compile.kernels._visibility import Visibility
from adakv_compile.kernels.extend.reference import real_positions

__all__ = ["lay_out"]


def lay_out(
    key_new: torch.Tensor,
    value_new: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    tail_length: int,
    prefix_length: int,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    sliding_window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay out; see :mod:`adakv_compile.kernels.lay_out.op`."""
    batch, _, count, key_dim = key_new.shape
    slots = keys.shape[1]
    check_shape("lay_out", "key_new", key_new, (batch, 1, None, None))
    check_shape("lay_out", "keys", keys, (batch, None, key_dim))
    check_shape("lay_out", "tail_keys", tail_keys, (batch, 1, None, key_dim))
    length = prefix_length + tail_length + count
    used = torch.arange(slots, device=keys.device) < offsets[:, 1:]
    after = torch.arange(prefix_length, length, device=keys.device)
    held = torch.cat((used, torch.ones_like(after, dtype=torch.bool).expand(batch, -1)), 1)
    # Positions of slots that hold nothing may be anything.
    at = torch.cat((positions.long().masked_fill(~used, 0), after.expand(batch, -1)), 1)
    heads = 1 if mask is None else mask.shape[1]
    visible = torch.zeros((batch, heads * count, held.shape[1]), dtype=torch.float32, device=keys.device)
    rule = Visibility(
        first=length - count,
        count=count,
        group=heads,
        num_heads=1,
        mask=mask,
        padding=padding,
        sliding_window=sliding_window,
        start=0,
        rows=count,
    )
    rule.hide(visible, torch.arange(batch, device=keys.device), at, past=False)
    visible = visible.unflatten(1, (heads, count)).masked_fill(~held[:, None, None], -torch.inf)
    real = real_positions(padding, length, keys)
    if real is not None:
        held = held & real.gather(1, at)
    unused = ~used[..., None]
    return (
        torch.cat((keys.masked_fill(unused, 0)[:, None], tail_keys[:, :, :tail_length], key_new), 2),
        torch.cat((values.masked_fill(unused, 0)[:, None], tail_values[:, :, :tail_length], value_new), 2),
        visible.to(key_new.dtype),
        at.masked_fill(~held, -1).to(torch.int32),
    )
