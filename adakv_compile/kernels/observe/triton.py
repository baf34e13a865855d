"""Device code of ``adakv::observe_v3``: the log-sum-exp of the window's rows, then their attention to every key.

A row is one query of the window in one query head. The rows of the query heads that share a KV head are packed into
blocks of ``ROWS`` (``ROWS // SPAN`` heads, ``SPAN`` window positions each), so that one tile of keys serves the group.
``end`` is the last key that a row may see, -1 for padding, and keys that nobody may see sit at ``NOWHERE``: one
comparison covers causality and padding, and without padding only the tiles at the ends of what is seen need it.
Rows that only fill up a block repeat a real one, so that they bring in no NaN that the real ones do not have.
"""
# Device code is compiled by Triton, not checked by Python's type checkers: its values have no Python types.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from adakv_compile.kernels._launch import dot, scaled
from adakv_compile.kernels.decode_attention.triton_visibility import LOWEST
from adakv_compile.kernels.observe.triton_visibility import hide, is_edge, look_up, unweigh

__all__ = ["observe_combine", "observe_lse", "observe_scores"]

NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _rows(
    padding,
    stride_pl,
    first_head,
    first_row,
    length,
    window,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    MASK: tl.constexpr,
):
    """Return a block's heads within the group, its window rows, whether each counts, and the last key that it sees."""
    index = tl.arange(0, ROWS)
    head = first_head + index // SPAN
    row = first_row + index % SPAN
    counted = (head < GROUP) & (row < window)
    head = tl.minimum(head, GROUP - 1)
    row = tl.minimum(row, window - 1)
    place = length - window + row
    end = tl.zeros_like(place) + (length - 1) if MASK != 0 else place
    if padding is not None:
        real = tl.load(padding + place.to(tl.int64) * stride_pl) != 0
        counted = counted & real
        end = tl.where(real, end, -1)
    return head, row, counted, end


@triton.jit
def _queries(query, stride_qh, stride_qt, stride_qd, head, row, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Load ``[ROWS, WIDTH]``."""
    dim = tl.arange(0, WIDTH)
    start = head.to(tl.int64) * stride_qh + row.to(tl.int64) * stride_qt
    return tl.load(query + (start[:, None] + dim[None, :] * stride_qd), mask=(dim < DIM)[None, :], other=0.0)


@triton.jit
def _keys(
    key,
    padding,
    stride_kl,
    stride_kd,
    stride_pl,
    first,
    length,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Load ``[KEYS, WIDTH]`` from key ``first`` on; return it with the places of its keys."""
    place = first + tl.arange(0, KEYS)
    dim = tl.arange(0, WIDTH)
    inside = place < length
    offsets = place.to(tl.int64)[:, None] * stride_kl + dim[None, :] * stride_kd
    mask = inside[:, None] & (dim < DIM)[None, :]
    tile = tl.load(key + offsets, mask=mask, other=0.0)
    if padding is not None:
        inside = inside & (tl.load(padding + place.to(tl.int64) * stride_pl, mask=inside, other=0) != 0)
    return tile, tl.where(inside, place, NOWHERE)


@triton.jit
def _log_sum(peak, mass):
    """Return the base-2 logarithm of ``mass * 2**peak``, -inf for nothing."""
    return tl.where(mass == 0, float("-inf"), peak + tl.log2(tl.where(mass == 0, 1.0, mass)))


@triton.jit
def observe_lse(
    query,
    key,
    mask,
    padding,
    partials,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_kd,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_mm,
    stride_pb,
    stride_pl,
    length,
    window,
    num_kv_heads,
    pairs,
    row_blocks,
    splits,
    tiles,
    reach,
    scale,
    softcap,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
):
    """Write the base-2 log-sum-exp of a block of rows over ``tiles`` tiles of keys, ``[splits, B * Hkv, G, W]``.

    ``query`` points at the window's first position; ``scale`` and ``softcap`` are those of ``scaled``. Blocks of rows
    that read the same keys are neighbours, so that all but one find them in the L2 cache.
    """
    pid = tl.program_id(0)
    block = pid % row_blocks
    split = pid // row_blocks % splits
    pair = pid // row_blocks // splits
    batch = (pair // num_kv_heads).to(tl.int64)
    kv_head = (pair % num_kv_heads).to(tl.int64)
    spans = tl.cdiv(window, SPAN)
    query += batch * stride_qb + kv_head * GROUP * stride_qh
    key += batch * stride_kb + kv_head * stride_kh
    if MASK != 0:
        mask += batch * stride_mb + kv_head * GROUP * stride_mh
    if padding is not None:
        padding += batch * stride_pb
    head, row, _, end = _rows(
        padding,
        stride_pl,
        block // spans * (ROWS // SPAN),
        block % spans * SPAN,
        length,
        window,
        GROUP,
        ROWS,
        SPAN,
        MASK,
    )
    q = _queries(query, stride_qh, stride_qt, stride_qd, head, row, DIM, WIDTH)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    first = split * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(length, KEYS))):
        k, place = _keys(key, padding, stride_kl, stride_kd, stride_pl, tile * KEYS, length, DIM, WIDTH, KEYS)
        logits = scaled(dot(q, tl.trans(k)), scale, softcap)
        if MASK != 0:
            logits = look_up(logits, mask, stride_mh, stride_mt, stride_mm, head, row, place, length, MASK, 1)
        if padding is not None or MASK != 0:  # noqa: SIM114  # no branch on the device
            logits = hide(logits, place, end, reach)
        elif is_edge(tile * KEYS, length, window, reach, KEYS):
            logits = hide(logits, place, end, reach)
        # A NaN may pass the maximum unseen, never the sum.
        higher = tl.maximum(peak, tl.max(logits, 1))
        offset = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp2(peak - offset) + tl.sum(tl.exp2(logits - offset[:, None]), 1)
        peak = higher
    # Rows that repeat another one write what it writes.
    line = (split.to(tl.int64) * pairs + pair) * GROUP + head
    tl.store(partials + line * window + row, _log_sum(peak, mass))


