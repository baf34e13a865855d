"""A view on its way to a repetition: ``unsqueeze``, ``expand``, ``reshape``, as models spell it in eager mode."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adakv_compile.runtime.compressed import CompressedKV, make_wrapper
from adakv_compile.runtime.store import repeat_rows

__all__ = ["RepeatedKV", "copy_repeated", "expand", "insert_dim", "merge_dims", "repeat_batch"]


class RepeatedKV(CompressedKV):
    """A :class:`CompressedKV` with a repeated dimension, which owns nothing and refers to the view it repeats.

    With ``inserted`` it has five dimensions, ``[B, Hkv, times, L, D]`` for ``inserted == 2``. Without, it is
    ``[B, Hkv * times, L, D]``, each KV head ``times`` times in a row: what grouped-query attention without
    ``enable_gqa`` passes to the attention.

    Attributes:
        base: The view that is repeated.
        times: How often.
        inserted: The dimension that was inserted and not yet merged, or None.
    """

    base: CompressedKV
    times: int
    inserted: int | None

    def dense(self, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the dense tensor of this shape, and which slots are held (the same without the last dimension)."""
        dim = 1 if self.inserted is None else self.inserted
        entries, held = self.base.dense(fill)
        if self.inserted is None:
            return entries.repeat_interleave(self.times, dim), held.repeat_interleave(self.times, dim)
        return entries.unsqueeze(dim).expand(self.shape), held.unsqueeze(dim).expand(self.shape[:-1])

    def __deepcopy__(self, memo: dict[int, Any]) -> RepeatedKV:
        return _make(copy.deepcopy(self.base, memo), self.times, self.inserted)

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[..., RepeatedKV], tuple[Any, ...]]:
        return _make, (self.base, self.times, self.inserted)


def insert_dim(view: CompressedKV, dim: int) -> Any:
    """``unsqueeze`` of a plain view beside the batch or the head dimension; ``NotImplemented`` elsewhere."""
    dim += 5 if dim < 0 else 0
    return _make(view, 1, dim) if dim in (0, 1, 2) else NotImplemented


def expand(view: RepeatedKV, size: Sequence[int]) -> Any:
    """``expand`` of the inserted dimension; ``NotImplemented`` for any other."""
    dim = view.inserted
    if dim is None or view.times != 1 or len(size) != 5:
        return NotImplemented
    same = all(new in (-1, old) for at, (new, old) in enumerate(zip(size, view.shape, strict=True)) if at != dim)
    return _make(view.base, max(size[dim], 1), dim) if same and size[dim] != 0 else NotImplemented


def merge_dims(view: RepeatedKV, size: Sequence[int]) -> Any:
    """``reshape`` that merges the inserted dimension into batch or heads; ``NotImplemented`` for any other."""
    base, times = view.base, view.times
    batch, heads, length, dim = base.shape
    size = list(size)
    if size.count(-1) == 1:
        known = math.prod(extent for extent in size if extent != -1)
        size[size.index(-1)] = base.numel() * times // max(known, 1)
    if view.inserted is None:
        return view if size == list(view.shape) else NotImplemented
    if view.inserted == 2:
        return _make(base, times, None) if size == [batch, heads * times, length, dim] else NotImplemented
    if size != [batch * times, heads, length, dim]:
        return NotImplemented
    return repeat_batch(base, times, interleave=view.inserted == 1)


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


def _make(base: CompressedKV, times: int, inserted: int | None) -> RepeatedKV:
    shape: list[int] = list(base.shape)
    if inserted is None:
        shape[1] *= times
    else:
        shape.insert(inserted, times)
    view = make_wrapper(RepeatedKV, torch.Size(shape), dtype=base.dtype, device=base.device)
    view.anchor = base.anchor
    view.base, view.times, view.inserted = base, times, inserted
    view.backing, view.waiting = base.backing, base.waiting
    view.kind, view.start, view.length = base.kind, base.start, base.length
    return view
