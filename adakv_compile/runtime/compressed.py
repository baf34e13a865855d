"""The tensor that stands in a model's cache slot: logical shape outside, only the kept entries inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Final, Literal, NoReturn

import torch
from torch import Tensor

from adakv_compile.runtime.errors import CacheError, UnsupportedCacheOperation
from adakv_compile.runtime.layout import STANDARD, Layout
from adakv_compile.runtime.pending import Pending
from adakv_compile.runtime.store import LayerStore

__all__ = ["CompressedKV", "Kind", "kept_positions", "make_view", "make_wrapper", "storeless"]

Kind = Literal["key", "value", "pair"]
"""A layer's keys, its values, or both in one tensor."""


class CompressedKV(torch.Tensor):
    """The keys or the values of one layer, or both, as a tensor of their logical shape: ``[B, Hkv, L, D]``.

    Decoders that cache in another layout (``[B, L, H, D]``, ``[B * H, D, L]``, keys and values in one tensor) get that;
    only the shape differs, never what is stored.

    It owns only what was kept: the rest of the logical tensor does not exist, and attention treats it as masked out.
    Everything computed from shapes (position ids, masks, ``get_seq_length``) is right as it is. Supported operations
    are what caches do: append by ``cat``, select or repeat batch rows, crop the newest tokens, drop the oldest, change
    device or dtype, copy, change the layout, and ``scaled_dot_product_attention``. Anything else raises
    :class:`~adakv_compile.runtime.errors.UnsupportedCacheOperation`.

    The views of a layer share a :class:`~adakv_compile.runtime.store.LayerStore` and still behave as independent
    tensors: a conversation that continues from an older view gets its own copy at its first append.

    Args:
        store: What the layer keeps.
        kind: Which of its two tensors this is, or that it is both.
        length: Logical length ``L`` in tokens; by default all tokens from ``start`` on.
        start: Position of logical slot 0; above 0 only for sliding-window layers, whose cache drops its oldest slots.
        layout: What the dimensions are; that of a pair for both tensors.

    Attributes:
        anchor: An empty tensor of this dtype and device: what Dynamo sees inside.
        kind: ``"key"``, ``"value"`` or ``"pair"``.
        start: Position of logical slot 0.
        length: Logical length ``L``.
        axes: The layout, as ``layout`` means something else in PyTorch; the one object ``STANDARD`` for
            ``[B, Hkv, L, D]``.
    """

    anchor: Tensor
    kind: Kind
    start: int
    length: int
    axes: Layout = STANDARD
    # Internal; read `store` and `pending`, which know where waiting entries went in the meantime.
    backing: LayerStore | None = None
    waiting: Pending | None = None

    # Opted out, else Dynamo traces __torch_function__ for every use of the cache.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType, reportPrivateUsage]

    def __new__(
        cls, store: LayerStore, kind: Kind, length: int | None = None, start: int = 0, layout: Layout = STANDARD
    ) -> CompressedKV:
        """Return a view of ``store``; see the class."""
        length = store.length - start if length is None else length
        fits = layout.is_pair == (kind == "pair") and (kind != "pair" or store.key_dim == store.value_dim)
        known = kind in ("key", "value", "pair") and fits
        if not known or start < 0 or not store.prefix_length <= start + length <= store.length:
            raise ValueError(
                f"{kind!r} of {length} tokens from position {start} on, as {layout}, is not a view of {store!r}"
            )
        return make_view(store, kind, length, start, layout=layout)

    # What a user may ask

    @property
    def store(self) -> LayerStore:
        """The layer's entries, shared by its key view and value view.

        Raises:
            CacheError: This tensor has none: it is a compiler's stand-in, or the output of a graph that another
                backend compiled.
        """
        pending = self.waiting
        if pending is not None and pending.store is not None and self.start >= pending.floor:
            self.backing, self.waiting = pending.store, None
        if self.backing is None:
            raise CacheError(
                f"A CompressedKV of shape {list(self.shape)} holds no entries: a function compiled by another backend"
                " returned it. Compile what handles the cache with backend='adakv', or leave it in eager mode."
            )
        return self.backing

    @property
    def tail_length(self) -> int:
        """Entries of the store's tail that this view sees, without those still pending."""
        seen = self.start + self.length - self.store.prefix_length
        return seen if self.waiting is None else min(seen, self.waiting.base)

    @property
    def pending(self) -> Tensor | None:
        """``[B, Hkv, T, D]`` entries appended in eager mode and not yet in the store, or None; a pair has none."""
        base = self.store.prefix_length  # settles what was written meanwhile
        if self.waiting is None:
            return None
        count = self.start + self.length - base - self.waiting.base
        return self.waiting.entries[:, :, :count] if count > 0 else None

    @property
    def head_lengths(self) -> Tensor:
        """``[B, Hkv]`` int64: entries of each head that can be attended to, kept ones and appended ones."""
        store = self.store
        appended = self.start + self.length - max(store.prefix_length, self.start)
        if self.start == 0:
            return store.offsets.diff(dim=1).to(torch.int64) + appended
        positions, valid = kept_positions(store)
        return (valid & (positions >= self.start)).sum(-1) + appended

    def positions(self, batch: int, head: int) -> Tensor:
        """Return ``[n]`` int64: the logical slots, in ascending order, that a head of a row still holds.

        Args:
            batch: Row of the batch.
            head: KV head.
        """
        store = self.store
        first, last = (int(bound) for bound in store.offsets[batch, head : head + 2])
        kept = store.positions[batch, first:last].to(torch.int64)
        end = self.start + self.length
        tail = torch.arange(store.prefix_length, end, device=kept.device)
        slots = torch.cat([kept, tail]) - self.start
        return slots[slots >= 0]

    @property
    def nbytes_held(self) -> int:
        """Bytes of this tensor's own entries, tail allocation included, plus half of what K and V share."""
        store = self.store
        if self.kind == "pair":
            return store.nbytes_held
        own = (store.keys, store.tail_keys) if self.kind == "key" else (store.values, store.tail_values)
        waiting = 0 if self.waiting is None else self.waiting.entries.nbytes
        return own[0].nbytes + own[1].nbytes + store.bookkeeping_bytes // 2 + waiting

    @property
    def nbytes_dense(self) -> int:
        """Bytes that the dense tensor of this shape takes."""
        return self.numel() * self.itemsize

    def dense(self, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the dense tensor, in this layout, and ``[B, Hkv, L]`` bool: which slots are held.

        Args:
            fill: What stands in the slots that were evicted.
        """
        from adakv_compile.runtime.attention import densify

        return densify(self, fill)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        shape = f"shape={list(self.shape)}, dtype={self.dtype}, device={self.device}"
        if self.backing is None:
            return f"CompressedKV({shape}, no entries)"
        store = self.store
        kept = f"kept={store.keys.shape[1]}, appended={self.start + self.length - store.prefix_length}"
        layout = "" if self.axes is STANDARD else f"layout={self.axes}, "
        return f"CompressedKV({self.kind}, {shape}, {layout}start={self.start}, {kept})"

    # Ways around __torch_dispatch__ to memory that doesn't exist

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedCacheOperation(
            f"{what} of {self!r}: most of this tensor was evicted and has no memory. Take .dense() of it."
        )

    def numpy(self, *, force: bool = False) -> NoReturn:
        """Refuse: there is no array of this shape."""
        self._refuse("numpy()")

    def tolist(self) -> NoReturn:
        """Refuse: there are no such values."""
        self._refuse("tolist()")

    def data_ptr(self) -> NoReturn:
        """Refuse: there is no memory of this shape."""
        self._refuse("data_ptr()")

    def __dlpack__(self, *args: object, **kwargs: object) -> NoReturn:
        self._refuse("__dlpack__()")

    @property
    def data(self) -> Tensor:
        """The same entries, detached; can't be assigned."""
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        self._refuse("Assignment to .data")

    # Copying

    def like(self, store: LayerStore, pending: Tensor | None) -> CompressedKV:
        """Return this view over another store with the same positions, and other pending entries."""
        waiting = None if pending is None else Pending(pending, self.tail_length)
        return make_view(store, self.kind, self.length, self.start, waiting, self.axes)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedKV:
        if id(self) in memo:
            return memo[id(self)]
        store = copy.deepcopy(self.store, memo)
        pending = copy.deepcopy(self.waiting, memo)
        copied = make_view(store, self.kind, self.length, self.start, pending, self.axes)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[..., CompressedKV], tuple[Any, ...]]:
        store, pending = self.store, self.pending
        return _unpickle, (store, self.kind, self.length, self.start, pending, self.tail_length, self.axes.dims)

    # Dynamo's protocol for tensor subclasses

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, ...]]:
        # Guarded: a graph is made for one layout. Plain strings, which a step compares for every view.
        return ["anchor"], self.axes.dims

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: tuple[str, ...], outer_size: Any, outer_stride: Any
    ) -> CompressedKV:
        return storeless(inner["anchor"], outer_size, _layout(context))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from adakv_compile.runtime.eager import dispatch

        return dispatch(func, args, kwargs or {})


