"""What operations mean on a compressed cache: dense under fake tensors, exact or refused in eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from adakv_compile.runtime import arrange, changes
from adakv_compile.runtime.attention import attend
from adakv_compile.runtime.compressed import CompressedKV, storeless
from adakv_compile.runtime.errors import CacheMismatchError, UnsupportedCacheOperation
from adakv_compile.runtime.layout import STANDARD
from adakv_compile.runtime.repeated import RepeatedKV, copy_repeated, expand, merge_dims, rearrange

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
    handler = (_ON_REPEATED if isinstance(first, RepeatedKV) else _ON_VIEW).get(func)
    if func in _ATTENTION:
        result = _attention(func, args, kwargs)
    elif handler is None:
        result = func.decompose(*args, **kwargs)  # NotImplemented unless it is composed of other operations
    elif isinstance(first, CompressedKV) or func in _ON_SEVERAL:
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


# Attention


def _with_heads(view: CompressedKV) -> CompressedKV | None:
    """Return a view as ``[B, H, L, D]``, its heads perhaps repeated; None if it isn't that."""
    if isinstance(view, RepeatedKV):
        return view if view.inserted is None and view.base.axes is STANDARD else None
    return arrange.as_standard(view)


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
    usual = [_with_heads(view) for view in (key, value)]
    if query.dim() != 4 or usual[0] is None or usual[1] is None:
        return NotImplemented
    mask = given.get("attn_mask", given.get("attn_bias"))
    out = attend(
        query,
        usual[0],
        usual[1],
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


# Tables

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

_ON_SEVERAL: Final = frozenset({aten.cat.default, aten.stack.default})

_ON_VIEW: Final[Mapping[Any, Handler]] = {
    aten._to_copy.default: changes.to_copy,
    aten._unsafe_view.default: arrange.reshape,
    aten.alias.default: changes.same,
    aten.cat.default: changes.cat,
    aten.clone.default: changes.same,
    aten.detach.default: changes.same,
    aten.expand.default: expand,
    aten.index.Tensor: changes.index_rows,
    aten.index_select.default: changes.select_rows,
    aten.permute.default: arrange.permute,
    aten.repeat.default: changes.repeat,
    aten.select.int: arrange.select,
    aten.slice.Tensor: changes.slice_dim,
    aten.split.Tensor: changes.split,
    aten.split_with_sizes.default: changes.split,
    aten.squeeze.default: arrange.squeeze_all,
    aten.squeeze.dim: arrange.squeeze,
    aten.squeeze.dims: arrange.squeeze_dims,
    aten.stack.default: changes.stack,
    aten.t.default: arrange.transpose_matrix,
    aten.transpose.int: arrange.transpose,
    aten.unbind.int: arrange.unbind,
    aten.unsqueeze.default: arrange.insert_dim,
    aten.view.default: arrange.reshape,
    aten.zero_.default: changes.zero,
}

_ON_REPEATED: Final[Mapping[Any, Handler]] = {
    aten._unsafe_view.default: merge_dims,
    aten.alias.default: copy_repeated,
    aten.clone.default: copy_repeated,
    aten.detach.default: copy_repeated,
    aten.permute.default: rearrange(arrange.permute),
    aten.transpose.int: rearrange(arrange.transpose),
    aten.view.default: merge_dims,
}
