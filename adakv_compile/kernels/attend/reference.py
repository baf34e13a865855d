"""Attention to a store, in plain PyTorch."""

from __future__ import annotations

import torch

from adakv_compile.kernels._checks import check_mask, check_softmax
from adakv_compile.kernels._ragged import ragged_entries, tail_entries
from adakv_compile.kernels._softmax import Softmax
from adakv_compile.kernels.decode_attention.reference import attend_all, check_store, visibility_of

__all__ = ["attend", "check_attend"]


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    cursor: torch.Tensor,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend on any device, lengths staying there; see :mod:`adakv_compile.kernels.attend.op`.

    Reads the whole capacity of the tail.
    """
    store = (keys, values, offsets, positions, tail_keys, tail_values)
    check_attend(query, *store, mask, padding, sinks, softcap)
    count, capacity = query.shape[2], tail_keys.shape[2]
    # How many of the call's tokens are in the tail is data: those in the prefix are compared, too.
    entries = ragged_entries(keys, values, offsets, positions, past=False)
    if capacity:
        slot = torch.arange(capacity, device=cursor.device)
        used = slot < cursor[:1]
        # What lies behind the cursor may be anything; a weight of 0 would not make a NaN vanish.
        tail = (tail_keys, tail_values.where(used[:, None], 0))
        entries.append(tail_entries(*tail, slot + cursor[1:2], used))
    first = cursor[0] + cursor[1] - count
    visibility = visibility_of(query, tail_keys.shape[1], first, mask, padding, sliding_window)
    return attend_all(entries, query, Softmax(scale, softcap, sinks), visibility)


def check_attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> None:
    """Check the arguments of a call.

    Raises:
        ValueError: A shape, dtype or device does not fit the others, or the cap is not positive.
    """
    check_store("attend", query, keys, values, offsets, positions, tail_keys, tail_values)
    check_mask("attend", query, mask, padding)
    check_softmax("attend", query, sinks, softcap)
