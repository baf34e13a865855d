"""Several tokens over a compressed past on the CPU, where lengths are at hand: PyTorch's attention, head by head."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn import functional

from adakv_compile.kernels.decode_attention.reference import check_attention
from adakv_compile.kernels.extend.reference import Extended, extend

__all__ = ["extend_cpu"]


def extend_cpu(
    query: torch.Tensor,
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
    sinks: torch.Tensor | None,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    policy: str,
    evict: bool,
) -> Extended:
    """Attend, then compress; see :mod:`adakv_compile.kernels.extend.op`."""
    check_attention("extend", query, key_new, value_new, keys, values, offsets, positions, tail_keys, tail_values)
    length = prefix_length + tail_length + key_new.shape[2]
    all_real = padding is None or (padding.dtype == torch.bool and padding.shape[1] >= length and bool(padding.all()))
    # The operator's fast kernel takes heads of one dimension only.
    plain = mask is None and sinks is None and sliding_window is None and softcap is None
    attention = None
    if plain and all_real and key_new.shape[3] == value_new.shape[3]:
        dense_keys = torch.cat((tail_keys[:, :, :tail_length], key_new), 2)
        dense_values = torch.cat((tail_values[:, :, :tail_length], value_new), 2)
        attention = _attend(query, keys, values, offsets, dense_keys, dense_values, scale)
    return extend(
        *(query, key_new, value_new, keys, values, offsets, positions, tail_keys, tail_values),
        *(tail_length, prefix_length, mask, padding, sinks, scale, sliding_window, softcap, policy, evict),
        attention,
    )


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    dense_keys: torch.Tensor,
    dense_values: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend to ragged entries, all of which every query sees, and causally to the dense ones behind them.

    Args:
        query: ``[B, Hq, T, D]``, those of the last ``T`` dense entries.
        keys: ``[B, N, D]``.
        values: ``[B, N, D]``.
        offsets: ``[B, H + 1]``.
        dense_keys: ``[B, H, F, D]``.
        dense_values: ``[B, H, F, D]``.
        scale: Factor on the products.

    Returns:
        ``[B, Hq, T, D]``, contiguous.
    """
    group, count = query.shape[1] // dense_keys.shape[1], query.shape[2]
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for row, bounds in enumerate(offsets.tolist()):
        for head, (begin, end) in enumerate(pairwise(bounds)):
            mine = slice(head * group, head * group + group)
            key = torch.cat((keys[row, begin:end], dense_keys[row, head]))
            value = torch.cat((values[row, begin:end], dense_values[row, head]))
            output[row, mine] = _attend_at_end(query[row, mine], key, value, count, scale)
    return output


def _attend_at_end(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, count: int, scale: float
) -> torch.Tensor:
    """Attend with the queries ``[G, T, D]`` of the last ``T`` of the entries ``[n, D]``, each to what is before it."""
    before = key.shape[0] - count
    key, value = (entries.expand(1, query.shape[0], *entries.shape) for entries in (key, value))
    if before > count:
        seen = torch.ones((count, key.shape[2]), dtype=torch.bool).tril_(before)
        return functional.scaled_dot_product_attention(query[None], key, value, attn_mask=seen, scale=scale)[0]
    # The operator's causal flag starts at the first key. Queries of nothing there cost less than a mask of T * n.
    padded = functional.pad(query, (0, 0, before, 0))
    return functional.scaled_dot_product_attention(padded[None], key, value, is_causal=True, scale=scale)[0, :, before:]
