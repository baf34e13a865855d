"""What operations mean on a compressed cache: dense under fake tensors, exact or refused in eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor

from adakv_compile.runtime.attention import attend
from adakv_compile.runtime.compressed import CompressedKV, make_view, storeless
from adakv_compile.runtime.errors import CacheMismatchError, CropError, UnsupportedCacheOperation
from adakv_compile.runtime.layout import STANDARD
from adakv_compile.runtime.pending import Pending
from adakv_compile.runtime.repeated import (
    RepeatedKV,
    copy_repeated,
    expand,
    insert_dim,
    merge_dims,
    repeat_batch,
)
from adakv_compile.runtime.store import take_rows

__all__ = ["dispatch"]

Handler = Callable[..., Any]

aten: Final = torch.ops.aten


def dispatch(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation that has a :class:`CompressedKV` among its arguments.

    Raises:
        UnsupportedCacheOperation: Only a dense tensor can do it.
    """
    views = list(_views((args, tuple(kwargs.values()))))
    if any(type(view.anchor) is not Tensor for view in views):
        return _traced(func, args, kwargs)
    first = args[0] if args else None
    if func not in _ANY_LAYOUT and any(view.axes is not STANDARD for view in views):
        raise _unsupported(func, views[0])
    if func in _ATTENTION:
        return _attention(func, args, kwargs)
    handler = (_ON_REPEATED if isinstance(first, RepeatedKV) else _ON_VIEW).get(func)
    if handler is None:
        result = func.decompose(*args, **kwargs)  # NotImplemented unless it is composed of other operations
    elif isinstance(first, CompressedKV) or handler is _cat:
        result = handler(*args, **kwargs)
    else:
        result = NotImplemented
    if result is NotImplemented:
        raise _unsupported(func, views[0])
    return result


def _views(value: Any) -> Iterator[CompressedKV]:
    if isinstance(value, CompressedKV):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _views(item)


# Under fake tensors


