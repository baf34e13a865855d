"""Append and attend on the CPU, where lengths are at hand: by the C++ kernel, or by PyTorch's operators.

With these a step of one token costs two products per head; everything else is batched.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import torch

from adakv_compile.kernels._checks import check_mask, check_softmax
from adakv_compile.kernels._ragged import ragged_entries, tail_entries
from adakv_compile.kernels._softmax import Softmax
from adakv_compile.kernels._visibility import Visibility
from adakv_compile.kernels.decode_attention import native
from adakv_compile.kernels.decode_attention.reference import (
    attend_all,
    check_attention,
    visibility_of,
)

__all__ = ["attend_store", "decode_attention_cpu"]

# A small half-precision product costs as much to start as several of the batched ones; measured on AVX-512.
_MAX_HALF_PRODUCTS: Final = 8


def decode_attention_cpu(
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
    """Append and attend; see :mod:`adakv_compile.kernels.decode_attention.op`."""
    if query.shape[2] == 1:
        native.take_over()
        found = _decode_natively(
            *(query, key_new, value_new, keys, values, offsets, positions, tail_keys, tail_values, cursor),
            *(mask, padding, sinks, scale, sliding_window, softcap),
        )
        if found is not None:
            return found
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
    count = key_new.shape[2]
    length, start = cursor[:2].tolist()
    end = length + count
    if end > tail_keys.shape[2]:
        raise ValueError(
            f"decode_attention: {length} tail entries and {count} new ones exceed the capacity {tail_keys.shape[2]}"
        )
    tail_keys[:, :, length:end] = key_new
    tail_values[:, :, length:end] = value_new
    cursor[0] = end
    tail_keys, tail_values = tail_keys[:, :, :end], tail_values[:, :, :end]
    softmax = Softmax(scale, softcap, sinks)
    store = (keys, values, offsets, positions, tail_keys, tail_values)
    return attend_store(query, *store, start, mask, padding, softmax, sliding_window)


def _decode_natively(
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
) -> torch.Tensor | None:
    """Attend by the C++ kernel, masks looked up for it; None if it doesn't serve these."""
    prefix_seen = tail_seen = None
    if mask is not None or padding is not None:
        # Numbers to be added are looked up by the operators alone, and so are masks that differ from head to head.
        if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1 or mask.dim() != 4):
            return None
        length, start = cursor[:2].tolist()
        end = start + length + 1
        if padding is not None and mask is None and padding.shape[1] >= end and padding.all():
            padding = None
        else:
            check_mask("decode_attention", query, mask, padding)
            visibility = visibility_of(query, tail_keys.shape[1], end - 1, mask, padding, None)
            after = torch.arange(start, end, device=keys.device)
            prefix_seen = _seen(visibility, positions)
            tail_seen = _seen(visibility, after.expand(query.shape[0], -1))
    # A mask says everything; without one the kernel follows the rule.
    window = sliding_window if mask is None else None
    return native.decode(
        *(query, key_new, value_new, keys, values, offsets, positions, tail_keys, tail_values, cursor),
        *(prefix_seen, tail_seen, sinks, scale, window, softcap),
    )


def _seen(visibility: Visibility, positions: torch.Tensor) -> torch.Tensor:
    """Return bool ``[B, n]``, whether entries at ``positions`` ``[B, n]`` are visible; contiguous."""
    return (_bias(visibility, positions, torch.float32) == 0).contiguous()


