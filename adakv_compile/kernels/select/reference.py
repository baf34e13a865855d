"""Selection of the entries to keep, in plain PyTorch."""

from __future__ import annotations

from typing import Any, cast

import torch

from adakv_compile.kernels._checks import check_shape
from adakv_compile.policy import Policy, layer_budget, layer_capacity
from adakv_compile.policy import select as select_entries

__all__ = ["capacity", "live", "pack", "select"]


def capacity(policy: Policy, num_heads: int, length: int, sliding_window: int | None, padded: bool) -> int:
    """Return the entries to make room for in a row, the ``N`` of the store; sizes may be symbolic.

    The lower bound of 2 matters only for one KV head that keeps one entry. With it, PyTorch knows that the size is
    not one of those it specialises on, and adds no guard.
    """
    reachable: Any = length if sliding_window is None else torch.sym_min(length, sliding_window - 1)
    # The upper layers of a pyramid keep a short row whole and less than that of a long one.
    budget = (layer_capacity if padded else layer_budget)(policy, reachable)
    return cast("int", torch.sym_max(num_heads * budget, 2))


def pack(keep: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a choice into positions, heads back to back, without a data-dependent shape.

    Args:
        keep: Bool ``[B, H, L]``, at most ``slots`` True in a row of the batch.
        slots: ``N``.

    Returns:
        Positions ``[B, N]`` int32, ascending inside a head, 0 in unused slots; offsets ``[B, H + 1]`` int32.
    """
    batch, num_heads, length = keep.shape
    offsets = torch.zeros((batch, num_heads + 1), dtype=torch.int32, device=keep.device)
    torch.cumsum(keep.sum(-1), -1, dtype=torch.int32, out=offsets[:, 1:])
    flat = keep.flatten(1)
    # What is not kept goes to one more slot, which is dropped.
    slot = torch.where(flat, flat.cumsum(-1) - 1, slots).clamp_(max=slots)
    position = torch.arange(length, dtype=torch.int32, device=keep.device).repeat(num_heads)
    positions = torch.zeros((batch, slots + 1), dtype=torch.int32, device=keep.device)
    positions.scatter_(1, slot, position.expand(batch, -1))
    return positions[:, :slots].contiguous(), offsets


def select(
    scores: torch.Tensor, padding: torch.Tensor | None, sliding_window: int | None, policy: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions and offsets of what is kept; see :mod:`adakv_compile.kernels.select.op`."""
    check_shape("select", "scores", scores, (None, None, None))
    num_heads, length = scores.shape[1:]
    rules = Policy.decode(policy)
    keep = select_entries(rules, scores, live(scores, padding, sliding_window))
    return pack(keep, capacity(rules, num_heads, length, sliding_window, padding is not None))


def live(scores: torch.Tensor, padding: torch.Tensor | None, sliding_window: int | None) -> torch.Tensor | None:
    """Return which entries are there to be kept, bool ``[B or 1, 1, L]``, or None if all are.

    Raises:
        ValueError: The padding's shape or dtype is not that of the scores' entries.
    """
    batch, _, length = scores.shape
    valid = None
    if padding is not None:
        if padding.dtype != torch.bool:
            raise ValueError(f"select: padding is {padding.dtype}; expected torch.bool")
        check_shape("select", "padding", padding, (None if padding.shape[0] == 1 else batch, length))
        valid = padding.expand(batch, length)[:, None]
    if sliding_window is not None and length >= sliding_window:
        reached = torch.arange(length, device=scores.device) > length - sliding_window
        valid = reached.expand(batch, 1, length) if valid is None else valid & reached
    return valid
