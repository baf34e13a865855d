"""Device code: what a query sees, by positions; the rules of :mod:`adakv_compile.kernels._visibility`."""
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from adakv_compile.kernels._launch import LOG2E

__all__ = ["FLOOR", "LOWEST", "hide"]

# Below every logit and above the floor that running maxima start at, so that differences to either are finite.
LOWEST: tl.constexpr = tl.constexpr(-1e38)
FLOOR: tl.constexpr = tl.constexpr(-3e38)


@triton.jit
def hide(
    logits,
    used,
    position,
    query_position,
    live,
    mask_rows,
    mask_stride,
    mask_columns,
    mask_origin,
    padding_row,
    padding_stride,
    padding_columns,
    padding_origin,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Give what a query does not see the logit `-inf`, and add a float mask.

    Args:
        logits: `[R, C]` float32 in units of log 2.
        used: `[C]`, which entries there are.
        position: int32 `[C]` of the entries; arbitrary where not used.
        query_position: int32 `[R]`.
        live: `[R]`, which rows are queries.
        mask_rows: `[R]` pointers to column 0 of each query's mask.
        mask_stride: Elements from column to column.
        mask_columns: Columns.
        mask_origin: Position of column 0; negative if the mask is longer than the sequence.
        padding_row: Pointer to column 0 of the row's padding mask.
        padding_stride: Elements from column to column.
        padding_columns: Columns.
        padding_origin: Position of column 0.
        window: Entries a query sees, its own included.
        CAUSAL: Whether entries after the query are hidden.
        WINDOW: Whether `window` counts.
        MASK: 0: none; 1: bool; 2: float.
        PADDED: Whether there is a padding mask.
    """
    seen = used[None, :]
    if CAUSAL:
        seen = seen & (position[None, :] <= query_position[:, None])
    if WINDOW:
        seen = seen & (position[None, :] > query_position[:, None] - window)
    if PADDED:
        column = position - padding_origin
        inside = used & (column >= 0) & (column < padding_columns)
        real = tl.load(padding_row + column.to(tl.int64) * padding_stride, mask=inside, other=0)
        seen = seen & (real != 0)[None, :]
    if MASK != 0:
        column = position - mask_origin
        inside = used & (column >= 0) & (column < mask_columns)
        found = tl.load(
            mask_rows[:, None] + (column.to(tl.int64) * mask_stride)[None, :],
            mask=live[:, None] & inside[None, :],
            other=0,
        )
        if MASK == 1:
            seen = seen & (found != 0)
        else:
            bias = found.to(tl.float32)
            # The lowest float, with which models hide, would overflow to -inf in units of log 2.
            low = bias < LOWEST / LOG2E
            logits += tl.where(low, LOWEST, tl.where(low, 0.0, bias) * LOG2E)
            logits = tl.where(bias == float("-inf"), bias, logits)
            seen = seen & inside[None, :]
    return tl.where(seen, logits, float("-inf"))