def attend_store(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    start: int,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    softmax: Softmax,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attend with the last queries to a store that holds their tokens.

    Args:
        query: ``[B, Hq, T, Dk]``, the last of them at position ``start + t - 1``.
        keys: ``[B, N, Dk]``.
        values: ``[B, N, Dv]``.
        offsets: ``[B, H + 1]``.
        positions: ``[B, N]``.
        tail_keys: ``[B, H, t, Dk]``, nothing but what is used.
        tail_values: ``[B, H, t, Dv]``, likewise.
        start: Position of tail entry 0.
        mask: As in :mod:`adakv_compile.kernels.decode_attention.op`.
        padding: Likewise.
        softmax: What becomes of products.
        sliding_window: As in :mod:`adakv_compile.kernels.decode_attention.op`.

    Returns:
        ``[B, Hq, T, Dv]``, contiguous.
    """
    batch, num_heads, length, _ = tail_keys.shape
    count, end = query.shape[2], start + length
    if padding is not None and padding.shape[1] >= end and padding.all():
        padding = None
    visibility = visibility_of(query, num_heads, end - count, mask, padding, sliding_window)
    shared = count == 1 and length > 0 and (mask is None or mask.shape[1] == 1)
    if not shared or (keys.itemsize < 4 and batch * num_heads > _MAX_HALF_PRODUCTS):
        entries = ragged_entries(keys, values, offsets, positions, past=count <= length)
        if length:
            after = torch.arange(start, end, device=keys.device)
            entries.append(tail_entries(tail_keys, tail_values, after, None))
        return attend_all(entries, query, softmax, visibility)
    prefix_bias = tail_bias = None
    if visibility.looked_up:
        after = torch.arange(start, end, device=keys.device)
        prefix_bias = _bias(visibility, positions, keys.dtype)
        tail_bias = _bias(visibility, after.expand(batch, length), keys.dtype)
    rows = (query * softmax.scale).reshape(batch, num_heads, -1, query.shape[3])
    output = _attend_heads(rows, keys, values, offsets, tail_keys, tail_values, softmax, prefix_bias, tail_bias)
    return output.view(*query.shape[:3], -1)


def _bias(visibility: Visibility, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what to add to the logits of entries at ``positions`` ``[B, n]``, the same for all heads."""
    batch, count = positions.shape
    rule = Visibility(
        first=visibility.first,
        count=1,
        group=1,
        num_heads=1,
        mask=visibility.mask,
        padding=visibility.padding,
        sliding_window=visibility.sliding_window,
        start=0,
        rows=1,
    )
    exact = torch.promote_types(dtype, torch.float32)
    bias = torch.zeros((batch, 1, count), dtype=exact, device=positions.device)
    owner = torch.arange(batch, device=positions.device)
    return rule.hide(bias, owner, positions, past=True)[:, 0].to(dtype)


def _attend_heads(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    softmax: Softmax,
    prefix_bias: torch.Tensor | None,
    tail_bias: torch.Tensor | None,
) -> torch.Tensor:
    """Attend with the queries of one step to ragged prefix and dense tail.

    The logits of all heads lie in one padded table, the tail's first, so that one softmax serves all; no key or value
    is copied.

    Args:
        query: ``[B, H, G, Dk]``, scaled.
        keys: ``[B, N, Dk]``.
        values: ``[B, N, Dv]``.
        offsets: ``[B, H + 1]``.
        tail_keys: ``[B, H, t, Dk]``, ``t`` at least 1.
        tail_values: ``[B, H, t, Dv]``.
        softmax: What becomes of scaled products.
        prefix_bias: ``[B, N]``, added to the logits in the dtype of the query. None: nothing is hidden.
        tail_bias: ``[B, t]``, given together with ``prefix_bias``.

    Returns:
        ``[B * H, G, Dv]`` in the dtype of the query; zeros where nothing is visible.
    """
    batch, num_heads, group, _ = query.shape
    slots, tail = keys.shape[1], tail_keys.shape[2]
    # Sizes of the heads of each row, then of its unused slots.
    sizes = [right - left for row in offsets.tolist() for left, right in pairwise((*row, slots))]
    parts = [
        (part - part // (num_heads + 1), part, size)
        for part, size in enumerate(sizes)
        if size and (part + 1) % (num_heads + 1)
    ]
    widest = max((size for _, _, size in parts), default=0)
    rows = query.flatten(0, 1)
    exact = torch.promote_types(query.dtype, torch.float32)
    tail_logits = torch.bmm(rows, tail_keys.flatten(0, 1).mT)
    if softmax.softcap is not None:
        tail_logits = softmax.cap(tail_logits.to(exact)).to(query.dtype)
    if tail_bias is not None:
        tail_logits.unflatten(0, (batch, num_heads)).add_(tail_bias[:, None, None])
    sinks = softmax.sinks_of_rows(num_heads, 1, rows[:, :, 0])
    # A sink is one more column.
    columns = tail + widest + (sinks is not None)
    logits = query.new_full((batch * num_heads, group, columns), -torch.inf)
    logits[:, :, :tail] = tail_logits
    if sinks is not None:
        logits[:, :, -1] = sinks
    heads, tables = rows.unbind(0), logits[:, :, tail:].unbind(0)
    key_parts = keys.flatten(0, 1).t().split(sizes, 1)
    bias_parts = None if prefix_bias is None else prefix_bias.flatten().split(sizes)
    for head, part, size in parts:
        found = tables[head][:, :size]
        if softmax.softcap is not None:
            products = torch.mm(heads[head], key_parts[part]).to(exact)
            found.copy_(softmax.cap(products))
            if bias_parts is not None:
                found.add_(bias_parts[part])
        elif bias_parts is None:
            torch.mm(heads[head], key_parts[part], out=found)
        else:
            torch.addmm(bias_parts[part], heads[head], key_parts[part], out=found)
    weights = torch.softmax(logits, -1, dtype=exact)
    # Softmax makes a row that sees nothing NaN throughout; looking at one column finds out whether there is any.
    if prefix_bias is not None and weights[..., 0].isnan().any():
        weights.masked_fill_((logits == -torch.inf).all(-1, keepdim=True), 0.0)
    weights = weights.to(query.dtype)
    output = torch.bmm(weights[:, :, :tail], tail_values.flatten(0, 1))
    outputs, tables = output.unbind(0), weights[:, :, tail:].unbind(0)
    value_parts = values.flatten(0, 1).split(sizes)
    for head, part, size in parts:
        outputs[head].addmm_(tables[head][:, :size], value_parts[part])
    return output
