"""A view on its way to a repetition: ``unsqueeze``, ``expand``, ``reshape``, as models spell it in eager mode."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adakv_compile.runtime.arrange import as_standard, reshape, squeeze
from adakv_compile.runtime.compressed import CompressedKV, make_wrapper
from adakv_compile.runtime.layout import STANDARD
from adakv_compile.runtime.store import repeat_rows

__all__ = ["RepeatedKV", "copy_repeated", "expand", "merge_dims", "rearrange", "repeat_batch"]


class RepeatedKV(CompressedKV):
    """A :class:`CompressedKV` with a repeated dimension, which owns nothing and refers to the view it repeats.

    With ``inserted`` it has one dimension more than its base, beside the batch rows or after the heads:
    ``[B, Hkv, times, L, D]`` for ``inserted == 2``. Without, it is ``[B, Hkv * times, L, D]``, each KV head ``times``
    times in a row: what grouped-query attention without ``enable_gqa`` passes to the attention. Other layouts likewise.

    Attributes:
        base: The view that is repeated.
        times: How often.
        inserted: The dimension that was inserted and not yet merged, or None.
    """

    base: CompressedKV
    times: int
    inserted: int | None

    def dense(self, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the dense tensor of this shape, and which slots are held.

        The latter is ``[B, H, L]`` bool, with the heads repeated once they are. On its way there it has this shape
        without the last dimension, or is the base's if that has another layout.
        """
        entries, held = self.base.dense(fill)
        dim = self.inserted
        if dim is None:
            return entries.repeat_interleave(self.times, _heads_dim(self.base)), held.repeat_interleave(self.times, 1)
        entries = entries.unsqueeze(dim).expand(self.shape)
        return entries, held.unsqueeze(dim).expand(self.shape[:-1]) if self.base.axes is STANDARD else held

    def __deepcopy__(self, memo: dict[int, Any]) -> RepeatedKV:
        return _make(copy.deepcopy(self.base, memo), self.times, self.inserted)

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[..., RepeatedKV], tuple[Any, ...]]:
        return _make, (self.base, self.times, self.inserted)


def expand(view: CompressedKV, size: Sequence[int]) -> Any:
    """Repeat a dimension of size one; ``NotImplemented`` unless that repeats the batch rows or the heads."""
    if len(size) != view.dim():
        return NotImplemented
    grown = [dim for dim, (new, old) in enumerate(zip(size, view.shape, strict=True)) if new not in (-1, old)]
    if not grown:
        return reshape(view, view.shape)
    if len(grown) != 1 or view.shape[grown[0]] != 1 or size[grown[0]] == 0:
        return NotImplemented
    (dim,), times = grown, size[grown[0]]
    if dim == view.axes.batch_dim:
        return repeat_batch(view, times, interleave=False)
    usual = as_standard(view)
    single = view if usual is None else usual
    if dim == _heads_dim(single):
        return _make(single, times, None)
    base = _without(view, dim)
    if base is None:
        return NotImplemented
    rows, heads = base.axes.batch_dim, _heads_dim(base)
    beside_rows = rows is not None and dim in (rows, rows + 1)
    return _make(base, times, dim) if beside_rows or (heads is not None and dim == heads + 1) else NotImplemented


def merge_dims(view: RepeatedKV, size: Sequence[int]) -> Any:
    """``reshape`` that merges the inserted dimension into batch or heads; ``NotImplemented`` for any other."""
    base, times, dim = view.base, view.times, view.inserted
    wanted, known = list(size), list(view.shape)
    if wanted.count(-1) == 1:
        rest = math.prod(extent for extent in wanted if extent != -1)
        wanted[wanted.index(-1)] = view.numel() // max(rest, 1)
    if wanted == known:
        return copy_repeated(view)
    if dim is None:
        return NotImplemented
    if dim == base.axes.batch_dim and wanted == _merged(known, dim):
        return repeat_batch(base, times, interleave=False)
    if wanted != _merged(known, dim - 1):
        return NotImplemented
    if dim - 1 == base.axes.batch_dim:
        return repeat_batch(base, times, interleave=True)
    return _make(base, times, None) if dim - 1 == _heads_dim(base) else NotImplemented


def rearrange(change: Callable[..., Any]) -> Callable[..., Any]:
    """Return what an operation that only orders dimensions does to repeated heads."""

    def rearranged(view: RepeatedKV, *args: Any) -> Any:
        base = change(view.base, *args) if view.inserted is None else NotImplemented
        return base if base is NotImplemented else _make(base, view.times, None)

    return rearranged


def copy_repeated(view: RepeatedKV, **_: Any) -> RepeatedKV:
    """``clone``, ``detach`` or ``alias``: another tensor object for the same repetition."""
    return _make(view.base, view.times, view.inserted)


def repeat_batch(view: CompressedKV, times: int, *, interleave: bool) -> CompressedKV:
    """Return a view with every batch row ``times`` times, one after the other or all rows over again."""
    pending = view.pending
    if pending is not None:
        pending = repeat_rows(pending, times, interleave=interleave)
    store = view.store.repeat_rows(times, interleave=interleave, tail_length=view.tail_length)
    return view.like(store, pending)


def _without(view: CompressedKV, dim: int) -> CompressedKV | None:
    base = squeeze(view, dim)
    if base is NotImplemented:
        return None
    usual = as_standard(base)
    return base if usual is None else usual


def _heads_dim(view: CompressedKV) -> int | None:
    dims = view.axes.dims
    return dims.index("h") if "h" in dims else None


def _merged(shape: Sequence[int], dim: int) -> list[int]:
    """Return a shape with a dimension merged with the next one."""
    return [*shape[:dim], math.prod(shape[dim : dim + 2]), *shape[dim + 2 :]]


def _make(base: CompressedKV, times: int, inserted: int | None) -> RepeatedKV:
    shape: list[int] = list(base.shape)
    if inserted is None:
        shape[base.axes.dims.index("h")] *= times
    else:
        shape.insert(inserted, times)
    view = make_wrapper(RepeatedKV, torch.Size(shape), dtype=base.dtype, device=base.device)
    view.anchor = base.anchor
    view.base, view.times, view.inserted = base, times, inserted
    view.backing, view.waiting = base.backing, base.waiting
    view.kind, view.start, view.length = base.kind, base.start, base.length
    return view
