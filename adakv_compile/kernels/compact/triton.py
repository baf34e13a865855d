"""Device code of ``adakv::compact_v1``: one gather of keys and values."""
# Device code is compiled by Triton, not checked by Python's type checkers: its values have no Python types.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["compact_kernel", "head_of", "store_rows"]


@triton.jit
def head_of(offsets, slot, num_heads, HEADS: tl.constexpr):
    """Return the KV head of each slot of one row, whose ``num_heads + 1`` offsets start at ``offsets``.

    Slots past the last offset get ``num_heads``: a head's number is how many heads end at or before the slot.
    """
    head = tl.arange(0, HEADS)
    ends = tl.load(offsets + 1 + head, mask=head < num_heads, other=2147483647)
    return tl.sum((slot[:, None] >= ends[None, :]).to(tl.int32), 1)


@triton.jit
def store_rows(target, row, stored, source, stride_d, loaded, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Copy a row to each ``row`` of a contiguous ``target`` from the addresses ``source``; zeros if not ``loaded``."""
    column = tl.arange(0, WIDTH)
    held = column < DIM
    entries = tl.load(
        source[:, None] + (column.to(tl.int64) * stride_d)[None, :], mask=loaded[:, None] & held[None, :], other=0.0
    )
    tl.store(target + (row * DIM)[:, None] + column[None, :], entries, mask=stored[:, None] & held[None, :])


@triton.jit
def compact_kernel(
    key,
    value,
    positions,
    offsets,
    keys,
    values,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vl,
    stride_vd,
    slots,
    num_heads,
    KEY_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Fill ``SLOTS`` slots of one row; the grid is blocks of slots and rows."""
    batch = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    stored = slot < slots
    head = head_of(offsets + batch * (num_heads + 1), slot, num_heads, HEADS)
    # Positions of unused slots may be anything.
    used = stored & (head < num_heads)
    row = batch * slots + slot
    position = tl.load(positions + row, mask=used, other=0).to(tl.int64)
    head = head.to(tl.int64)
    source = key + batch * stride_kb + head * stride_kh + position * stride_kl
    store_rows(keys, row, stored, source, stride_kd, used, KEY_DIM, KEY_WIDTH)
    source = value + batch * stride_vb + head * stride_vh + position * stride_vl
    store_rows(values, row, stored, source, stride_vd, used, VALUE_DIM, VALUE_WIDTH)
