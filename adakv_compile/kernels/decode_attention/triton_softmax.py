"""Device code: running softmax sums, and how those of a head's items are added up."""
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from adakv_compile.kernels._launch import LOG2E, dot
from adakv_compile.kernels.decode_attention.triton_visibility import FLOOR

__all__ = ["combine", "fold", "inside", "log_sum", "mean"]


@triton.jit
def fold(peak, mass, summed, logits, value, C: tl.constexpr):
    """Take logits `[BM, C]` (units of log 2) and values `[C, D]` into running softmax sums."""
    # The floor keeps all differences finite, also in rows that have seen nothing.
    top = tl.maximum(peak, tl.max(logits, 1))
    weights = tl.exp2(logits - top[:, None])
    factor = tl.exp2(peak - top)
    mass = mass * factor + tl.sum(weights, 1)
    summed = summed * factor[:, None]
    if C == 1:
        summed += weights * value.to(tl.float32)
    else:
        summed += dot(weights.to(value.dtype), value)
    return top, mass, summed


@triton.jit
def mean(summed, mass):
    """Return the attention, zeros where nothing is visible."""
    return summed / tl.where(mass == 0.0, 1.0, mass)[:, None]


@triton.jit
def log_sum(peak, mass):
    """Return the natural log-sum-exp, `-inf` where nothing is visible."""
    log = (peak + tl.log2(tl.where(mass == 0.0, 1.0, mass))) / LOG2E
    return tl.where(mass == 0.0, float("-inf"), log)


@triton.jit
def inside(entries, dimension, D: tl.constexpr, DP: tl.constexpr):
    """Mask a tile by its entries, and by its dimensions if they are padded."""
    return entries if D == DP else entries & (dimension < D)


@triton.jit
def combine(
    partial,
    partial_sums,
    output,
    sums,
    base,
    items,
    block,
    batch,
    kv_head,
    count,
    H: tl.constexpr,
    G: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BM: tl.constexpr,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Add the partial sums of a head's items up and write the result."""
    in_block = tl.arange(0, ROWS)
    row = block * BM + in_block
    live = row < count * G
    dim_v = tl.arange(0, DVP)
    part = tl.arange(0, TOGETHER)
    peak = tl.full([ROWS], FLOOR, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, DVP], tl.float32)
    for start in range(0, items, TOGETHER):
        there = (start + part < items)[:, None] & live[None, :]
        spot = (base + start + part)[:, None] * ROWS
        found = tl.load(
            partial + (spot + in_block[None, :])[:, :, None] * DV + dim_v[None, None, :],
            mask=inside(there[:, :, None], dim_v[None, None, :], DV, DVP),
            other=0.0,
            cache_modifier=".cg",
        )
        spot = 2 * spot + in_block[None, :]
        peaks = tl.load(partial_sums + spot, mask=there, other=FLOOR, cache_modifier=".cg")
        masses = tl.load(partial_sums + spot + ROWS, mask=there, other=0.0, cache_modifier=".cg")
        top = tl.maximum(peak, tl.max(peaks, 0))
        factors = tl.exp2(peaks - top[None, :])
        factor = tl.exp2(peak - top)
        mass = mass * factor + tl.sum(masses * factors, 0)
        summed = summed * factor[:, None] + tl.sum(found * factors[:, :, None], 0)
        peak = top
    result = (batch * H * G + kv_head * G + row % G) * count + row // G
    tl.store(
        output + result[:, None] * DV + dim_v[None, :],
        mean(summed, mass).to(output.dtype.element_ty),
        mask=inside(live[:, None], dim_v[None, :], DV, DVP),
    )
    if sums is not None:
        tl.store(sums + result, log_sum(peak, mass), mask=live)
