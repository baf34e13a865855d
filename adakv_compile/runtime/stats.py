"""How much a conversation's KV cache holds, against what a dense one would."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Final, TypeGuard, cast

import torch
from torch import Tensor

from adakv_compile.runtime.compressed import CompressedKV, make_view
from adakv_compile.runtime.side import attached
from adakv_compile.runtime.store import LayerStore

__all__ = ["CacheStats", "LayerStats", "cache_stats"]

_MIB: Final = 2**20
_ROW: Final = "{:>5}  {:>10}  {:>8}  {:>8}  {:>8}  {:>10}  {:>10}"


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class LayerStats:
    """What one attention layer holds.

    Attributes:
        head_lengths: ``[B, Hkv]`` int64 on the CPU: entries of each head that can be attended to.
        logical_length: Tokens that the cache reports, in its shape.
        bytes_held: Bytes of keys, values and bookkeeping, allocated room for new tokens included.
        bytes_dense: Bytes of dense keys and values of the logical length.
        compressed: Whether attention reads a compressed cache: the layer's cache is a :class:`CompressedKV`, or one was
            kept beside its preallocated buffers.
        bytes_beside: Bytes, among those held, of what was kept beside preallocated buffers: attention reads these in
            place of the buffers, which stay dense. Zero where there are no such buffers.
    """

    head_lengths: Tensor
    logical_length: int
    bytes_held: int
    bytes_dense: int
    compressed: bool
    bytes_beside: int = 0


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class CacheStats:
    """What a KV cache holds, layer by layer in the order they were found; ``str()`` is a page.

    Attributes:
        layers: One entry for each attention layer.
    """

    layers: tuple[LayerStats, ...]

    @property
    def bytes_held(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.bytes_held for layer in self.layers)

    @property
    def bytes_dense(self) -> int:
        """Bytes that dense tensors of the same logical shapes take."""
        return sum(layer.bytes_dense for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Bytes held over bytes dense; 0.25 means a quarter of the memory."""
        return self.bytes_held / self.bytes_dense if self.bytes_dense else 1.0

    def json(self) -> str:
        """Return everything as JSON text."""
        layers = [
            dataclasses.asdict(dataclasses.replace(layer, head_lengths=torch.empty(0)))
            | {"head_lengths": layer.head_lengths.tolist()}
            for layer in self.layers
        ]
        totals = {
            "bytes_held": self.bytes_held,
            "bytes_dense": self.bytes_dense,
            "ratio": self.ratio,
        }
        return json.dumps(totals | {"layers": layers})

    def __str__(self) -> str:
        compressed = sum(layer.compressed for layer in self.layers)
        lines = [
            f"KV cache: {compressed} of {len(self.layers)} layers compressed, {self.bytes_held / _MIB:.2f} MiB held,"
            f" {self.bytes_dense / _MIB:.2f} MiB dense ({self.ratio:.1%})",
            _ROW.format("layer", "tokens", "min/head", "mean", "max/head", "MiB held", "MiB dense"),
        ]
        for number, layer in enumerate(self.layers):
            lengths = layer.head_lengths
            some = lengths.numel() > 0
            row = _ROW.format(
                number,
                layer.logical_length,
                int(lengths.min()) if some else 0,
                f"{lengths.double().mean():.1f}" if some else 0,
                int(lengths.max()) if some else 0,
                f"{layer.bytes_held / _MIB:.3f}",
                f"{layer.bytes_dense / _MIB:.3f}",
            )
            lines.append(f"{row}{_remark(layer)}")
        return "\n".join(lines)


def _remark(layer: LayerStats) -> str:
    if layer.bytes_beside:
        buffers = (layer.bytes_held - layer.bytes_beside) / _MIB
        return f"  attention reads {layer.bytes_beside / _MIB:.3f} MiB beside buffers of {buffers:.3f} MiB, which stay"
    return "" if layer.compressed else "  dense"


def cache_stats(obj: object) -> CacheStats:
    """Report what the KV caches inside an object hold.

    Compressed layers are found wherever they are. Dense layers are found where caches keep them: attributes or keys
    named like ``keys`` and ``values``, and tuples of ``[B, H, L, D]`` tensors, keys and values in turn.

    Args:
        obj: Anything that holds a cache: a model output, a ``transformers`` cache, tuples, lists, dicts, a module that
            owns cache buffers.

    Returns:
        One entry for each layer, in the order found; a layer reachable in several ways is counted once.

    Raises:
        ValueError: There is no KV cache in the object.

    Example:
        >>> print(cache_stats(model(ids, use_cache=True)))  # doctest: +SKIP
    """
    layers = tuple(_layer(*pair) for pair in _find(obj))
    if not layers:
        raise ValueError(
            f"no KV cache found in {type(obj).__name__}: pass a model output with past_key_values (use_cache=True), the"
            " cache itself, or the module that owns the cache buffers"
        )
    return CacheStats(layers)


