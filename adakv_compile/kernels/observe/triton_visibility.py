"""Device code: what rows of the window see of a tile of keys, by the causal and sliding rules or by a mask."""
# Device code is compiled by Triton, not checked by Python's type checkers: its values have no Python types.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from adakv_compile.kernels._launch import LOG2E
from adakv_compile.kernels.decode_attention.triton_visibility import LOWEST

__all__ = ["hide", "is_edge", "look_up", "unweigh"]


@triton.jit
def is_edge(first, length, window, reach, KEYS: tl.constexpr):
    """Whether some row does not see some key of the tile that begins at ``first``."""
    return (first + KEYS > length - window + 1) | (first < length - reach)


@triton.jit
def hide(logits, place, end, reach):
    """Set to -inf what rows do not see."""
    seen = (place[None, :] <= end[:, None]) & (place[None, :] > (end - reach)[:, None])
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def unweigh(weights, place, end, total, reach, AXIS: tl.constexpr):
    """Set to 0 what rows do not see; a row whose sum is NaN gives NaN to every key."""
    keys = tl.expand_dims(place, 1 - AXIS)
    last = tl.expand_dims(end, AXIS)
    nothing = tl.expand_dims(tl.where(total == total, 0.0, total), AXIS)
    return tl.where((keys <= last) & (keys > last - reach), weights, nothing)


@triton.jit
def look_up(
    logits,
    mask,
    stride_mh,
    stride_mt,
    stride_mm,
    head,
    row,
    place,
    length,
    MASK: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Hide what a bool mask hides (`MASK` 1), or add a float mask (2); `AXIS` is that of the keys.

    Args:
        logits: In units of log 2.
        mask: Points at the window's first row and the first key, of the group's first head.
        stride_mh: Elements from head to head.
        stride_mt: Elements from row to row.
        stride_mm: Elements from key to key.
        head: `[ROWS]`, within the group.
        row: `[ROWS]`, of the window.
        place: `[KEYS]`; what lies at `length` or beyond is hidden by others.
        length: Keys.
        MASK: The kind.
        AXIS: 0 if keys are rows of the logits, else 1.
    """
    rows = mask + (head.to(tl.int64) * stride_mh + row.to(tl.int64) * stride_mt)
    columns = place.to(tl.int64) * stride_mm
    found = tl.load(
        tl.expand_dims(rows, AXIS) + tl.expand_dims(columns, 1 - AXIS),
        mask=tl.expand_dims(place < length, 1 - AXIS),
        other=0,
    )
    if MASK == 1:
        logits = tl.where(found != 0, logits, float("-inf"))
    else:
        bias = found.to(tl.float32)
        # The lowest float, with which models hide, would overflow to -inf in units of log 2.
        low = bias < LOWEST / LOG2E
        logits += tl.where(low, LOWEST, tl.where(low, 0.0, bias) * LOG2E)
        logits = tl.where(bias == float("-inf"), bias, logits)
    return logits
