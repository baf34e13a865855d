"""Device code of ``adakv::extend_v2``: the scores of all that is held, by position, and the gather of what stays.

Scores. A program takes one item of a head, a run of tiles of entries (see `schedule`): of the ragged prefix, then of
the dense tail, then of the new tokens. Keys are read once for the rows of the whole query group, `BM` of these at a
time: `SPAN` queries of the window for each of `BM / SPAN` query heads, so that a block holds whole windows, or part of
one. Every entry's score and place go to tables by head and position, the order in which selection pools scores.
"""
# Device code is compiled by Triton, not checked by Python's type checkers: its values have no Python types.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from adakv_compile.kernels._launch import LOG2E, dot, scaled
from adakv_compile.kernels.compact.triton import head_of, store_rows
from adakv_compile.kernels.decode_attention.triton_schedule import schedule
from adakv_compile.kernels.decode_attention.triton_visibility import LOWEST, hide

__all__ = ["gather_held", "score_held"]

# Lengths change from call to call: one kernel serves them all, also those that are multiples of 16.
_ANY = ["tail_length", "prefix_length", "count", "rows", "num_all_heads", "extra", "slots", "capacity", "window"]
_ANY += ["mask_columns", "padding_columns", "length", "new_slots", "num_heads"]


@triton.jit
def _real(padding_row, stride, origin, columns, position, inside):
    """Whether positions are real tokens; those before the first column are not."""
    column = position - origin
    inside = inside & (column >= 0) & (column < columns)
    return tl.load(padding_row + column.to(tl.int64) * stride, mask=inside, other=0) != 0


@triton.jit
def _largest(sums):
    """Maximum over axis 0 that a NaN wins."""
    check = tl.sum(sums, 0)
    return tl.where(check == check, tl.max(sums, 0), check)


