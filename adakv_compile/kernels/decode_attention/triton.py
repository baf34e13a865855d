"""Device code: append and attend, one launch; how it works.

Rows. The `R = G * T` queries of a row of the batch and KV head form blocks of `BM` rows, tokens outermost, so that a
block spans few tokens: what all of it can't see, by the causal rule or a sliding window, is not read.

Items. A program attends with one block to one item of a head, a run of tiles of `BN` entries (see `schedule`): of the
ragged prefix, then of the dense tail, then of the new tokens, which are read from where the model left them. Up to
`FEW` new tokens are not counted as a tile: the first item of a head takes them on the side. It also appends them to the
tail, which no program reads in that place.

Combination. What a head's only item finds is the result. Others leave partial sums; the last one to arrive adds them
up in the order of the items, so that results have the same bits at every run.
"""
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from adakv_compile.kernels._launch import LOG2E, dot, scaled
from adakv_compile.kernels.decode_attention.triton_schedule import advance, arrives_last, count_reader, schedule
from adakv_compile.kernels.decode_attention.triton_softmax import combine, fold, inside, log_sum, mean
from adakv_compile.kernels.decode_attention.triton_visibility import FLOOR, hide

__all__ = ["attend"]

# Lengths change from call to call: a kernel for 16 of them is one for all.
_ANY = ["tail_length", "prefix_length", "count", "num_all_heads", "extra", "slots", "capacity", "window"]
_ANY += ["mask_columns", "padding_columns"]


