"""Keep the best of entries that lie beside each other, in plain PyTorch."""

from __future__ import annotations

import torch

from adakv_compile.kernels._checks import check_shape
from adakv_compile.kernels._retention import choose
from adakv_compile.kernels.extend.reference import extended_slots, real_positions
from adakv_compile.kernels.select.reference import pack
from adakv_compile.policy import Policy

__all__ = ["retain"]


def retain(
    scores: torch.Tensor,
    at: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: int,
    padding: torch.Tensor | None,
    sliding_window: int | None,
    policy: str,
    evict: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keep the best; see :mod:`adakv_compile.kernels.retain.op`."""
    batch, _, held = scores.shape
    check_shape("retain", "scores", scores, (batch, 1, held))
    check_shape("retain", "at", at, (batch, held))
    check_shape("retain", "keys", keys, (batch, 1, held, None))
    check_shape("retain", "values", values, (batch, 1, held, None))
    # One more position takes what is not held.
    position = at.long().masked_fill(at < 0, length)
    slot = torch.full((batch, length + 1), -1, device=at.device)
    slot.scatter_(1, position, torch.arange(held, device=at.device).expand(batch, held))
    slot = slot[:, :length]
    by_position = scores.new_zeros((batch, length + 1)).scatter_(1, position, scores[:, 0])[:, None, :length]
    valid = (slot >= 0)[:, None]
    if evict:
        real = real_positions(padding, length, keys)
        valid = choose(Policy.decode(policy), by_position, valid, real, sliding_window)
    slots = extended_slots(policy, 1, held, 0, length, sliding_window, padding is not None, evict)
    positions, offsets = pack(valid, slots)
    unused = (torch.arange(slots, device=at.device) >= offsets[:, 1:])[..., None]
    where = slot.gather(1, positions.long()).clamp(min=0)[..., None]
    return (
        keys[:, 0].gather(1, where.expand(-1, -1, keys.shape[3])).masked_fill_(unused, 0),
        values[:, 0].gather(1, where.expand(-1, -1, values.shape[3])).masked_fill_(unused, 0),
        offsets,
        positions,
    )
