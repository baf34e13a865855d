"""What caches do to their tensors: append, copy, choose batch rows, cut; for compressed ones, in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from adakv_compile.runtime.arrange import half, wrap_dim
from adakv_compile.runtime.boundary import join
from adakv_compile.runtime.compressed import CompressedKV, make_view
from adakv_compile.runtime.errors import CacheMismatchError, CropError
from adakv_compile.runtime.layout import Layout
from adakv_compile.runtime.pending import Pending
from adakv_compile.runtime.repeated import repeat_batch
from adakv_compile.runtime.store import take_rows

__all__ = ["cat", "index_rows", "repeat", "same", "select_rows", "slice_dim", "split", "stack", "to_copy", "zero"]


# Appending


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Append new entries along the sequence, or put keys and values into one tensor along another dimension."""
    # Caches start from torch.tensor([]), which torch.cat ignores for historical reasons.
    tensors = [tensor for tensor in tensors if tensor.shape != (0,)]
    view, new = tensors[0], tensors[1:]
    if type(view) is not CompressedKV:
        return NotImplemented
    dim = wrap_dim(view, dim)
    axes = view.axes.dims[dim]
    if axes != "l":
        dims = (*view.axes.dims[:dim], "p" + axes.replace("1", ""), *view.axes.dims[dim + 1 :])
        return _paired(tensors, dims)
    if any(isinstance(item, CompressedKV) for item in new):
        return NotImplemented
    _check_new(view, new, dim)
    new = [item.detach() for item in new if item.shape[dim]]
    if not new:
        return same(view)
    return _append_both(view, new) if view.kind == "pair" else _append(view, new)


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Put keys and values into one tensor, in a dimension of their own."""
    view = tensors[0]
    if type(view) is not CompressedKV:
        return NotImplemented
    dim += view.dim() + 1 if dim < 0 else 0
    return _paired(tensors, (*view.axes.dims[:dim], "p", *view.axes.dims[dim:]))


def _check_new(view: CompressedKV, new: Sequence[Tensor], dim: int) -> None:
    wanted = (*view.shape[:dim], *view.shape[dim + 1 :])
    for item in new:
        given = (*item.shape[:dim], *item.shape[dim + 1 :])
        if item.dim() != view.dim() or given != wanted or item.dtype != view.dtype or item.device != view.device:
            raise CacheMismatchError(
                f"cat of {view!r} with new entries of shape {list(item.shape)}, {item.dtype}, {item.device}: they must"
                " have the cache's batch, heads, head dimension, dtype and device. Was the cache made by another model?"
            )


def _append(view: CompressedKV, new: Sequence[Tensor]) -> CompressedKV:
    store, layout = view.store, view.axes
    dim = store.key_dim if view.kind == "key" else store.value_dim
    entries = [layout.to_standard(item, store.num_kv_heads, dim) for item in new]
    added = sum(item.shape[2] for item in entries)
    before = view.pending
    # cat copies, so that the caller may overwrite its tensors before the attention.
    pending = Pending(torch.cat(entries if before is None else [before, *entries], dim=2), view.tail_length)
    return make_view(view.store, view.kind, view.length + added, view.start, pending, layout)


def _append_both(pair: CompressedKV, new: Sequence[Tensor]) -> CompressedKV:
    """Append to a pair, which has no other half to wait for."""
    dim = pair.axes.sequence_dim
    entries = torch.cat([*new], dim)
    added = entries.shape[dim]
    store = join(pair, pair, added)
    store.append(*pair.axes.split_pair(entries, store.num_kv_heads, store.key_dim))
    return make_view(store, "pair", pair.length + added, pair.start, None, pair.axes)


def _paired(tensors: Sequence[Tensor], dims: Sequence[str]) -> Any:
    """Return one view of a layer's keys and values, in this order; ``NotImplemented`` for any other two tensors."""
    if len(tensors) != 2 or any(type(tensor) is not CompressedKV for tensor in tensors):
        return NotImplemented
    key, value = tensors
    assert isinstance(key, CompressedKV)
    assert isinstance(value, CompressedKV)
    if (key.kind, value.kind) != ("key", "value") or key.axes != value.axes or key.shape != value.shape:
        return NotImplemented
    return make_view(join(key, value), "pair", key.length, key.start, None, Layout(tuple(dims)))


# Copies: views never change what they share, so a copy is another view


def same(view: CompressedKV, **_: Any) -> CompressedKV:
    """Return another tensor object of the same entries."""
    return make_view(view.store, view.kind, view.length, view.start, view.waiting, view.axes)


def to_copy(
    view: CompressedKV,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **_: Any,
) -> Any:
    """Change the device or the floating dtype; ``NotImplemented`` for other dtypes and for devices without memory."""
    dtype = dtype or view.dtype
    device = device or view.device
    if not dtype.is_floating_point or device.type == "meta":
        return NotImplemented
    if dtype == view.dtype and device == view.device:
        return same(view)
    pending = view.pending
    if pending is not None:
        pending = pending.to(device, dtype)
    store = view.store.to(device, dtype, non_blocking=non_blocking, tail_length=view.tail_length)
    return view.like(store, pending)