@triton.jit(do_not_specialize=_ANY)
def attend(
    query,
    key_new,  # or None if STORED, like the next
    value_new,
    keys,
    values,
    offsets,
    positions,
    tail_keys,
    tail_values,
    cursor,  # or None: then the next lengths count
    counters,  # int32 zeros: two unused, one for programs, one per row block and head; or None
    mask,  # or None
    padding,  # or None
    sinks,  # [H * G], or None
    output,  # [B, H * G, count, DV]
    sums,  # float32 [B, H * G, count], natural log-sum-exp; or None
    partial,  # float32 scratch [row blocks, programs, ROWS, DV]; or None
    partial_sums,  # float32 scratch [row blocks, programs, 2, ROWS]; or None
    scale,  # see factors_of
    softcap,  # or None
    tail_length,
    prefix_length,
    count,  # new tokens
    num_all_heads,  # B * H
    extra,  # see schedule
    slots,  # of the prefix, per row
    capacity,  # of the tail
    window,
    mask_columns,
    padding_columns,
    query_stride_b,  # strides in elements, 0 along which a mask is shared
    query_stride_h,
    query_stride_t,
    query_stride_d,
    key_stride_b,  # of key_new
    key_stride_h,
    key_stride_t,
    key_stride_d,
    value_stride_b,  # of value_new
    value_stride_h,
    value_stride_t,
    value_stride_d,
    mask_stride_b,
    mask_stride_h,
    mask_stride_t,
    mask_stride_m,
    padding_stride_b,
    padding_stride_m,
    H: tl.constexpr,  # KV heads
    G: tl.constexpr,  # query heads of each
    DK: tl.constexpr,  # head dimension of keys
    DV: tl.constexpr,
    DKP: tl.constexpr,  # power of two that covers it
    DVP: tl.constexpr,
    BM: tl.constexpr,  # rows of a block
    BN: tl.constexpr,  # entries of a tile
    FEW: tl.constexpr,  # new tokens up to this are no tile; 0: they are counted in tiles
    HEADS_BLOCK: tl.constexpr,  # see schedule, as LEAST
    LEAST: tl.constexpr,
    SPLIT: tl.constexpr,  # whether heads may have more than one item
    APPEND: tl.constexpr,  # whether tail and cursor are mutated; needs a cursor
    STORED: tl.constexpr,  # whether the tail, or the prefix, holds the new tokens already
    CAUSAL: tl.constexpr,  # see hide, as the next three
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,  # power of two that covers the queries of a block
    TOGETHER: tl.constexpr,  # items that are added up at once
    THREADS: tl.constexpr,  # of a program
):
    """Attend with one block of rows to one item of a head; what has no note is as the op's contract says."""
    LATE: tl.constexpr = STORED and CAUSAL  # entries of the store may come after a query
    index, block = tl.program_id(0), tl.program_id(1)
    if cursor is not None:
        tail_length = tl.load(cursor)
        prefix_length = tl.load(cursor + 1)
    if APPEND:
        readers = count_reader(counters + 2, THREADS)
    first_query = prefix_length + tail_length
    if STORED:
        first_query -= count

    # What the block sees at most: tiles of the tail and of the new tokens, and whether any of the prefix.
    first_token = block * BM // G
    visible = count
    if CAUSAL:
        visible = tl.minimum(count, (block * BM + BM - 1) // G + 1)
    oldest = 0
    if WINDOW:
        oldest = tl.maximum(first_query + first_token - window + 1, 0)
    tail_begin = tl.maximum(oldest - prefix_length, 0) // BN
    tail_tiles = tl.maximum(tl.cdiv(tail_length, BN) - tail_begin, 0)
    new_begin = tl.maximum(oldest - first_query, 0) // BN
    new_tiles = tl.cdiv(visible, BN) - new_begin
    if FEW > 0 or STORED:
        new_tiles = 0
    with_prefix = oldest < prefix_length

    if SPLIT:
        head, item, items, size = schedule(
            index, offsets, num_all_heads, extra, tail_tiles + new_tiles, with_prefix, H, HEADS_BLOCK, BN, LEAST
        )
    else:
        head, item, items, size = index, 0, 1, 0
    if head < num_all_heads:
        batch, kv_head = head // H, head % H
        batch64, head64 = batch.to(tl.int64), head.to(tl.int64)
        begin = tl.load(offsets + head + batch)
        length = tl.load(offsets + head + batch + 1) - begin
        length = tl.where(with_prefix, length, 0)
        prefix_tiles = tl.cdiv(length, BN)
        all_tiles = prefix_tiles + tail_tiles + new_tiles
        if SPLIT:
            low = item * size
            high = tl.minimum(low + size, all_tiles)
        else:
            low, high = 0, all_tiles

        row = block * BM + tl.arange(0, BM)
        live = row < count * G
        token, member = row // G, row % G
        query_head = (kv_head * G + member).to(tl.int64)
        query_position = first_query + token
        dim_k, dim_v = tl.arange(0, DKP), tl.arange(0, DVP)
        entry = tl.arange(0, BN)
        query_rows = (
            query + batch64 * query_stride_b + query_head * query_stride_h + token.to(tl.int64) * query_stride_t
        )
        q = tl.load(
            query_rows[:, None] + dim_k[None, :] * query_stride_d,
            mask=inside(live[:, None], dim_k[None, :], DK, DKP),
            other=0.0,
        )
        mask_rows, padding_row, mask_origin, padding_origin = 0, 0, 0, 0
        if MASK != 0:
            mask_rows = mask + batch64 * mask_stride_b + query_head * mask_stride_h
            mask_rows += token.to(tl.int64) * mask_stride_t
            mask_origin = first_query + count - mask_columns
        if PADDED:
            padding_row = padding + batch64 * padding_stride_b
            padding_origin = first_query + count - padding_columns
        if not STORED:
            new_keys = key_new + batch64 * key_stride_b + kv_head.to(tl.int64) * key_stride_h
            new_values = value_new + batch64 * value_stride_b + kv_head.to(tl.int64) * value_stride_h
        tail_row = head64 * capacity

        few = tl.arange(0, FEW if FEW > 0 else 16)
        there = few < (tl.where(item == 0, count, 0) if SPLIT else count)
        in_new_keys = few[:, None].to(tl.int64) * key_stride_t + dim_k[None, :] * key_stride_d
        in_new_values = few[:, None].to(tl.int64) * value_stride_t + dim_v[None, :] * value_stride_d
        few_keys_inside = inside(there[:, None], dim_k[None, :], DK, DKP)
        few_values_inside = inside(there[:, None], dim_v[None, :], DV, DVP)
        if FEW == 1:
            # Asked for here, used after the loop: it arrives meanwhile. More tokens would take too many registers.
            few_keys = tl.load(new_keys + in_new_keys, mask=few_keys_inside, other=0.0)
            few_values = tl.load(new_values + in_new_values, mask=few_values_inside, other=0.0)

        peak = tl.full([BM], FLOOR, tl.float32)
        mass = tl.zeros([BM], tl.float32)
        if sinks is not None:
            # The first thing that a head's first item sees.
            sink = tl.load(sinks + query_head).to(tl.float32) * LOG2E
            if SPLIT:
                sink = tl.where(item == 0, sink, float("-inf"))
            peak = tl.maximum(sink, FLOOR)
            mass = tl.exp2(sink - peak)
        summed = tl.zeros([BM, DVP], tl.float32)

        in_keys = entry[None, :] * DK + dim_k[:, None]
        in_values = entry[:, None] * DV + dim_v[None, :]
        prefix_row = batch64 * slots + begin
        for tile in range(low, tl.minimum(high, prefix_tiles + tail_tiles)):
            # One loop for both, so that neither the loads nor the code stop where the tail begins.
            in_prefix = tile < prefix_tiles
            start = tl.where(in_prefix, tile, tile - prefix_tiles + tail_begin) * BN
            first_row = tl.where(in_prefix, prefix_row, tail_row) + start
            end = tl.where(in_prefix, length, tail_length)
            used = start + entry < end
            k = tl.load(
                tl.where(in_prefix, keys, tail_keys) + first_row * DK + in_keys,
                mask=inside(used[None, :], dim_k[:, None], DK, DKP),
                other=0.0,
            )
            v = tl.load(
                tl.where(in_prefix, values, tail_values) + first_row * DV + in_values,
                mask=inside(used[:, None], dim_v[None, :], DV, DVP),
                other=0.0,
            )
            position = prefix_length + start + entry
            if WINDOW or MASK != 0 or PADDED or LATE:
                kept = start + entry < tl.where(in_prefix, length, 0)
                kept_at = tl.load(positions + prefix_row + start + entry, mask=kept, other=0)
                position = tl.where(in_prefix, kept_at, position)
            logits = hide(
                scaled(dot(q, k), scale, softcap), used, position, query_position, live,
                mask_rows, mask_stride_m, mask_columns, mask_origin,
                padding_row, padding_stride_m, padding_columns, padding_origin,
                window, LATE, WINDOW, MASK, PADDED,
            )  # fmt: skip
            peak, mass, summed = fold(peak, mass, summed, logits, v, BN)

        if FEW > 0:
            if item == 0:
                if FEW == 1:
                    logits = tl.sum(q.to(tl.float32) * few_keys.to(tl.float32), 1)[:, None]
                else:
                    few_keys = tl.load(new_keys + in_new_keys, mask=few_keys_inside, other=0.0)
                    few_values = tl.load(new_values + in_new_values, mask=few_values_inside, other=0.0)
                    logits = dot(q, tl.trans(few_keys))
                logits = hide(
                    scaled(logits, scale, softcap), there, first_query + few, query_position, live,
                    mask_rows, mask_stride_m, mask_columns, mask_origin,
                    padding_row, padding_stride_m, padding_columns, padding_origin,
                    window, CAUSAL, WINDOW, MASK, PADDED,
                )  # fmt: skip
                peak, mass, summed = fold(peak, mass, summed, logits, few_values, FEW)
                if APPEND:
                    # Each token by the block that has its first row.
                    mine = there & (few * G // BM == block)
                    place64 = tail_row + tail_length + few
                    tl.store(
                        tail_keys + place64[:, None] * DK + dim_k[None, :],
                        few_keys,
                        mask=inside(mine[:, None], dim_k[None, :], DK, DKP),
                    )
                    tl.store(
                        tail_values + place64[:, None] * DV + dim_v[None, :],
                        few_values,
                        mask=inside(mine[:, None], dim_v[None, :], DV, DVP),
                    )
        elif not STORED:
            shift = new_begin - prefix_tiles - tail_tiles
            for tile in range(tl.maximum(low, prefix_tiles + tail_tiles) + shift, high + shift):
                place = tile * BN + entry
                used = place < visible
                place64 = place.to(tl.int64)
                k = tl.load(
                    new_keys + place64[None, :] * key_stride_t + dim_k[:, None] * key_stride_d,
                    mask=inside(used[None, :], dim_k[:, None], DK, DKP),
                    other=0.0,
                )
                v = tl.load(
                    new_values + place64[:, None] * value_stride_t + dim_v[None, :] * value_stride_d,
                    mask=inside(used[:, None], dim_v[None, :], DV, DVP),
                    other=0.0,
                )
                logits = hide(
                    scaled(dot(q, k), scale, softcap), used, first_query + place, query_position, live,
                    mask_rows, mask_stride_m, mask_columns, mask_origin,
                    padding_row, padding_stride_m, padding_columns, padding_origin,
                    window, CAUSAL, WINDOW, MASK, PADDED,
                )  # fmt: skip
                peak, mass, summed = fold(peak, mass, summed, logits, v, BN)
            if APPEND and item == 0:
                token_begin, token_end = tl.cdiv(block * BM, G), tl.minimum(tl.cdiv(block * BM + BM, G), count)
                for start in range(token_begin, token_end, 16):
                    some = start + tl.arange(0, 16)
                    mine = some < token_end
                    place64 = some.to(tl.int64)
                    k = tl.load(
                        new_keys + place64[:, None] * key_stride_t + dim_k[None, :] * key_stride_d,
                        mask=inside(mine[:, None], dim_k[None, :], DK, DKP),
                    )
                    v = tl.load(
                        new_values + place64[:, None] * value_stride_t + dim_v[None, :] * value_stride_d,
                        mask=inside(mine[:, None], dim_v[None, :], DV, DVP),
                    )
                    place64 += tail_row + tail_length
                    tl.store(
                        tail_keys + place64[:, None] * DK + dim_k[None, :],
                        k,
                        mask=inside(mine[:, None], dim_k[None, :], DK, DKP),
                    )
                    tl.store(
                        tail_values + place64[:, None] * DV + dim_v[None, :],
                        v,
                        mask=inside(mine[:, None], dim_v[None, :], DV, DVP),
                    )

        if items == 1:
            result = (batch64 * H * G + query_head) * count + token
            tl.store(
                output + result[:, None] * DV + dim_v[None, :],
                mean(summed, mass).to(output.dtype.element_ty),
                mask=inside(live[:, None], dim_v[None, :], DV, DVP),
            )
            if sums is not None:
                tl.store(sums + result, log_sum(peak, mass), mask=live)
        elif SPLIT:
            in_block = tl.arange(0, BM)
            base = (block * tl.num_programs(0) + index - item).to(tl.int64)
            kept = live & (in_block < ROWS)
            spot = (base + item) * ROWS + in_block
            tl.store(
                partial + spot[:, None] * DV + dim_v[None, :],
                summed,
                mask=inside(kept[:, None], dim_v[None, :], DV, DVP),
            )
            spot = (base + item) * (2 * ROWS) + in_block
            tl.store(partial_sums + spot, peak, mask=kept)
            tl.store(partial_sums + spot + ROWS, mass, mask=kept)
            if arrives_last(counters + 3 + block * num_all_heads + head, items):
                combine(
                    partial, partial_sums, output, sums, base, items, block, batch64, kv_head, count,
                    H, G, DV, DVP, BM, ROWS, TOGETHER,
                )  # fmt: skip

    if APPEND:
        programs = tl.num_programs(0) * tl.num_programs(1)
        advance(cursor, counters + 2, readers, tail_length + count, programs, THREADS)
