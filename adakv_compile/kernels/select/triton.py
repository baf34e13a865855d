"""Selection without a sort: a radix descent over all heads of a row, then one for every head.

Scores become integer keys that order alike (:func:`rank_keys`). A descent finds the ``n``-th largest key of a group,
all heads of a row or one head, from four histograms of eight bits each: a launch counts one digit of the keys that have
the digits found so far (:func:`refine`), and every program of the next launch picks that digit for itself, which is
cheaper than to wait for one that picks it for all. Between the two descents, one program per row turns the row's best
into budgets of its heads (``allocate`` in ``triton_share``), and at the end ``emit`` writes what they keep. Counts are
integers, and no result depends on the order in which programs run: it has the same bits every time.

A descent is ``[groups, 4, SLOT]`` int32: for each digit a histogram, the digits above it, and how many of the keys that
have those are wanted.
"""
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "BINS",
    "NOT_A_NUMBER",
    "NO_ENTRY",
    "PREFIX",
    "PROTECTED",
    "SLOT",
    "WANTED",
    "candidate",
    "descend",
    "is_valid",
    "rank_keys",
    "refine",
    "tile_counts",
]

BINS = tl.constexpr(256)
# A histogram, `prefix` and `wanted`; the rest keeps histograms aligned.
SLOT = tl.constexpr(256 + 16)
PREFIX = tl.constexpr(256)
WANTED = tl.constexpr(257)
# Keys below and above those of all numbers.
NO_ENTRY = tl.constexpr(-(2**31))
NOT_A_NUMBER = tl.constexpr(-(2**31) + 1)
PROTECTED = tl.constexpr(2**31 - 1)


@triton.jit
def is_valid(valid, head_start, position, inside, valid_stride, HAS_VALID: tl.constexpr):
    """Whether positions hold an entry, of those ``inside`` the range that may be read."""
    if HAS_VALID:
        inside &= tl.load(valid + head_start + position.to(tl.int64) * valid_stride, mask=inside, other=0) != 0
    return inside


@triton.jit
def candidate(
    scores,
    valid,
    head_start,
    position,
    first_live,
    protected_start,
    length,
    valid_stride,
    HAS_VALID: tl.constexpr,
):
    """Return the scores at positions, and whether they count: those of candidates that are no NaN."""
    inside = (position >= first_live) & (position < protected_start) & (position < length)
    score = tl.load(scores + position, mask=inside, other=0.0)
    return score, is_valid(valid, head_start, position, inside, valid_stride, HAS_VALID) & (score == score)