def _traced(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Behave as the dense tensor of the logical shape, for Dynamo: it never runs what it traces."""
    from adakv_compile._torch import is_fake

    first = args[0]
    if func in (aten.detach.default, aten.alias.default):
        return storeless(first.anchor, first.shape, first.axes)

    def dense(value: Any) -> Any:
        if isinstance(value, CompressedKV):
            if not is_fake(value.anchor):
                # AOTAutograd traces so, and what it traces is run: on tensors that nobody filled.
                raise _unsupported(func, value, "in a graph compiled by another backend than 'adakv'")
            return value.anchor.new_empty(value.shape)
        if isinstance(value, (list, tuple)):
            return [dense(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
        return value

    return func(*dense(args), **{name: dense(value) for name, value in kwargs.items()})


# Refusals


def _unsupported(func: Any, view: CompressedKV, where: str = "in eager mode") -> UnsupportedCacheOperation:
    advice = (
        "compile the code that does this with backend='adakv', use attn_implementation='sdpa' (under"
        " torch.inference_mode() if PyTorch picks its composed attention), or take .dense() of the cache"
    )
    return UnsupportedCacheOperation(
        f"{func} {where} on {view!r}: most of this tensor was evicted, so only cache operations are possible."
        f" Instead {advice}."
    )


def _dim(dim: int) -> int:
    return dim + 4 if dim < 0 else dim


# Appending


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    # Caches start from torch.tensor([]), which torch.cat ignores for historical reasons.
    tensors = [tensor for tensor in tensors if tensor.shape != (0,)]
    view, new = tensors[0], tensors[1:]
    if type(view) is not CompressedKV or _dim(dim) != 2 or any(isinstance(item, CompressedKV) for item in new):
        return NotImplemented
    wanted = (*view.shape[:2], view.shape[3])
    for item in new:
        given = (*item.shape[:2], *item.shape[3:])
        if item.dim() != 4 or given != wanted or item.dtype != view.dtype or item.device != view.device:
            raise CacheMismatchError(
                f"cat of {view!r} with new entries of shape {list(item.shape)}, {item.dtype}, {item.device}: they must"
                " have the cache's batch, heads, head dimension, dtype and device. Was the cache made by another model?"
            )
    new = [item.detach() for item in new if item.shape[2]]
    if not new:
        return _same(view)
    added = sum(item.shape[2] for item in new)
    before = view.pending
    # cat copies, so that the caller may overwrite its tensors before the attention.
    pending = Pending(torch.cat(new if before is None else [before, *new], dim=2), view.tail_length)
    return make_view(view.store, view.kind, view.shape[2] + added, view.start, pending)


# Copies: views never change what they share, so a copy is another view


def _same(self: CompressedKV, **_: Any) -> CompressedKV:
    return make_view(self.store, self.kind, self.length, self.start, self.waiting, self.axes)


def _to_copy(
    self: CompressedKV,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **_: Any,
) -> Any:
    dtype = dtype or self.dtype
    device = device or self.device
    if not dtype.is_floating_point or device.type == "meta":
        return NotImplemented
    if dtype == self.dtype and device == self.device:
        return _same(self)
    pending = self.pending
    if pending is not None:
        pending = pending.to(device, dtype)
    store = self.store.to(device, dtype, non_blocking=non_blocking, tail_length=self.tail_length)
    return self.like(store, pending)


def _zero(self: CompressedKV) -> CompressedKV:
    # A cache is zeroed to be used again from the beginning. Zero keys would still get attention; no entries get none.
    self.backing, self.waiting = self.store.emptied(self.start + self.length), None
    return self


# Batch rows


def _rows(view: CompressedKV, index: Tensor | slice) -> CompressedKV:
    pending = view.pending
    if pending is not None:
        pending = take_rows(pending, index)
    return view.like(view.store.select_rows(index, view.tail_length), pending)


def _index_select(self: CompressedKV, dim: int, index: Tensor) -> Any:
    return _rows(self, index) if _dim(dim) == 0 and index.dim() == 1 else NotImplemented


def _index(self: CompressedKV, indices: Sequence[Tensor | None]) -> Any:
    index = indices[0] if indices else None
    if index is None or index.dim() != 1 or any(other is not None for other in indices[1:]):
        return NotImplemented
    if index.dtype in (torch.bool, torch.uint8):
        if index.shape[0] != self.shape[0]:
            raise IndexError(f"a mask of {index.shape[0]} rows on {self!r}")
        return _rows(self, index.nonzero()[:, 0])
    return _rows(self, torch.where(index < 0, index + self.shape[0], index))


def _repeat(self: CompressedKV, repeats: Sequence[int]) -> Any:
    if len(repeats) != 4 or tuple(repeats[1:]) != (1, 1, 1) or repeats[0] < 1:
        return NotImplemented
    return repeat_batch(self, repeats[0], interleave=False)


def _split(self: CompressedKV, split_size: int | Sequence[int], dim: int = 0) -> Any:
    if _dim(dim) != 0:
        return NotImplemented
    rows = self.shape[0]
    sizes = (
        [min(split_size, rows - at) for at in range(0, rows, split_size)]
        if isinstance(split_size, int)
        else list(split_size)
    )
    bounds = [sum(sizes[:at]) for at in range(len(sizes) + 1)]
    if bounds[-1] != rows:
        return NotImplemented
    return [_rows(self, slice(low, high)) for low, high in pairwise(bounds)]


# Slices


def _slice(
    self: CompressedKV,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    dim = _dim(dim)
    low, high, _ = slice(start, end, step).indices(self.shape[dim])
    if (low, step) == (0, 1) and high == self.shape[dim]:
        return _same(self)
    if dim == 0:
        return _rows(self, slice(low, high, step))
    if dim != 2 or step != 1:
        return NotImplemented
    return _crop(self, low, max(low, high))


def _crop(view: CompressedKV, low: int, high: int) -> CompressedKV:
    """Keep the logical slots ``low`` to ``high``."""
    store, start, end = view.store, view.start + low, view.start + high
    if end >= store.prefix_length:
        pending = view.waiting
        if pending is not None and end <= store.prefix_length + pending.base:
            pending = None
        return make_view(store, view.kind, high - low, start, pending)
    if low == high:
        return make_view(store.emptied(end), view.kind, 0, start)
    if store.is_complete:
        return make_view(store.truncate(end), view.kind, high - low, start)
    removed, crops = view.shape[2] - high, view.start + view.shape[2] - store.prefix_length
    raise CropError(
        f"Removing the newest {removed} tokens from {view!r}: only the {crops} tokens appended since the last eviction"
        f" can be removed, because some entries of the {store.prefix_length} before them no longer exist. Remove fewer"
        " tokens, deepcopy the cache before going past the point to return to, or run the shorter prompt again."
    )


# Tables


def _attention(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run any of the fused attentions that ``scaled_dot_product_attention`` may have been turned into."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    query, key, value = given["query"], given["key"], given["value"]
    if isinstance(query, CompressedKV) or not isinstance(key, CompressedKV) or not isinstance(value, CompressedKV):
        raise CacheMismatchError(
            "Attention over keys and values of which only one is compressed, or with a compressed query: keys"
            f" {key!r}, values of shape {list(value.shape)}. Pass the cache that the model returned, unmixed."
        )
    mask = given.get("attn_mask", given.get("attn_bias"))
    out = attend(
        query,
        key,
        value,
        mask,
        given.get("dropout_p", 0.0),
        given.get("is_causal", False),
        given.get("scale"),
    )
    returns = func._schema.returns
    if len(returns) == 1:
        return out
    # The others (log-sum-exp, random state) are for a backward, which fails on the compressed keys in any case.
    rest = [query.new_empty(0) if isinstance(kind.type, torch.TensorType) else 0 for kind in returns[1:]]
    return (out, *rest)


_ATTENTION: Final = frozenset(
    {
        aten.scaled_dot_product_attention.default,
        aten._scaled_dot_product_attention_math.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_fused_attention_overrideable.default,
    }
)

_ANY_LAYOUT: Final = frozenset(
    {aten._to_copy.default, aten.alias.default, aten.clone.default, aten.detach.default, aten.zero_.default}
)

_ON_VIEW: Final[Mapping[Any, Handler]] = {
    aten._to_copy.default: _to_copy,
    aten.alias.default: _same,
    aten.cat.default: _cat,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.repeat.default: _repeat,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unsqueeze.default: insert_dim,
    aten.zero_.default: _zero,
}

_ON_REPEATED: Final[Mapping[Any, Handler]] = {
    aten._unsafe_view.default: merge_dims,
    aten.alias.default: copy_repeated,
    aten.clone.default: copy_repeated,
    aten.detach.default: copy_repeated,
    aten.expand.default: expand,
    aten.view.default: merge_dims,
}