@triton.jit
def _rows(
    block,
    query,
    sums,
    mask,
    padding_row,
    kv_head,
    count,
    rows,
    first_query,
    query_stride_h,
    query_stride_t,
    query_stride_d,
    mask_stride_h,
    mask_stride_t,
    padding_stride,
    padding_columns,
    padding_origin,
    G: tl.constexpr,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    BM: tl.constexpr,
    SPAN: tl.constexpr,
    MASK: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Load a block of queries and their log-sum-exps (base 2), +inf for rows that take no part.

    `query`, `sums` and `mask` point at the row of the batch.
    """
    spans = tl.cdiv(rows, SPAN)
    row = tl.arange(0, BM)
    member = block // spans * (BM // SPAN) + row // SPAN
    place = block % spans * SPAN + row % SPAN
    live = (member < G) & (place < rows)
    token = count - rows + place
    position = first_query + token
    query_head = (kv_head * G + member).to(tl.int64)
    token64 = token.to(tl.int64)
    dim = tl.arange(0, DKP)
    q = tl.load(
        query + (query_head * query_stride_h + token64 * query_stride_t)[:, None] + dim[None, :] * query_stride_d,
        mask=live[:, None] & (dim < DK)[None, :],
        other=0.0,
    )
    counted = live
    if PADDED:
        counted = _real(padding_row, padding_stride, padding_origin, padding_columns, position, live)
    total = tl.load(sums + query_head * count + token64, mask=counted, other=float("-inf")) * LOG2E
    # A query that sees nothing, or only what a float mask hides: the difference of two such logits means nothing.
    total = tl.where(total < LOWEST / 2, float("inf"), total)
    mask_rows = 0
    if MASK != 0:
        mask_rows = mask + query_head * mask_stride_h + token64 * mask_stride_t
    return q, total, position, counted, mask_rows


@triton.jit(do_not_specialize=_ANY)
def score_held(
    query,
    sums,
    key_new,
    keys,
    offsets,
    positions,
    tail_keys,
    mask,
    padding,
    scores,
    held,
    source,
    scale,
    softcap,
    tail_length,
    prefix_length,
    count,
    rows,
    num_all_heads,
    extra,
    slots,
    capacity,
    window,
    mask_columns,
    padding_columns,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    mask_stride_b,
    mask_stride_h,
    mask_stride_t,
    mask_stride_m,
    padding_stride_b,
    padding_stride_m,
    H: tl.constexpr,
    G: tl.constexpr,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPAN: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    SCORED: tl.constexpr,
    LARGEST: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Write one item of a head to the tables `[B, H, prefix_length + tail_length + count]`, where something is held.

    Args:
        query: `[B, H * G, count, DK]`.
        sums: float32 `[B, H * G, count]`, natural log-sum-exp of every query, sinks included; contiguous.
        key_new: `[B, H, count, DK]`, rows contiguous and less than `2**24` apart.
        keys: `[B, slots, DK]`, contiguous, as are the next three.
        offsets: int32 `[B, H + 1]`.
        positions: int32 `[B, slots]`.
        tail_keys: `[B, H, capacity, DK]`.
        mask: `[B, H * G, count, mask_columns]`, or None.
        padding: `[B, padding_columns]`, or None.
        scores: float32 table.
        held: uint8 table of zeros: 1 for real tokens.
        source: int32 table: slot of the prefix, or `slots` plus the place in the tail and the new tokens behind it.
        scale: See `factors_of`.
        softcap: Likewise, or None.
        tail_length: Tail entries in use.
        prefix_length: Position of tail entry 0.
        count: New tokens.
        rows: Last queries that score.
        num_all_heads: `B * H`.
        extra: See `schedule`.
        slots: Of the prefix, per row.
        capacity: Of the tail.
        window: Entries a query sees, with `WINDOW`.
        mask_columns: Columns of `mask`.
        padding_columns: Columns of `padding`.
        query_stride_b: Strides, in elements; 0 where a mask is shared.
        query_stride_h: .
        query_stride_t: .
        query_stride_d: .
        key_stride_b: Of `key_new`.
        key_stride_h: .
        key_stride_t: .
        mask_stride_b: .
        mask_stride_h: .
        mask_stride_t: .
        mask_stride_m: .
        padding_stride_b: .
        padding_stride_m: .
        H: KV heads.
        G: Query heads per KV head.
        DK: Head dimension of keys.
        DKP: Power of two that covers `DK`.
        BM: Rows of a block.
        BN: Entries of a tile.
        SPAN: Rows of a block that belong to one query head.
        WINDOW_BLOCK: Power of two that covers `rows`.
        SINGLE: Whether all rows make one block.
        HEADS_BLOCK: See `schedule`.
        SCORED: Whether scores are wanted.
        LARGEST: Whether the group's maximum counts rather than its mean.
        CAUSAL: See `hide`.
        WINDOW: See `hide`.
        MASK: See `hide`.
        PADDED: See `hide`.
    """
    tail_tiles, new_tiles = tl.cdiv(tail_length, BN), tl.cdiv(count, BN)
    head, item, _, size = schedule(
        tl.program_id(0), offsets, num_all_heads, extra, tail_tiles + new_tiles, True, H, HEADS_BLOCK, BN, 1
    )
    if head < num_all_heads:
        batch, kv_head = head // H, head % H
        batch64, head64 = batch.to(tl.int64), head.to(tl.int64)
        begin = tl.load(offsets + head + batch)
        kept = tl.load(offsets + head + batch + 1) - begin
        prefix_tiles = tl.cdiv(kept, BN)
        low = item * size
        high = tl.minimum(low + size, prefix_tiles + tail_tiles + new_tiles)
        first_query = prefix_length + tail_length
        length = first_query + count
        query += batch64 * query_stride_b
        sums += batch64 * (H * G) * count
        key_new += batch64 * key_stride_b + kv_head.to(tl.int64) * key_stride_h
        mask_origin, padding_row, padding_origin = 0, 0, 0
        if MASK != 0:
            mask += batch64 * mask_stride_b
            mask_origin = length - mask_columns
        divisor = rows
        if PADDED:
            padding_row = padding + batch64 * padding_stride_b
            padding_origin = length - padding_columns
            last = tl.arange(0, WINDOW_BLOCK)
            counted = _real(
                padding_row, padding_stride_m, padding_origin, padding_columns, length - rows + last, last < rows
            )
            divisor = tl.maximum(tl.sum(counted.to(tl.int32), 0), 1)
        factor = 1.0 / (divisor if LARGEST else divisor * G)
        if SCORED and SINGLE:
            q, total, query_position, live, mask_rows = _rows(
                0, query, sums, mask, padding_row, kv_head, count, rows, first_query,
                query_stride_h, query_stride_t, query_stride_d, mask_stride_h, mask_stride_t,
                padding_stride_m, padding_columns, padding_origin,
                G, DK, DKP, BM, SPAN, MASK, PADDED,
            )  # fmt: skip

        entry, dim = tl.arange(0, BN), tl.arange(0, DKP)
        table = head64 * length
        prefix_row, tail_row = batch64 * slots + begin, head64 * capacity
        old_tiles = prefix_tiles + tail_tiles
        for tile in range(low, high):
            in_prefix = tile < prefix_tiles
            is_new = tile >= old_tiles
            start = tl.where(in_prefix, tile, tl.where(is_new, tile - old_tiles, tile - prefix_tiles)) * BN
            place = start + entry
            used = place < tl.where(in_prefix, kept, tl.where(is_new, count, tail_length))
            position = tl.load(positions + prefix_row + place, mask=place < tl.where(in_prefix, kept, 0), other=0)
            fresh = tl.where(is_new, tail_length, 0) + place
            position = tl.where(in_prefix, position, prefix_length + fresh)
            real = used
            if PADDED:
                real = _real(padding_row, padding_stride_m, padding_origin, padding_columns, position, used)
            tl.store(held + table + position, real.to(tl.uint8), mask=used)
            tl.store(source + table + position, tl.where(in_prefix, begin + place, slots + fresh), mask=used)
            if SCORED:
                # One pointer for a tile: where its entries lie, and how far apart.
                first = tl.where(in_prefix, keys, tail_keys) + (tl.where(in_prefix, prefix_row, tail_row) + start) * DK
                first = tl.where(is_new, key_new + start.to(tl.int64) * key_stride_t, first)
                k = tl.load(
                    first + entry[None, :] * tl.where(is_new, key_stride_t, DK) + dim[:, None],
                    mask=used[None, :] & (dim < DK)[:, None],
                    other=0.0,
                )
                result = tl.zeros([BN], tl.float32)
                part = tl.zeros([BN], tl.float32)
                spans = tl.cdiv(rows, SPAN)
                blocks = 1 if SINGLE else tl.cdiv(G, BM // SPAN) * spans
                for block in range(blocks):
                    if not SINGLE:
                        q, total, query_position, live, mask_rows = _rows(
                            block, query, sums, mask, padding_row, kv_head, count, rows, first_query,
                            query_stride_h, query_stride_t, query_stride_d, mask_stride_h, mask_stride_t,
                            padding_stride_m, padding_columns, padding_origin,
                            G, DK, DKP, BM, SPAN, MASK, PADDED,
                        )  # fmt: skip
                    logits = hide(
                        scaled(dot(q, k), scale, softcap), used, position, query_position, live,
                        mask_rows, mask_stride_m, mask_columns, mask_origin,
                        padding_row, padding_stride_m, padding_columns, padding_origin,
                        window, CAUSAL, WINDOW, MASK, PADDED,
                    )  # fmt: skip
                    weights = tl.exp2(logits - total[:, None])
                    if not LARGEST:
                        result += tl.sum(weights, 0)
                    elif BM > SPAN:  # whole windows
                        largest = _largest(tl.sum(tl.reshape(weights, (BM // SPAN, SPAN, BN)), 1))
                        result = tl.maximum(result, largest, propagate_nan=tl.PropagateNan.ALL)
                    else:
                        part += tl.sum(weights, 0)
                        result = tl.maximum(result, part, propagate_nan=tl.PropagateNan.ALL)
                        part = tl.where(block % spans == spans - 1, 0.0, part)
                tl.store(scores + table + position, result * factor, mask=used)


@triton.jit(do_not_specialize=_ANY)
def gather_held(
    keys,
    values,
    tail_keys,
    tail_values,
    key_new,
    value_new,
    source,
    new_positions,
    new_offsets,
    new_keys,
    new_values,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    tail_length,
    length,
    slots,
    capacity,
    new_slots,
    num_heads,
    KEY_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Fill `SLOTS` slots of one row of the new prefix from where `source` says; the grid is slots by rows."""
    batch = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    stored = slot < new_slots
    head = head_of(new_offsets + batch * (num_heads + 1), slot, num_heads, HEADS)
    used = stored & (head < num_heads)
    row = batch * new_slots + slot
    position = tl.load(new_positions + row, mask=used, other=0)
    head = tl.where(used, head, 0).to(tl.int64)
    place = tl.load(source + (batch * num_heads + head) * length + position, mask=used, other=0)
    in_prefix = place < slots
    fresh = place - slots
    in_tail = fresh < tail_length
    old = tl.where(in_prefix, batch * slots + place, (batch * num_heads + head) * capacity + fresh)
    token = (fresh - tail_length).to(tl.int64)
    old_keys = tl.where(in_prefix, keys, tail_keys) + old * KEY_DIM
    fresh_keys = key_new + batch * key_stride_b + head * key_stride_h + token * key_stride_t
    store_rows(new_keys, row, stored, tl.where(in_tail, old_keys, fresh_keys), 1, used, KEY_DIM, KEY_WIDTH)
    old_values = tl.where(in_prefix, values, tail_values) + old * VALUE_DIM
    fresh_values = value_new + batch * value_stride_b + head * value_stride_h + token * value_stride_t
    store_rows(new_values, row, stored, tl.where(in_tail, old_values, fresh_values), 1, used, VALUE_DIM, VALUE_WIDTH)