@triton.jit
def observe_combine(partials, lse, splits, rows, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """Merge base-2 log-sum-exps: ``[splits, rows]`` to ``[rows]``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for first in range(0, splits, SPLITS):
        inside = ((first + split) < splits)[:, None] & (row < rows)[None, :]
        line = (first + split).to(tl.int64)[:, None] * rows
        part = tl.load(partials + (line + row[None, :]), mask=inside, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(part, 0))
        offset = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp2(peak - offset) + tl.sum(tl.exp2(part - offset[None, :]), 0)
        peak = higher
    tl.store(lse + row, _log_sum(peak, mass), mask=row < rows)


@triton.jit
def _sums(lse, stride_lh, stride_lt, to_base_2, head, row, counted):
    """Return each row's base-2 log-sum-exp, +inf for rows that take no part."""
    pointers = lse + (head.to(tl.int64) * stride_lh + row.to(tl.int64) * stride_lt)
    total = tl.load(pointers, mask=counted, other=float("-inf"))
    # +inf comes of an infinite logit, whose softmax is NaN; a row that sees nothing has -inf, and of one that sees only
    # what a float mask hides, the difference of two such logits means nothing.
    total = tl.where(total == float("inf"), float("nan"), total * to_base_2)
    return tl.where(total < LOWEST / 2, float("inf"), total)


@triton.jit
def _num_counted(padding, stride_pl, length, window, WINDOW: tl.constexpr):
    """Return how many rows of the window are real tokens, at least 1."""
    row = tl.arange(0, WINDOW)
    place = (length - window + row).to(tl.int64)
    real = tl.load(padding + place * stride_pl, mask=row < window, other=0) != 0
    return tl.maximum(tl.sum(real.to(tl.int32), 0), 1)


@triton.jit
def _attention(
    q,
    k,
    mask,
    padding,
    stride_mh,
    stride_mt,
    stride_mm,
    head,
    row,
    first,
    place,
    end,
    total,
    length,
    window,
    reach,
    scale,
    softcap,
    KEYS: tl.constexpr,
    KEYS_LEFT: tl.constexpr,
    MASK: tl.constexpr,
):
    """Return softmax weights, ``[KEYS, ROWS]`` or ``[ROWS, KEYS]``."""
    AXIS: tl.constexpr = 0 if KEYS_LEFT else 1
    product = dot(k, tl.trans(q)) if KEYS_LEFT else dot(q, tl.trans(k))
    logits = scaled(product, scale, softcap)
    if MASK != 0:
        logits = look_up(logits, mask, stride_mh, stride_mt, stride_mm, head, row, place, length, MASK, AXIS)
    weights = tl.exp2(logits - tl.expand_dims(total, AXIS))
    if padding is not None or MASK != 0:  # noqa: SIM114  # no branch on the device
        weights = unweigh(weights, place, end, total, reach, AXIS)
    elif is_edge(first, length, window, reach, KEYS):
        weights = unweigh(weights, place, end, total, reach, AXIS)
    return weights


@triton.jit
def _per_head(weights, HEADS: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr, KEYS_LEFT: tl.constexpr):
    """Sum the weights of each head's rows: ``[KEYS, HEADS]`` or ``[HEADS, KEYS]``."""
    grouped = tl.reshape(weights, (KEYS, HEADS, SPAN) if KEYS_LEFT else (HEADS, SPAN, KEYS))
    return tl.sum(grouped, 2 if KEYS_LEFT else 1)


@triton.jit
def _largest(sums, AXIS: tl.constexpr):
    """Maximum along an axis that NaN wins."""
    check = tl.sum(sums, AXIS)
    return tl.where(check == check, tl.max(sums, AXIS), check)


@triton.jit
def observe_scores(
    query,
    key,
    mask,
    padding,
    lse,
    scores,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_kd,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_mm,
    stride_pb,
    stride_pl,
    stride_lb,
    stride_lh,
    stride_lt,
    length,
    window,
    num_kv_heads,
    splits,
    tiles,
    reach,
    scale,
    softcap,
    to_base_2,
    LARGEST: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_LEFT: tl.constexpr,
    MASK: tl.constexpr,
):
    """Write the scores of ``tiles`` tiles of keys, ``[B * Hkv, L]``; each key is read once.

    ``query`` and ``lse`` (with sinks) point at the window's first position, ``WINDOW`` covers ``window``. ``scale``
    and ``softcap`` are those of ``scaled``.
    """
    HEADS: tl.constexpr = ROWS // SPAN
    HEAD_BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    ROW_AXIS: tl.constexpr = 1 if KEYS_LEFT else 0
    pid = tl.program_id(0)
    split = pid % splits
    pair = pid // splits
    batch = (pair // num_kv_heads).to(tl.int64)
    kv_head = (pair % num_kv_heads).to(tl.int64)
    query += batch * stride_qb + kv_head * GROUP * stride_qh
    lse += batch * stride_lb + kv_head * GROUP * stride_lh
    key += batch * stride_kb + kv_head * stride_kh
    scores += pair.to(tl.int64) * length
    if MASK != 0:
        mask += batch * stride_mb + kv_head * GROUP * stride_mh
    if padding is not None:
        padding += batch * stride_pb
        divisor = _num_counted(padding, stride_pl, length, window, WINDOW)
    else:
        divisor = window
    factor = 1.0 / (divisor if LARGEST else divisor * GROUP)
    first = split * tiles
    last = tl.minimum(first + tiles, tl.cdiv(length, KEYS))
    index = tl.arange(0, KEYS)
    if HEAD_BLOCKS == 1 and SPAN == WINDOW:
        head, row, counted, end = _rows(padding, stride_pl, 0, 0, length, window, GROUP, ROWS, SPAN, MASK)
        q = _queries(query, stride_qh, stride_qt, stride_qd, head, row, DIM, WIDTH)
        total = _sums(lse, stride_lh, stride_lt, to_base_2, head, row, counted)
        for tile in range(first, last):
            k, place = _keys(key, padding, stride_kl, stride_kd, stride_pl, tile * KEYS, length, DIM, WIDTH, KEYS)
            weights = _attention(
                q, k, mask, padding, stride_mh, stride_mt, stride_mm, head, row, tile * KEYS, place, end, total,
                length, window, reach, scale, softcap, KEYS, KEYS_LEFT, MASK,
            )  # fmt: skip
            if LARGEST:
                result = _largest(_per_head(weights, HEADS, SPAN, KEYS, KEYS_LEFT), ROW_AXIS)
            else:
                result = tl.sum(weights, ROW_AXIS)
            at = tile * KEYS + index
            tl.store(scores + at, result * factor, mask=at < length)
    else:
        spans = tl.cdiv(window, SPAN)
        for tile in range(first, last):
            k, place = _keys(key, padding, stride_kl, stride_kd, stride_pl, tile * KEYS, length, DIM, WIDTH, KEYS)
            result = tl.zeros([KEYS], tl.float32)
            part = tl.zeros([KEYS], tl.float32)
            for block in range(HEAD_BLOCKS * spans):
                head, row, counted, end = _rows(
                    padding,
                    stride_pl,
                    block // spans * HEADS,
                    block % spans * SPAN,
                    length,
                    window,
                    GROUP,
                    ROWS,
                    SPAN,
                    MASK,
                )
                q = _queries(query, stride_qh, stride_qt, stride_qd, head, row, DIM, WIDTH)
                total = _sums(lse, stride_lh, stride_lt, to_base_2, head, row, counted)
                weights = _attention(
                    q, k, mask, padding, stride_mh, stride_mt, stride_mm, head, row, tile * KEYS, place, end, total,
                    length, window, reach, scale, softcap, KEYS, KEYS_LEFT, MASK,
                )  # fmt: skip
                if not LARGEST:
                    result += tl.sum(weights, ROW_AXIS)
                elif HEADS > 1:  # whole windows
                    largest = _largest(_per_head(weights, HEADS, SPAN, KEYS, KEYS_LEFT), ROW_AXIS)
                    result = tl.maximum(result, largest, propagate_nan=tl.PropagateNan.ALL)
                else:
                    part += tl.sum(weights, ROW_AXIS)
                    result = tl.maximum(result, part, propagate_nan=tl.PropagateNan.ALL)
                    part = tl.where(block % spans == spans - 1, 0.0, part)
            at = tile * KEYS + index
            tl.store(scores + at, result * factor, mask=at < length)
