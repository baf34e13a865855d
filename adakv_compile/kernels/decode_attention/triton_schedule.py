"""Device code: how the programs of a launch share heads of very different lengths, and how they count one another.

Every program works its part out from the lengths: there is no plan, hence no launch and no wait before the kernel.
"""
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["advance", "arrives_last", "count_reader", "schedule"]


@triton.jit
def schedule(
    index,
    offsets,
    num_all_heads,
    extra,
    dense_tiles,
    with_prefix,
    H: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    BN: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Find the part of a program.

    A head of `n` tiles is cut into items of `C = max(LEAST, ceil(sum n / extra))` tiles: at most one item per head and
    `extra` more, none longer than `C`.

    Args:
        index: Of the program, below `num_all_heads + extra`.
        offsets: int32 `[B, H + 1]`.
        num_all_heads: `B * H`.
        extra: Items beyond one per head.
        dense_tiles: Tiles that every head has besides its prefix.
        with_prefix: Whether prefixes count.
        H: Heads of a row.
        HEADS_BLOCK: Power of two that covers `num_all_heads`.
        BN: Entries of a tile.
        LEAST: Least tiles of an item where a head has that many.

    Returns:
        Head (`num_all_heads` or more: nothing to do), item of the head, items of the head, tiles of an item.
    """
    head = tl.arange(0, HEADS_BLOCK)
    inside = head < num_all_heads
    place = offsets + head + head // H
    length = tl.load(place + 1, mask=inside, other=0) - tl.load(place, mask=inside, other=0)
    tiles = tl.where(inside, tl.where(with_prefix, tl.cdiv(length, BN), 0) + dense_tiles, 0)
    size = tl.maximum(tl.cdiv(tl.sum(tiles, 0), extra), LEAST)
    # A head without tiles has an item, too: it writes zeros, and new tokens are appended by first items.
    items = tl.where(inside, tl.maximum(tl.cdiv(tiles, size), 1), 0)
    end = tl.cumsum(items, 0)
    mine = tl.sum((end <= index).to(tl.int32), 0)
    first = tl.max(tl.where(end <= index, end, 0), 0)
    count = tl.sum(tl.where(head == mine, items, 0), 0)
    return mine, index - first, count, size


@triton.jit
def count_reader(counters, THREADS: tl.constexpr):
    """Count this program as one that has read the cursor, without waiting for the answer.

    Args:
        counters: Where programs are counted.
        THREADS: Of a program. One element per thread: the answer stays in a register of the thread that asked.

    Returns:
        `[THREADS]`, the programs counted before in element 0; pass it to :func:`advance`.
    """
    thread = tl.arange(0, THREADS)
    # All threads have read before one of them counts: without the barrier Triton 3.6 does not order them.
    tl.debug_barrier()
    return tl.atomic_add(counters + tl.zeros_like(thread), 1, mask=thread == 0, sem="release")


@triton.jit
def advance(cursor, counters, before, length, programs, THREADS: tl.constexpr):
    """Store the cursor's new length, in the last program that read the old one, and leave the counter zero."""
    thread = tl.arange(0, THREADS)
    if tl.sum(tl.where(thread == 0, before, 0), 0) == programs - 1:
        tl.debug_barrier()
        # Acquires what the others released: their reads come before this program's write.
        tl.atomic_add(counters, -programs, sem="acq_rel")
        tl.store(cursor, length)


@triton.jit
def arrives_last(counter, count):
    """Count an arrival of `count` at a counter, after everything that this program has stored.

    The last one leaves the counter zero and sees what the others stored, if it loads past its L1 cache (`.cg`).

    Returns:
        Whether it is the last.
    """
    # Triton 3.6 has no barrier of its own between the other threads' stores and the atomic.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counter, 0)
    return last
