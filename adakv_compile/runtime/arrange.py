"""Operations that only change how a compressed cache is laid out, or take the keys or the values out of a pair.

Nothing moves: each returns another view of the same store. Where a shape says less than a layout does (a dimension of
size one may be the batch, the heads or nothing), any layout that describes the same tensor will do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Final

from adakv_compile.runtime.compressed import CompressedKV, Kind, make_view
from adakv_compile.runtime.layout import STANDARD, Layout

__all__ = [
    "as_standard",
    "half",
    "insert_dim",
    "permute",
    "reshape",
    "select",
    "squeeze",
    "squeeze_all",
    "squeeze_dims",
    "transpose",
    "transpose_matrix",
    "unbind",
    "wrap_dim",
]

_KINDS: Final[tuple[Kind, Kind]] = ("key", "value")


def wrap_dim(view: CompressedKV, dim: int) -> int:
    """Return the number of a dimension, counted from the front.

    Raises:
        IndexError: There is no such dimension.
    """
    return _wrapped(view, dim, view.dim())


def as_standard(view: CompressedKV) -> CompressedKV | None:
    """Return the view with axes ``[B, Hkv, L, D]`` if its shape can be read so, otherwise None."""
    if view.axes is STANDARD:
        return view
    return _laid(view, STANDARD.dims) if STANDARD.dims in _readings(view, view.shape) else None


# Orders


def permute(view: CompressedKV, dims: Sequence[int]) -> Any:
    """Put the dimensions in another order; ``NotImplemented`` if that isn't one."""
    order = [wrap_dim(view, dim) for dim in dims]
    known = view.axes.dims
    return _laid(view, [known[dim] for dim in order]) if sorted(order) == [*range(len(known))] else NotImplemented


def transpose(view: CompressedKV, first: int, second: int) -> CompressedKV:
    """Exchange two dimensions."""
    dims = list(view.axes.dims)
    first, second = wrap_dim(view, first), wrap_dim(view, second)
    dims[first], dims[second] = dims[second], dims[first]
    return _laid(view, dims)


def transpose_matrix(view: CompressedKV) -> Any:
    """Exchange the dimensions of a matrix; ``NotImplemented`` for more than two."""
    return _laid(view, view.axes.dims[::-1]) if view.dim() == 2 else NotImplemented


# Shapes


def reshape(view: CompressedKV, size: Sequence[int]) -> Any:
    """Split or merge whole axes; ``NotImplemented`` where the shape splits an axis or merges the sequence."""
    shape = list(size)
    if shape.count(-1) == 1:
        known = math.prod(extent for extent in shape if extent != -1)
        shape[shape.index(-1)] = view.numel() // max(known, 1)
    if shape == list(view.shape):
        return _laid(view, view.axes.dims)
    readings = _readings(view, shape)
    return _laid(view, min(readings, key=_obscurity)) if readings else NotImplemented


def insert_dim(view: CompressedKV, dim: int) -> CompressedKV:
    """Insert a dimension of size one."""
    dim = _wrapped(view, dim, view.dim() + 1)
    dims, shape = view.axes.dims, view.shape
    # One row or one head that was squeezed out gets its dimension back.
    readings = _readings(view, (*shape[:dim], 1, *shape[dim:]))
    return _laid(view, min([(*dims[:dim], "1", *dims[dim:]), *readings], key=_obscurity))


def squeeze(view: CompressedKV, dim: int) -> Any:
    """Remove a dimension if its size is one."""
    return squeeze_dims(view, [dim])


def squeeze_dims(view: CompressedKV, dims: Sequence[int]) -> Any:
    """Remove those of some dimensions that have size one; ``NotImplemented`` for the sequence."""
    removed = {wrap_dim(view, dim) for dim in dims}
    return reshape(view, [size for dim, size in enumerate(view.shape) if dim not in removed or size != 1])


def squeeze_all(view: CompressedKV) -> Any:
    """Remove every dimension of size one; ``NotImplemented`` for the sequence."""
    return squeeze_dims(view, range(view.dim()))


# Pairs


