"""Append and attend, in plain PyTorch."""

from __future__ import annotations

import torch

from adakv_compile.kernels._checks import (
    check_device,
    check_grouped,
    check_like,
    check_mask,
    check_shape,
    check_softmax,
)
from adakv_compile.kernels._ragged import (
    Attended,
    Entries,
    attend,
    ragged_entries,
    rows_per_block,
    tail_entries,
)
from adakv_compile.kernels._softmax import Softmax
from adakv_compile.kernels._visibility import Visibility

__all__ = [
    "attend_all",
    "attend_block",
    "check_attention",
    "check_store",
    "decode_attention",
    "grouped_query",
    "visibility_of",
]


def decode_attention(
    query: torch.Tensor,
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
    sinks: torch.Tensor | None,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Append and attend on any device, lengths staying there; see :mod:`adakv_compile.kernels.decode_attention.op`.

    Reads the whole capacity of the tail.
    """
    check_attention(
        "decode_attention",
        query,
        key_new,
        value_new,
        keys,
        values,
        offsets,
        positions,
        tail_keys,
        tail_values,
    )
    check_mask("decode_attention", query, mask, padding)
    check_softmax("decode_attention", query, sinks, softcap)
    count, capacity = query.shape[2], tail_keys.shape[2]
    slot = torch.arange(capacity, device=cursor.device)
    fresh = cursor[:1] + slot[:count]
    tail_keys.index_copy_(2, fresh, key_new)
    tail_values.index_copy_(2, fresh, value_new)
    first = cursor[0] + cursor[1]
    cursor[:1].add_(count)
    used = slot < cursor[:1]
    # What lies behind the cursor may be anything; a weight of 0 would not make a NaN vanish.
    tail = tail_entries(tail_keys, tail_values.where(used[:, None], 0), slot + cursor[1:2], used)
    visibility = visibility_of(query, tail_keys.shape[1], first, mask, padding, sliding_window)
    entries = [*ragged_entries(keys, values, offsets, positions), tail]
    return attend_all(entries, query, Softmax(scale, softcap, sinks), visibility)


def grouped_query(query: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    """Scale queries ``[B, Hq, T, D]`` and group them by KV head: ``[B * H, G, T, D]``."""
    return (query * scale).unflatten(1, (num_heads, -1)).flatten(0, 1)


def attend_all(entries: list[Entries], query: torch.Tensor, softmax: Softmax, visibility: Visibility) -> torch.Tensor:
    """Attend with all queries ``[B, Hq, T, D]``, in blocks where the transients would be large.

    Returns:
        ``[B, Hq, T, Dv]``, contiguous, in the dtype of the query.
    """
    grouped = grouped_query(query, visibility.num_heads, softmax.scale)
    count = visibility.count
    block = rows_per_block(entries, visibility.group, count)
    found = [
        attend_block(entries, grouped, softmax, visibility.block(start, min(block, count - start))).output.unflatten(
            1, (visibility.group, -1)
        )
        for start in range(0, count, block)
    ]
    output = found[0] if len(found) == 1 else torch.cat(found, 2)
    return output.to(query.dtype).view(*query.shape[:3], -1)


def attend_block(entries: list[Entries], grouped: torch.Tensor, softmax: Softmax, visibility: Visibility) -> Attended:
    """Attend with the rows of one block of :func:`grouped_query`."""
    rows = grouped[:, :, visibility.start : visibility.start + visibility.rows].flatten(1, 2)
    return attend(entries, rows, softmax, visibility)


def check_attention(
    op: str,
    query: torch.Tensor,
    key_new: torch.Tensor,
    value_new: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
) -> None:
    """Check what decode attention and extension have in common.

    Raises:
        ValueError: A shape, dtype or device does not fit the others.
    """
    check_like(op, query, key_new=key_new, value_new=value_new)
    num_heads, value_dim = check_store(op, query, keys, values, offsets, positions, tail_keys, tail_values)
    batch, _, count, key_dim = query.shape
    check_shape(op, "key_new", key_new, (batch, num_heads, count, key_dim))
    check_shape(op, "value_new", value_new, (batch, num_heads, count, value_dim))


def check_store(
    op: str,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
) -> tuple[int, int]:
    """Check queries and the store that they attend to.

    Returns:
        Number of KV heads, and head dimension of values.

    Raises:
        ValueError: A shape, dtype or device does not fit the others.
    """
    check_shape(op, "query", query, (None, None, None, None))
    batch, num_query_heads, _, key_dim = query.shape
    check_shape(op, "offsets", offsets, (batch, None))
    num_heads = offsets.shape[1] - 1
    check_grouped(op, num_query_heads, num_heads)
    check_shape(op, "keys", keys, (batch, None, key_dim))
    slots = keys.shape[1]
    check_shape(op, "values", values, (batch, slots, None))
    value_dim = values.shape[2]
    check_shape(op, "positions", positions, (batch, slots))
    check_shape(op, "tail_keys", tail_keys, (batch, num_heads, None, key_dim))
    check_shape(op, "tail_values", tail_values, (batch, num_heads, tail_keys.shape[2], value_dim))
    check_device(op, query, offsets=offsets, positions=positions)
    check_like(op, query, keys=keys, values=values, tail_keys=tail_keys, tail_values=tail_values)
    return num_heads, value_dim


def visibility_of(
    query: torch.Tensor,
    num_heads: int,
    first: int | torch.Tensor,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    sliding_window: int | None,
) -> Visibility:
    """Return the rule for a call's queries ``[B, Hq, T, D]``, the first of which sits at ``first``."""
    count = query.shape[2]
    return Visibility(
        first=first,
        count=count,
        group=query.shape[1] // num_heads,
        num_heads=num_heads,
        mask=mask,
        padding=padding,
        sliding_window=sliding_window,
        start=0,
        rows=count,
    )
