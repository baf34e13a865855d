"""Append and attend in Triton, one launch; attention to a ragged prefix and a dense tail for other ops."""

from __future__ import annotations

from typing import Final

import torch

from adakv_compile.kernels._checks import check_mask, check_softmax
from adakv_compile.kernels._launch import factors_of, launch
from adakv_compile.kernels._softmax import Softmax
from adakv_compile.kernels._support import target_of
from adakv_compile.kernels.decode_attention.reference import check_attention
from adakv_compile.kernels.decode_attention.triton import attend as attend_kernel
from adakv_compile.kernels.decode_attention.tuning import Shape, plan

__all__ = ["attend", "check_cursor", "decode_attention"]

# In front of a store's counters, where a buffer for them alone has two unused elements.
_LENGTHS: Final = 2


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
    """Append and attend; see :mod:`adakv_compile.kernels.decode_attention.op`."""
    op = "decode_attention"
    check_attention(op, query, key_new, value_new, keys, values, offsets, positions, tail_keys, tail_values)
    check_mask(op, query, mask, padding)
    check_softmax(op, query, sinks, softcap)
    check_cursor(op, cursor)
    output, _ = attend(
        query,
        key_new,
        value_new,
        keys,
        values,
        offsets,
        positions,
        tail_keys,
        tail_values,
        cursor=cursor,
        tail_length=0,
        prefix_length=0,
        mask=mask,
        padding=padding,
        softmax=Softmax(scale, softcap, sinks),
        sliding_window=sliding_window,
        want_lse=False,
    )
    return output


def attend(
    query: torch.Tensor,
    key_new: torch.Tensor | None,
    value_new: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    *,
    cursor: torch.Tensor | None,
    tail_length: int,
    prefix_length: int,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    softmax: Softmax,
    sliding_window: int | None,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend to prefix, tail and new tokens; :mod:`adakv_compile.kernels.decode_attention.op` has the rules.

    Args:
        query: ``[B, Hq, T, Dk]``, any strides.
        key_new: ``[B, Hkv, T, Dk]``, any strides. None: the store holds the new tokens, and nothing is mutated.
        value_new: ``[B, Hkv, T, Dv]``, any strides, or None, too.
        keys: ``[B, N, Dk]``.
        values: ``[B, N, Dv]``.
        offsets: Int32 ``[B, Hkv + 1]``.
        positions: Int32 ``[B, N]``.
        tail_keys: ``[B, Hkv, C, Dk]``, mutated if there are a cursor and new keys.
        tail_values: ``[B, Hkv, C, Dv]``, likewise.
        cursor: Lengths on the device: new tokens are appended, and it is advanced. None: nothing is mutated.
        tail_length: Tail entries in use, if there is no cursor.
        prefix_length: Position of tail entry 0, if there is no cursor.
        mask: Bool or float ``[B | 1, 1 | Hq, T | 1, M]``, in place of the causal and sliding rules.
        padding: Bool ``[B | 1, M]``, on top.
        softmax: What becomes of products.
        sliding_window: Keys a query sees, its own included.
        want_lse: Whether to return the softmax sums.

    Returns:
        ``[B, Hq, T, Dv]``, contiguous, and the natural logs of the sums of ``exp`` of the logits, sinks included,
        float32 ``[B, Hq, T]``, ``-inf`` for a query that sees nothing.
    """
    contiguous = {
        "keys": keys,
        "values": values,
        "offsets": offsets,
        "positions": positions,
        "tail_keys": tail_keys,
        "tail_values": tail_values,
    }
    for name, tensor in contiguous.items():
        if not tensor.is_contiguous():
            raise ValueError(f"decode_attention: {name} has strides {list(tensor.stride())}; expected contiguous")
    batch, num_query_heads, count, key_dim = query.shape
    num_heads, value_dim = tail_keys.shape[1], values.shape[2]
    stored = key_new is None or value_new is None
    append = cursor is not None and not stored
    heads = batch * num_heads
    device = query.device
    output = query.new_empty((batch, num_query_heads, count, value_dim))
    sums = query.new_empty((batch, num_query_heads, count), dtype=torch.float32) if want_lse else None
    if query.numel() == 0:
        return output, sums
    chosen = plan(
        target_of(device),
        Shape(
            dtype=query.dtype,
            batch=batch,
            num_heads=num_heads,
            group=num_query_heads // num_heads,
            count=count,
            key_dim=key_dim,
            value_dim=value_dim,
            slots=keys.shape[1],
            capacity=tail_length if cursor is None else tail_keys.shape[2],
            causal=True,
            window=sliding_window is not None,
            mask=None if mask is None else mask.dtype,
            padded=padding is not None,
            append=append,
            stored=stored,
        ),
    )
    counters = partial = partial_sums = None
    if chosen.split:
        rows = chosen.constants["ROWS"]
        shape = (chosen.row_blocks, chosen.programs, rows, value_dim)
        partial = query.new_empty(shape, dtype=torch.float32)
        partial_sums = query.new_empty((*shape[:2], 2, rows), dtype=torch.float32)
    if chosen.split or append:
        needed = _LENGTHS + 1 + heads * chosen.row_blocks
        # Without new tokens the cursor is not the call's to write to.
        if append and cursor is not None and cursor.shape[0] >= needed and cursor.is_contiguous():
            counters = cursor
        else:
            counters = offsets.new_zeros(needed)
    table = mask_strides = padding_strides = None
    columns = real_columns = 0
    if mask is not None:
        columns = mask.shape[3]
        table = mask.expand(batch, num_query_heads, count, columns)
        mask_strides = table.stride()
    real = None
    if padding is not None:
        real_columns = padding.shape[1]
        real = padding.expand(batch, real_columns)
        padding_strides = real.stride()
    launch(
        attend_kernel,
        (chosen.programs, chosen.row_blocks),
        query,
        key_new,
        value_new,
        keys,
        values,
        offsets,
        positions,
        tail_keys,
        tail_values,
        cursor,
        counters,
        table,
        real,
        None if softmax.sinks is None else softmax.sinks.contiguous(),
        output,
        sums,
        partial,
        partial_sums,
        *factors_of(softmax.scale, softmax.softcap),
        tail_length,
        prefix_length,
        count,
        heads,
        max(1, chosen.extra),
        keys.shape[1],
        tail_keys.shape[2],
        sliding_window or 0,
        columns,
        real_columns,
        *query.stride(),
        *((0, 0, 0, 0) if key_new is None else key_new.stride()),
        *((0, 0, 0, 0) if value_new is None else value_new.stride()),
        *(mask_strides or (0, 0, 0, 0)),
        *(padding_strides or (0, 0)),
        device=device,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        **({} if chosen.maxnreg is None else {"maxnreg": chosen.maxnreg}),
        **chosen.constants,
    )
    return output, sums


def check_cursor(op: str, cursor: torch.Tensor) -> None:
    """Check the lengths of a store.

    Raises:
        ValueError: They are not what the kernel reads.
    """
    if cursor.dim() != 1 or cursor.shape[0] < _LENGTHS or cursor.dtype != torch.int32:
        raise ValueError(f"{op}: cursor is {cursor.dtype} {list(cursor.shape)}; expected torch.int32 [2 or more]")