def _layer(key: Tensor | None, value: Tensor | None) -> LayerStats:
    if key is not None and value is not None and (side := attached(key, value)) is not None:
        return _beside_buffers(key, value, side.store)
    tensors = [tensor for tensor in (key, value) if tensor is not None]
    first = tensors[0]
    if isinstance(first, CompressedKV):
        views = [view for view in tensors if isinstance(view, CompressedKV)]
        # A pair stands in for the keys and for the values, each time with half of what it holds.
        shares = [2 if view.kind == "pair" else 1 for view in views]
        held = sum(view.nbytes_held // share for view, share in zip(views, shares, strict=True))
        dense = sum(view.nbytes_dense // share for view, share in zip(views, shares, strict=True))
        return LayerStats(first.head_lengths.cpu(), max(view.length for view in views), held, dense, compressed=True)
    length = max(tensor.shape[2] for tensor in tensors)
    dense = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    lengths = torch.full(first.shape[:2], length, dtype=torch.int64)
    return LayerStats(lengths, length, dense, dense, compressed=False)


def _beside_buffers(key: Tensor, value: Tensor, store: LayerStore) -> LayerStats:
    """Describe what was kept beside a layer's buffers."""
    entry = (store.key_dim + store.value_dim) * store.keys.itemsize
    return LayerStats(
        make_view(store, "key", store.length).head_lengths.cpu(),
        store.length,
        key.nbytes + value.nbytes + store.nbytes_held,
        store.batch * store.num_kv_heads * store.length * entry,
        compressed=True,
        bytes_beside=store.nbytes_held,
    )


# Finding caches


_NAMES: Final = (
    ("keys", "values"),
    ("key", "value"),
    ("key_cache", "value_cache"),
    ("k_cache", "v_cache"),
    ("cache_k", "cache_v"),
)
_NOT_CACHES: Final = ("attentions", "hidden_states", "logits", "_parameters")
_LEAVES: Final = (
    str,
    bytes,
    int,
    float,
    complex,
    type,
    ModuleType,
    FunctionType,
    torch.dtype,
    torch.device,
    Tensor,
)

_Pair = tuple[Tensor | None, Tensor | None]


def _find(obj: object) -> list[_Pair]:
    """Return the ``(keys, values)`` of every layer reachable from ``obj``, in depth-first order."""
    found: dict[tuple[int, ...], _Pair] = {}
    seen: dict[int, object] = {}  # the objects are kept alive, so that an id stays theirs
    stack: list[object] = [(obj,) if isinstance(obj, Tensor) else obj]
    while stack:
        item = stack.pop()
        if id(item) in seen or item is None or isinstance(item, _LEAVES):
            continue
        seen[id(item)] = item
        children = _children(item)
        for child in children.values():
            if isinstance(child, CompressedKV):
                _add_view(found, child)
        for pair in _dense_pairs(children):
            found.setdefault((id(pair[0]), id(pair[1])), pair)
        stack.extend(reversed(children.values()))
    return list(found.values())


def _add_view(found: dict[tuple[int, ...], _Pair], view: CompressedKV) -> None:
    name = (id(view.store),)
    key, value = found.get(name, (None, None))
    # Views of several lengths can share a store, and then share its memory: the longest stands for all.
    found[name] = (
        key if view.kind == "value" else _longest(key, view),
        value if view.kind == "key" else _longest(value, view),
    )


def _longest(known: Tensor | None, view: CompressedKV) -> CompressedKV:
    return known if isinstance(known, CompressedKV) and known.length >= view.length else view


def _children(item: object) -> dict[object, object]:
    if isinstance(item, Mapping):
        children: dict[object, object] = dict(cast("Mapping[object, object]", item))
    elif isinstance(item, (list, tuple, set, frozenset, deque)):
        return dict(enumerate(cast("Iterable[object]", item)))
    else:
        children = dict(getattr(item, "__dict__", {}))
        if dataclasses.is_dataclass(item):
            children |= {field.name: getattr(item, field.name, None) for field in dataclasses.fields(item)}
    return {name: child for name, child in children.items() if not str(name).endswith(_NOT_CACHES)}


def _dense_pairs(children: dict[object, object]) -> Iterator[tuple[Tensor, Tensor]]:
    for key_name, value_name in _NAMES:
        yield from _paired(children.get(key_name), children.get(value_name))
    in_turn = list(children.values())
    if children and all(isinstance(name, int) and _is_dense(child) for name, child in children.items()):
        for key, value in zip(in_turn[::2], in_turn[1::2], strict=False):
            yield from _paired(key, value)


def _paired(keys: object, values: object) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(keys, (list, tuple)) and isinstance(values, (list, tuple)):
        for key, value in zip(cast("Sequence[object]", keys), cast("Sequence[object]", values), strict=False):
            yield from _paired(key, value)
    elif _is_dense(keys) and _is_dense(values) and keys.shape[:3] == values.shape[:3]:
        yield keys, values


def _is_dense(value: object) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor)
        and not isinstance(value, CompressedKV)
        and value.dim() == 4
        and value.is_floating_point()
    )