def select(view: CompressedKV, dim: int, index: int) -> Any:
    """Take the keys or the values, or the one entry of a dimension; ``NotImplemented`` for any other."""
    dim = wrap_dim(view, dim)
    size = view.shape[dim]
    if not -size <= index < size:
        raise IndexError(f"index {index} in dimension {dim} of {view!r}")
    if view.axes.dims[dim] == "p":
        return _part(view, index % 2, (*view.axes.dims[:dim], *view.axes.dims[dim + 1 :]))
    return squeeze(view, dim) if size == 1 else NotImplemented


def unbind(view: CompressedKV, dim: int = 0) -> Any:
    """Take keys and values out of a pair; ``NotImplemented`` for dimensions with several entries that are no pair."""
    dim = wrap_dim(view, dim)
    if view.axes.dims[dim] != "p" and view.shape[dim] != 1:
        return NotImplemented
    taken = [select(view, dim, index) for index in range(view.shape[dim])]
    return NotImplemented if any(part is NotImplemented for part in taken) else taken


def half(view: CompressedKV, dim: int, low: int, high: int) -> Any:
    """Return the keys or the values if entries ``low`` to ``high`` of a dimension are exactly these."""
    axes = view.axes.dims[dim]
    if axes[0] != "p":
        return NotImplemented
    size = view.shape[dim] // 2
    if (low, high) not in ((0, size), (size, 2 * size)):
        return NotImplemented
    dims = list(view.axes.dims)
    dims[dim] = axes[1:] or "1"
    return _part(view, int(low > 0), dims)


def _wrapped(view: CompressedKV, dim: int, rank: int) -> int:
    if not -rank <= dim < rank:
        raise IndexError(f"dimension {dim} of {view!r}")
    return dim + rank if dim < 0 else dim


def _part(pair: CompressedKV, index: int, dims: Sequence[str]) -> CompressedKV:
    return make_view(pair.store, _KINDS[index], pair.length, pair.start, None, Layout(tuple(dims)))


def _laid(view: CompressedKV, dims: Sequence[str]) -> CompressedKV:
    return make_view(view.store, view.kind, view.length, view.start, view.waiting, Layout(tuple(dims)))


# What a shape can mean


def _readings(view: CompressedKV, shape: Sequence[int]) -> list[tuple[str, ...]]:
    """Return every way to understand ``shape`` as the axes of a view, the order of its entries unchanged."""
    store = view.store
    dim = store.value_dim if view.kind == "value" else store.key_dim
    sizes = {"p": 2, "b": store.batch, "h": store.num_kv_heads, "l": view.length, "d": dim}
    axes = "".join(view.axes.dims).replace("1", "")
    fixed = "".join(axis for axis in axes if axis == "l" or sizes[axis] != 1)
    # An axis of size one can be anywhere: with a dimension of its own, or beside any other axis but the sequence.
    loose = sorted(set(axes) - set(fixed))
    return [dims for filled in _filled(fixed, shape, sizes) for dims in _completed(filled, loose)]


def _filled(axes: str, shape: Sequence[int], sizes: dict[str, int]) -> Iterator[tuple[str, ...]]:
    """Yield every way to fill dimensions with consecutive axes; one of size one may stay empty."""
    if not shape:
        if not axes:
            yield ()
        return
    for count in range(len(axes) + 1):
        run = axes[:count]
        if math.prod(sizes[axis] for axis in run) == shape[0] and (run == "l" or "l" not in run):
            for rest in _filled(axes[count:], shape[1:], sizes):
                yield (run, *rest)


def _completed(filled: tuple[str, ...], loose: Sequence[str]) -> Iterator[tuple[str, ...]]:
    places = [at for at, run in enumerate(filled) if run != "l"]
    for chosen in product(places, repeat=len(loose)):
        dims = list(filled)
        for axis, at in zip(loose, chosen, strict=True):
            dims[at] += axis
        yield tuple(run or "1" for run in dims)


def _obscurity(dims: tuple[str, ...]) -> tuple[int, int]:
    """Rank readings: the more axes have a dimension of their own, and first of all a pair, the more can be done."""
    return sum(len(run) > 1 for run in dims), sum(len(run) for run in dims if "p" in run)
