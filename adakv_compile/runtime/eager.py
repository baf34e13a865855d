"""What operations mean on a compressed cache: dense under fake tensors, exact or refused in eager mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from adakv_compile.runtime.compressed import CompressedKV, make_view, storeless
from adakv_compile.runtime.errors import UnsupportedCacheOperation

__all__ = ["densify", "dispatch"]

aten = torch.ops.aten


def dispatch(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation that has a :class:`CompressedKV` among its arguments."""
    first = args[0] if args else None
    if isinstance(first, CompressedKV) and func in (aten.detach.default, aten.alias.default):
        if first._store is None:
            return storeless(first.anchor, first.shape)
        return make_view(first._store, first._kind, first._length, first._start, first._pending)
    dense = _Dense()
    args, kwargs = dense(args), dense(dict(kwargs))
    return func(*args, **kwargs)


class _Dense:
    def __call__(self, value: Any) -> Any:
        if isinstance(value, CompressedKV):
            if type(value.anchor) is Tensor:
                raise UnsupportedCacheOperation("eager")
            return value.anchor.new_empty(value.shape)
        if isinstance(value, (list, tuple)):
            return type(value)(self(v) for v in value)
        if isinstance(value, dict):
            return {k: self(v) for k, v in value.items()}
        return value


def densify(view: CompressedKV, fill: float) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