@triton.jit(
    do_not_specialize=("total", "protected_from", "first_live", "valid_row", "valid_head", "valid_stride", "num_heads")
)
def rank_keys(
    scores,
    valid,
    keys,
    row_descents,
    head_descents,
    num_entries,
    num_protected,
    total,
    protected_from,
    length,
    num_heads,
    first_live,
    valid_row,
    valid_head,
    valid_stride,
    HAS_VALID: tl.constexpr,
    TOTAL_PER_ROW: tl.constexpr,
    PROTECTED_PER_ROW: tl.constexpr,
    JOINT: tl.constexpr,
    MAX_POOL: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pool the scores of a tile, store keys that order like them, and count their first digits.

    Keys are ``[B * H, tiles * TILE]``, those past ``length`` no entries.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row = head // num_heads
    protected_start = (tl.load(protected_from + row) if PROTECTED_PER_ROW else protected_from).to(tl.int32)
    position = tile * TILE + tl.arange(0, TILE)
    head_start = row.to(tl.int64) * valid_row + (head % num_heads).to(tl.int64) * valid_head
    scores += head.to(tl.int64) * length

    # What is no candidate is out of range for its neighbours, and so is NaN.
    outside = float("-inf") if MAX_POOL else 0.0
    pooled = tl.full([TILE], outside, tl.float32)
    for shift in range(KERNEL_SIZE):
        place = position + (shift - KERNEL_SIZE // 2)
        score, counted = candidate(
            scores, valid, head_start, place, first_live, protected_start, length, valid_stride, HAS_VALID
        )
        score = tl.where(counted, score, outside)
        pooled = tl.maximum(pooled, score) if MAX_POOL else pooled + score
    if not MAX_POOL:
        pooled = tl.div_rn(pooled, tl.full([TILE], KERNEL_SIZE, tl.float32))
    pooled = tl.where(pooled == 0.0, 0.0, pooled)  # -0.0 ties with 0.0
    bits = pooled.to(tl.int32, bitcast=True)
    # Floats order as sign and magnitude; flipping the negative ones makes that two's complement.
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    _, is_number = candidate(
        scores, valid, head_start, position, first_live, protected_start, length, valid_stride, HAS_VALID
    )
    key = tl.where(is_number & (pooled == pooled), key, NOT_A_NUMBER)
    inside = (position >= first_live) & (position < length)
    entry = is_valid(valid, head_start, position, inside, valid_stride, HAS_VALID)
    protected = entry & (position >= protected_start)
    key = tl.where(protected, PROTECTED, tl.where(entry, key, NO_ENTRY))
    tl.store(keys + (head.to(tl.int64) * tl.num_programs(0) + tile) * TILE + tl.arange(0, TILE), key)

    bins = tl.arange(0, BINS)
    counts = tl.histogram((key >> 24) + 128, BINS, mask=entry)
    tl.atomic_add(head_descents + head * (4 * SLOT) + bins, counts, mask=counts > 0, sem="relaxed")
    if JOINT:
        tl.atomic_add(row_descents + row * (4 * SLOT) + bins, counts, mask=counts > 0, sem="relaxed")
    tl.atomic_add(num_entries + head, tl.sum(entry.to(tl.int32), 0), sem="relaxed")
    tl.atomic_add(num_protected + head, tl.sum(protected.to(tl.int32), 0), sem="relaxed")
    if (tile == 0) & (head % num_heads == 0):
        wanted = tl.load(total + row) if TOTAL_PER_ROW else total
        tl.store(row_descents + row * (4 * SLOT) + WANTED, wanted.to(tl.int32))


@triton.jit
def descend(slot, least, first):
    """Pick a digit, the largest that as many keys as are wanted reach.

    Args:
        slot: The digit's part of a descent.
        least: Wanted at the least; it is never more than there is.
        first: Whether this is the first digit, the one with the sign.

    Returns:
        The digits so far, and how many of the keys that have those are wanted: not 0 unless none ever was.
    """
    bins = tl.arange(0, BINS)
    counts = tl.load(slot + bins)
    reached = tl.cumsum(counts, 0, reverse=True)
    wanted = tl.minimum(tl.maximum(tl.load(slot + WANTED), least), tl.sum(counts, 0))
    digit = tl.sum((reached >= wanted).to(tl.int32), 0) - 1
    prefix = tl.where(first, digit - 128, tl.load(slot + PREFIX) * 256 + digit)
    return prefix, wanted - tl.sum(tl.where(bins > digit, counts, 0), 0)


@triton.jit(do_not_specialize=("step",))
def refine(
    keys,
    descents,
    num_protected,
    reached_in_tile,
    above_in_tile,
    group_heads,
    step,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pick digit ``step`` of a group and count the next one of the tile's keys that have all digits so far.

    The last step leaves, for whatever the last digit will be, how many of a tile's keys reach it
    (``[B * H, tiles, SLOT]``; none
    reaches the digit 256) and how many are above all of these (``[B * H, tiles]``).
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    group = head // group_heads
    index = tl.arange(0, HEADS)
    least = tl.sum(tl.load(num_protected + group * group_heads + index, mask=index < group_heads, other=0), 0)
    slot = descents + (group * 4 + step) * SLOT
    prefix, wanted = descend(slot, tl.where(step == 0, least, 0), step == 0)
    slot += SLOT
    if (tile == 0) & (head % group_heads == 0):
        tl.store(slot + PREFIX, prefix)
        tl.store(slot + WANTED, wanted)

    place = head.to(tl.int64) * tl.num_programs(0) + tile
    key = tl.load(keys + place * TILE + tl.arange(0, TILE))
    shift = 16 - 8 * step
    digits = key >> (shift + 8)
    bins = tl.arange(0, BINS)
    counts = tl.histogram((key >> shift) & 255, BINS, mask=(digits == prefix) & (key != NO_ENTRY))
    tl.atomic_add(slot + bins, counts, mask=counts > 0, sem="relaxed")
    if step == 2:
        reached = reached_in_tile + place * SLOT
        tl.store(reached + bins, tl.cumsum(counts, 0, reverse=True))
        tl.store(reached + BINS, 0)
        tl.store(above_in_tile + place, tl.sum((digits > prefix).to(tl.int32), 0))


@triton.jit
def tile_counts(reached_in_tile, above_in_tile, place, mask, threshold):
    """Return how many keys of tiles are above the threshold of their descent, and how many are equal to it."""
    slot = reached_in_tile + place * SLOT + (threshold & 255)
    more = tl.load(slot + 1, mask=mask, other=0)
    reached = tl.load(slot, mask=mask, other=0)
    return tl.load(above_in_tile + place, mask=mask, other=0) + more, reached - more
