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

__all__ = ["RepeatedKV", "copy_repeated", "expand", "merge_dims", "repeat_batch"]


class RepeatedKV(CompressedKV):
    """A :class:`CompressedKV` with a repeated dimension, which owns nothing and refers to the view it repeats.

    With ``inserted`` it has one dimension more than its base, beside the batch rows or, in the usual layout, before the
    sequence: ``[B, Hkv, times, L, D]`` for ``inserted == 2``. Without, it is ``[B, Hkv * times, L, D]``, each KV head
    ``times`` times in a row: what grouped-query attention without ``enable_gqa`` passes to the attention.

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

        The latter has the same shape without the last dimension, or is the base's if that has an unusual layout.
        """
        dim = 1 if self.inserted is None else self.inserted
        entries, held = self.base.dense(fill)
        if self.inserted is None:
            return entries.repeat_interleave(self.times, dim), held.repeat_interleave(self.times, dim)
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
    if usual is not None:
        return _make(usual, times, None) if dim == 1 else NotImplemented
    base = _without(view, dim)
    if base is None or base.axes.batch_dim is None:
        return NotImplemented
    places = (base.axes.batch_dim, base.axes.batch_dim + 1, *((2,) if base.axes is STANDARD else ()))
    return _make(base, times, dim) if dim in places else NotImplemented


def merge_dims(view: RepeatedKV, size: Sequence[int]) -> Any:
    """``reshape`` that merges the inserted dimension into batch or heads; ``NotImplemented`` for any other."""
    base, times, dim = view.base, view.times, view.inserted
    wanted, known = list(size), list(view.shape)
    if wanted.count(-1) == 1:
        rest = math.prod(extent for extent in wanted if extent != -1)
        wanted[wanted.index(-1)] = view.numel() // max(rest, 1)
    if wanted == known:
        return copy_repeated(view)
    rows = base.axes.batch_dim
    if dim is None or rows is None:
        return NotImplemented
    at = dim if dim == rows else dim - 1
    merged = [*known[:at], known[at] * known[at + 1], *known[at + 2 :]]
    if wanted != merged:
        return NotImplemented
    return repeat_batch(base, times, interleave=dim != rows) if at == rows else _make(base, times, None)


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