make_wrapper: Final[Callable[..., Any]] = torch.Tensor._make_wrapper_subclass  # pyright: ignore[reportPrivateUsage]


def make_view(
    store: LayerStore,
    kind: Kind,
    length: int,
    start: int = 0,
    pending: Pending | None = None,
    layout: Layout = STANDARD,
) -> CompressedKV:
    """Return a view of ``store``; a decode step of a 32-layer model makes 64 of these, so nothing is checked."""
    anchor = store.anchor
    dim = store.value_dim if kind == "value" else store.key_dim
    batch, heads = store.batch, store.num_kv_heads
    shape = (batch, heads, length, dim) if layout is STANDARD else layout.shape(batch, heads, length, dim)
    # Without keywords, which cost a quarter more: sizes, strides, offset, memory format, dtype, layout, device.
    view = make_wrapper(CompressedKV, shape, None, None, None, store.dtype, torch.strided, store.device)
    view.anchor = anchor
    view.backing = store
    view.kind = kind
    view.start = start
    view.length = length
    # What torch._dynamo.maybe_mark_dynamic writes: one graph serves all lengths from the first one on. Without the flag
    # that it writes besides: tracing reads the indices alone, and the flag has every guard look up five attributes to
    # find what the type and the layout say already.
    view._dynamo_weak_dynamic_indices = {2}
    if layout is not STANDARD:
        view.axes = STANDARD if layout.dims == STANDARD.dims else layout
        view._dynamo_weak_dynamic_indices = {layout.sequence_dim}
    if pending is not None:
        view.waiting = pending
    return view


