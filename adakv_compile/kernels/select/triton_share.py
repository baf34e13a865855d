"""Sharing a row's budget over its heads, and writing what they keep."""
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from adakv_compile.kernels.select.triton import SLOT, WANTED, descend, tile_counts

__all__ = ["allocate", "emit", "joint_counts", "uniform_counts"]


@triton.jit
def joint_counts(
    keys,
    row_descent,
    reached_in_tile,
    above_in_tile,
    first_head,
    num_heads,
    tiles,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return how many of the row's best each head has; ties go to the lower position, then to the lower head."""
    threshold, wanted = descend(row_descent + 3 * SLOT, 0, False)
    head = tl.arange(0, HEADS)
    is_head = (head < num_heads)[:, None]
    start = (first_head + head).to(tl.int64)[:, None] * tiles
    column = tl.arange(0, COLUMNS)

    # Ties of whole tiles, as far as all heads' ties of such a tile are wanted.
    counts = tl.zeros([HEADS], tl.int32)
    num_ties = 0
    num_taken = 0
    num_whole = 0
    for first in range(0, tiles, COLUMNS):
        tile = first + column
        mask = is_head & (tile < tiles)[None, :]
        above, ties = tile_counts(reached_in_tile, above_in_tile, start + tile[None, :], mask, threshold)
        in_tile = tl.sum(ties, 0)
        whole = num_ties + tl.cumsum(in_tile, 0) <= wanted
        counts += tl.sum(above + tl.where(whole[None, :], ties, 0), 1)
        num_ties += tl.sum(in_tile, 0)
        num_taken += tl.sum(tl.where(whole, in_tile, 0), 0)
        num_whole += tl.sum((whole & (tile < tiles)).to(tl.int32), 0)

    # The rest is in the tile behind them.
    cut = tl.minimum(num_whole, tiles - 1)
    wanted -= num_taken
    num_ties = 0
    for first in range(0, TILE, COLUMNS):
        key = tl.load(keys + (start + cut) * TILE + (first + column)[None, :], mask=is_head, other=0)
        tie = (is_head & (key == threshold)).to(tl.int32)
        at_position = tl.sum(tie, 0)
        before = num_ties + tl.cumsum(at_position, 0) - at_position
        rank = before[None, :] + tl.cumsum(tie, 0)
        counts += tl.sum(tl.where(rank <= wanted, tie, 0), 1)
        num_ties += tl.sum(at_position, 0)
    return counts


@triton.jit
def uniform_counts(total, available, head, num_heads):
    """Equal budgets as far as the heads have entries, as :func:`adakv_compile.policy.uniform_budgets` gives them."""
    is_head = head < num_heads
    # Heads with fewer entries, or as many and a lower index.
    smaller = (available[None, :] < available[:, None]) | (
        (available[None, :] == available[:, None]) & (head[None, :] < head[:, None])
    )
    smaller &= is_head[None, :]
    rank = tl.sum(smaller.to(tl.int32), 1)
    below = tl.sum(tl.where(smaller, available[None, :], 0), 1)
    # Division of negative numbers rounds up here, but never above the first one's share, which is not negative.
    level = tl.max(tl.where(is_head, (total - below) // tl.maximum(num_heads - rank, 1), 0), 0)
    budgets = tl.minimum(available, level)
    is_open = ((available > level) & is_head).to(tl.int32)
    missing = total - tl.sum(budgets, 0)
    return budgets + tl.where(tl.cumsum(is_open, 0) <= missing, is_open, 0)


@triton.jit(do_not_specialize=("num_heads", "tiles"))
def allocate(
    keys,
    row_descents,
    head_descents,
    num_entries,
    num_protected,
    reached_in_tile,
    above_in_tile,
    offsets,
    num_heads,
    tiles,
    JOINT: tl.constexpr,
    ALPHA_NUMERATOR: tl.constexpr,
    ALPHA_DENOMINATOR: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Turn a row's total into what every head keeps, protected entries included; see ``policy.head_budgets``."""
    row = tl.program_id(0)
    head = tl.arange(0, HEADS)
    is_head = head < num_heads
    first_head = row * num_heads
    row_descent = row_descents + row * (4 * SLOT)
    protected = tl.load(num_protected + first_head + head, mask=is_head, other=0)
    available = tl.load(num_entries + first_head + head, mask=is_head, other=0) - protected
    total = tl.load(row_descent + WANTED) - tl.sum(protected, 0)
    total = tl.minimum(tl.maximum(total, 0), tl.sum(available, 0))
    budgets = uniform_counts(total, available, head, num_heads)
    if JOINT:
        counts = joint_counts(
            keys,
            row_descent,
            reached_in_tile,
            above_in_tile,
            first_head,
            num_heads,
            tiles,
            HEADS=HEADS,
            COLUMNS=COLUMNS,
            TILE=TILE,
        )
        uniform = ALPHA_NUMERATOR * budgets.to(tl.int64)
        mixed = uniform + (ALPHA_DENOMINATOR - ALPHA_NUMERATOR) * (counts - protected).to(tl.int64)
        budgets = (mixed // ALPHA_DENOMINATOR).to(tl.int32)
        remainder = (mixed % ALPHA_DENOMINATOR).to(tl.int32)
        larger = (remainder[None, :] > remainder[:, None]) | (
            (remainder[None, :] == remainder[:, None]) & (head[None, :] < head[:, None])
        )
        rank = tl.sum((larger & is_head[None, :]).to(tl.int32), 1)
        budgets += (is_head & (rank < total - tl.sum(budgets, 0))).to(tl.int32)
    kept = budgets + protected
    tl.store(head_descents + (first_head + head) * (4 * SLOT) + WANTED, kept, mask=is_head)
    offsets += row * (num_heads + 1)
    tl.store(offsets, 0)
    tl.store(offsets + 1 + head, tl.cumsum(kept, 0), mask=is_head)


@triton.jit(do_not_specialize=("num_heads", "slots"))
def emit(
    keys,
    head_descents,
    reached_in_tile,
    above_in_tile,
    offsets,
    positions,
    num_heads,
    slots,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the positions of what a tile's head keeps of it, and a part of the zeros behind the row's last."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    tiles = tl.num_programs(0)
    threshold, wanted = descend(head_descents + (head * 4 + 3) * SLOT, 0, False)
    row = head // num_heads
    offset = offsets + row * (num_heads + 1)
    positions += row.to(tl.int64) * slots

    start = tl.load(offset + head % num_heads)
    num_ties = 0
    for first in range(0, tile, COLUMNS):
        before = first + tl.arange(0, COLUMNS)
        place = head.to(tl.int64) * tiles + before
        above, ties = tile_counts(reached_in_tile, above_in_tile, place, before < tile, threshold)
        start += tl.sum(above, 0)
        num_ties += tl.sum(ties, 0)
    start += tl.minimum(num_ties, wanted)

    column = tl.arange(0, TILE)
    key = tl.load(keys + (head.to(tl.int64) * tiles + tile) * TILE + column)
    tie = (key == threshold).to(tl.int32)
    keep = (key > threshold) | ((tie != 0) & (num_ties + tl.cumsum(tie, 0) <= wanted))
    slot = start + tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(positions + slot, tile * TILE + column, mask=keep & (slot < slots))

    used = tl.load(offset + num_heads)
    zeros = tl.zeros([TILE], tl.int32)
    for first in range((head % num_heads * tiles + tile) * TILE, slots, num_heads * tiles * TILE):
        slot = first + column
        tl.store(positions + slot, zeros, mask=(slot >= used) & (slot < slots))