def zero(view: CompressedKV) -> CompressedKV:
    """Drop every entry, in place."""
    # A cache is zeroed to be used again from the beginning. Zero keys would still get attention; no entries get none.
    view.backing, view.waiting = view.store.emptied(view.start + view.length), None
    return view


# Batch rows


def _rows(view: CompressedKV, index: Tensor | slice) -> CompressedKV:
    pending = view.pending
    if pending is not None:
        pending = take_rows(pending, index)
    return view.like(view.store.select_rows(index, view.tail_length), pending)


def select_rows(view: CompressedKV, dim: int, index: Tensor) -> Any:
    """``index_select`` of batch rows; ``NotImplemented`` for other dimensions."""
    return _rows(view, index) if wrap_dim(view, dim) == view.axes.batch_dim and index.dim() == 1 else NotImplemented


def index_rows(view: CompressedKV, indices: Sequence[Tensor | None]) -> Any:
    """Indexing of batch rows by numbers or by a mask; ``NotImplemented`` for other dimensions."""
    given = {dim: index for dim, index in enumerate(indices) if index is not None}
    index = given.get(-1 if view.axes.batch_dim is None else view.axes.batch_dim)
    if index is None or index.dim() != 1 or len(given) != 1:
        return NotImplemented
    rows = view.store.batch
    if index.dtype in (torch.bool, torch.uint8):
        if index.shape[0] != rows:
            raise IndexError(f"a mask of {index.shape[0]} rows on {view!r}")
        return _rows(view, index.nonzero()[:, 0])
    return _rows(view, torch.where(index < 0, index + rows, index))


def repeat(view: CompressedKV, repeats: Sequence[int]) -> Any:
    """Repeat all batch rows; ``NotImplemented`` for other dimensions."""
    rows = view.axes.batch_dim
    others = [times for dim, times in enumerate(repeats) if dim != rows]
    if rows is None or len(repeats) != view.dim() or any(times != 1 for times in others) or repeats[rows] < 1:
        return NotImplemented
    return repeat_batch(view, repeats[rows], interleave=False)


def split(view: CompressedKV, split_size: int | Sequence[int], dim: int = 0) -> Any:
    """Split the batch rows, or a pair into keys and values; ``NotImplemented`` for any other split."""
    dim = wrap_dim(view, dim)
    extent = view.shape[dim]
    sizes = (
        [min(split_size, extent - at) for at in range(0, extent, split_size)]
        if isinstance(split_size, int)
        else list(split_size)
    )
    bounds = [sum(sizes[:at]) for at in range(len(sizes) + 1)]
    if bounds[-1] != extent:
        return NotImplemented
    parts = [slice_dim(view, dim, low, high) for low, high in pairwise(bounds)] if _divides(view, dim) else []
    return parts if parts and not any(part is NotImplemented for part in parts) else NotImplemented


def _divides(view: CompressedKV, dim: int) -> bool:
    return dim == view.axes.batch_dim or view.axes.dims[dim][0] == "p"


# Slices


def slice_dim(
    view: CompressedKV,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    """Slice batch rows, cut the sequence at either end, or take a half of a pair; ``NotImplemented`` for the rest."""
    dim = wrap_dim(view, dim)
    low, high, _ = slice(start, end, step).indices(view.shape[dim])
    if (low, step) == (0, 1) and high == view.shape[dim]:
        return same(view)
    if dim == view.axes.batch_dim:
        return _rows(view, slice(low, high, step))
    if step != 1:
        return NotImplemented
    return _crop(view, low, max(low, high)) if dim == view.axes.sequence_dim else half(view, dim, low, high)


def _crop(view: CompressedKV, low: int, high: int) -> CompressedKV:
    """Keep the logical slots ``low`` to ``high``."""
    store, start, end = view.store, view.start + low, view.start + high
    if end >= store.prefix_length:
        pending = view.waiting
        if pending is not None and end <= store.prefix_length + pending.base:
            pending = None
        return make_view(store, view.kind, high - low, start, pending, view.axes)
    if low == high:
        return make_view(store.emptied(end), view.kind, 0, start, None, view.axes)
    if store.is_complete:
        return make_view(store.truncate(end), view.kind, high - low, start, None, view.axes)
    removed, crops = view.length - high, view.start + view.length - store.prefix_length
    raise CropError(
        f"Removing the newest {removed} tokens from {view!r}: only the {crops} tokens appended since the last eviction"
        f" can be removed, because some entries of the {store.prefix_length} before them no longer exist. Remove fewer"
        " tokens, deepcopy the cache before going past the point to return to, or run the shorter prompt again."
    )