def storeless(anchor: Tensor, shape: Any, layout: Layout = STANDARD) -> CompressedKV:
    """Return a view of nothing, which has a shape, a dtype and a device: what a compiler traces with."""
    view = make_wrapper(CompressedKV, shape, dtype=anchor.dtype, device=anchor.device)
    view.anchor = anchor
    if layout is not STANDARD:
        view.axes = layout
    return view


def kept_positions(store: LayerStore) -> tuple[Tensor, Tensor]:
    """Return ``[B, Hkv, M]`` int64 positions of the kept entries, padded to the longest head, and which are real."""
    starts = store.offsets[:, :-1].to(torch.int64)
    lengths = store.offsets.diff(dim=1)
    longest = int(lengths.max()) if lengths.numel() else 0
    column = torch.arange(longest, device=starts.device)
    valid = column < lengths[..., None]
    index = torch.where(valid, starts[..., None] + column, 0)
    gathered = store.positions.gather(1, index.flatten(1)).view_as(index) if longest else index
    return gathered.to(torch.int64), valid


def _unpickle(
    store: LayerStore,
    kind: Kind,
    length: int,
    start: int,
    pending: Tensor | None,
    base: int,
    dims: tuple[str, ...] = STANDARD.dims,
) -> CompressedKV:
    waiting = None if pending is None else Pending(pending, base)
    return make_view(store, kind, length, start, waiting, _layout(dims))


def _layout(dims: tuple[str, ...]) -> Layout:
    """Return the layout of these dimensions, the usual one as the one object that views are compared with."""
    return STANDARD if dims == STANDARD.dims else Layout(dims)
