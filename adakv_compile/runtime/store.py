"""The entries that one attention layer keeps, shared by the layer's key view and value view."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from adakv_compile.runtime.tail import Tail, new_cursor, new_tail, roomy

__all__ = ["STORE_TENSORS", "LayerStore", "repeat_rows", "take_rows"]

STORE_TENSORS: Final = ("keys", "values", "offsets", "positions", "tail_keys", "tail_values", "cursor")
"""The fields of a store that are tensors, in the order of :attr:`LayerStore.parts`."""

_Prefix = tuple[Tensor, Tensor, Tensor, Tensor]
"""Keys, values, offsets, positions."""


class LayerStore:
    """One layer's kept entries (the prefix, never mutated) and the entries appended since (the tail).

    The tail is append-only: entries in use are never rewritten, moved or dropped. That is what lets any number of views
    of different lengths share a store. A view that is not the newest one continues on a :meth:`fork`.

    Attributes:
        keys: ``[B, N, Dk]``, heads back to back, ascending position inside a head.
        values: ``[B, N, Dv]``, same order, dtype and device.
        offsets: ``[B, Hkv + 1]`` int32; head ``h`` of row ``b`` is ``keys[b, offsets[b, h]:offsets[b, h + 1]]``.
            Entries past ``offsets[b, -1]`` are never read.
        positions: ``[B, N]`` int32, logical position of every entry.
        tail_keys: ``[B, Hkv, C, Dk]``; tail entry ``i`` has position ``prefix_length + i``.
        tail_values: ``[B, Hkv, C, Dv]``.
        cursor: ``[CURSOR_SIZE]`` int32 on the device: tail entries in use, position of tail entry 0, and counters of
            the kernels, zero between calls.
        tail_length: Host mirror of ``cursor[0]``.
        prefix_length: Host mirror of ``cursor[1]``.
        capacity: ``C``.
        parts: All tensors, in the order of ``STORE_TENSORS``.
        anchor: An empty tensor of the entries' dtype and device, which the views hand to Dynamo.
        dtype: Of the entries, on ``device``.
        entries: ``N``.
        batch: ``B``.
        num_kv_heads: ``Hkv``.
        key_dim: ``Dk``.
        value_dim: ``Dv``.
    """

    __slots__ = (
        "__weakref__",
        "_derived",
        "anchor",
        "batch",
        "capacity",
        "cursor",
        "device",
        "dtype",
        "entries",
        "key_dim",
        "keys",
        "num_kv_heads",
        "offsets",
        "parts",
        "positions",
        "prefix_length",
        "tail_keys",
        "tail_length",
        "tail_values",
        "value_dim",
        "values",
    )

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        offsets: Tensor,
        positions: Tensor,
        tail_keys: Tensor,
        tail_values: Tensor,
        cursor: Tensor,
        tail_length: int,
        prefix_length: int,
    ) -> None:
        self.keys = keys
        self.values = values
        self.offsets = offsets
        self.positions = positions
        self.tail_keys = tail_keys
        self.tail_values = tail_values
        self.cursor = cursor
        self.tail_length = tail_length
        self.prefix_length = prefix_length
        # Plain integers, because every decode step reads them and Tensor.shape costs more than the step's checks.
        self.batch: int = keys.shape[0]
        self.entries: int = keys.shape[1]
        self.num_kv_heads: int = offsets.shape[1] - 1
        self.key_dim: int = keys.shape[2]
        self.value_dim: int = values.shape[2]
        self.capacity: int = tail_keys.shape[2]
        self.dtype, self.device = keys.dtype, keys.device
        self.anchor = keys.new_empty(0)
        self.parts = (keys, values, offsets, positions, tail_keys, tail_values, cursor)
        self._derived: list[tuple[_Request, weakref.ref[LayerStore]]] = []

    @classmethod
    def sealed(cls, keys: Tensor, values: Tensor, offsets: Tensor, positions: Tensor, length: int) -> LayerStore:
        """Return a store of what an eviction at logical length ``length`` kept, with an empty tail.

        Args:
            keys: ``[B, N, Dk]``.
            values: ``[B, N, Dv]``.
            offsets: ``[B, Hkv + 1]`` int32.
            positions: ``[B, N]`` int32.
            length: Tokens seen at the eviction, which is the position of the next one.
        """
        heads = offsets.shape[1] - 1
        tail_keys = new_tail(keys, heads, 0)
        tail_values = new_tail(values, heads, 0)
        cursor = new_cursor(0, length, keys.device)
        return cls(keys, values, offsets, positions, tail_keys, tail_values, cursor, 0, length)

    @property
    def length(self) -> int:
        """Tokens seen, from position 0: the position of the next one."""
        return self.prefix_length + self.tail_length

    @property
    def bookkeeping_bytes(self) -> int:
        """Bytes of offsets, positions and cursor, which keys and values share."""
        return self.offsets.nbytes + self.positions.nbytes + self.cursor.nbytes

    @property
    def nbytes_held(self) -> int:
        """Bytes this layer holds: prefix, bookkeeping and the whole allocated tail."""
        return sum(part.nbytes for part in self.parts)

    def __repr__(self) -> str:
        return (
            f"LayerStore(batch={self.batch}, num_kv_heads={self.num_kv_heads},"
            f" entries={self.keys.shape[1]}, prefix_length={self.prefix_length},"
            f" tail_length={self.tail_length}, capacity={self.capacity},"
            f" dtype={self.keys.dtype}, device={self.keys.device})"
        )

    # Growing: the only methods that change a store.

    def reserve(self, extra: int) -> None:
        """Make room for ``extra`` more tail entries; only the used part of the tail is copied.

        Raises:
            TailGrowthError: There is no memory, not even for exactly the entries needed. The store is unchanged.
        """
        if self.tail_length + extra <= self.capacity:
            return
        self.tail_keys, self.tail_values = tail = roomy(self._used_tail(0, self.tail_length), extra)
        self.capacity = self.tail_keys.shape[2]
        self.parts = (*self._prefix, *tail, self.cursor)

    def advance(self, count: int) -> None:
        """Follow on the host an append of ``count`` entries that an operation made on the device."""
        self.tail_length += count

    def rewind(self) -> None:
        """Forget on the device an append that failed half-way, before :meth:`advance`: rewrite the cursor."""
        self.cursor.zero_()
        self.cursor[0].fill_(self.tail_length)
        self.cursor[1].fill_(self.prefix_length)

    @torch.no_grad()
    def append(self, new_keys: Tensor, new_values: Tensor) -> None:
        """Append ``[B, Hkv, T, Dk]`` and ``[B, Hkv, T, Dv]`` to the tail, both or neither.

        Raises:
            TailGrowthError: There is no memory for them. The store is unchanged.
        """
        count = new_keys.shape[2]
        self.reserve(count)
        here = slice(self.tail_length, self.tail_length + count)
        self.tail_keys[:, :, here].copy_(new_keys)
        self.tail_values[:, :, here].copy_(new_values)
        self.cursor[0].add_(count)
        self.tail_length += count

    # Deriving: each returns another store, this one stays as it is.

    def fork(self, tail_length: int, extra: int = 1) -> LayerStore:
        """Return a store that shares the prefix and owns a copy of the first ``tail_length`` tail entries.

        Args:
            tail_length: Tail entries to keep, at most this store's own.
            extra: Entries there must be room for beyond these.
        """
        return self._with_tail(0, tail_length, extra)

    def without_oldest(self, position: int, tail_length: int, extra: int = 1) -> LayerStore:
        """Return a fork whose tail starts at ``position``: what a sliding window has left behind is released.

        The prefix is shared, not cut: its tensors keep the shapes a compiled graph was made for, and the window hides
        them.
        """
        return self._with_tail(position - self.prefix_length, tail_length, extra)

    def select_rows(self, index: Tensor | slice, tail_length: int | None = None) -> LayerStore:
        """Return a store of the given batch rows (beam reordering, batch selection or repetition).

        Asked again for the same rows it answers the same store while that is alive: a layer's key view and value view
        are indexed one after the other and must still share a store afterwards. This holds for every derivation below.

        Args:
            index: ``[B']`` integer rows, or a slice of rows.
            tail_length: Tail entries to carry over; all of them by default.

        Raises:
            IndexError: A row is out of range.
        """

        def rows(tensor: Tensor) -> Tensor:
            return take_rows(tensor, index)

        return self._derive("rows", index, tail_length, rows, rows)

    def repeat_rows(self, times: int, *, interleave: bool, tail_length: int | None = None) -> LayerStore:
        """Return a store of every row ``times`` times: row by row (``interleave``), or all rows over again."""

        def repeated(tensor: Tensor) -> Tensor:
            return repeat_rows(tensor, times, interleave=interleave)

        return self._derive("repeat", (times, interleave), tail_length, repeated, repeated)

    def to(
        self,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
        tail_length: int | None = None,
    ) -> LayerStore:
        """Return a store on another device, or with entries of another floating dtype."""

        def entries(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype or tensor.dtype, non_blocking=non_blocking)

        def indices(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return self._derive("to", (device, dtype), tail_length, entries, indices)

    def truncate(self, length: int) -> LayerStore:
        """Return a store of the first ``length`` positions, inside a prefix from which nothing was evicted.

        Raises:
            ValueError: :attr:`is_complete` is false, or ``length`` is past the prefix.
        """
        if length > self.prefix_length or not self.is_complete:
            raise ValueError(f"{self!r} can't be cut to {length} tokens")

        def cut(tensor: Tensor) -> Tensor:
            by_head = tensor.unflatten(1, (self.num_kv_heads, self.prefix_length))
            return by_head[:, :, :length].flatten(1, 2)

        def build() -> LayerStore:
            heads = torch.arange(self.num_kv_heads + 1, dtype=torch.int32, device=self.offsets.device)
            offsets = (heads * length).expand(self.batch, -1).contiguous()
            return LayerStore.sealed(cut(self.keys), cut(self.values), offsets, cut(self.positions), length)

        return self._remember(_Request("truncate", length, 0), build)

    def emptied(self, length: int) -> LayerStore:
        """Return a store that holds nothing and whose next token has position ``length``."""

        def build() -> LayerStore:
            keys, values, positions = (part[:, :0].clone() for part in (self.keys, self.values, self.positions))
            return LayerStore.sealed(keys, values, torch.zeros_like(self.offsets), positions, length)

        return self._remember(_Request("emptied", length, 0), build)

    def clone(self) -> LayerStore:
        """Return a store with its own copy of everything, the tail cut to what is used."""
        prefix = (self.keys.clone(), self.values.clone(), self.offsets.clone(), self.positions.clone())
        return _restored(prefix, self._used_tail(0, self.tail_length), 0, self.prefix_length)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerStore:
        copied = memo.get(id(self))
        if copied is None:
            copied = memo[id(self)] = self.clone()
        return copied

    def __reduce__(self) -> tuple[Callable[..., LayerStore], tuple[Any, ...]]:
        # Cloned, because a slice of the tail would be saved with the whole allocation.
        used = tuple(part.clone() for part in self._used_tail(0, self.tail_length))
        return _restored, (self._prefix, used, 0, self.prefix_length)

    @property
    def is_complete(self) -> bool:
        """Whether the prefix holds every position of every head and row (reads the device)."""
        held = self.num_kv_heads * self.prefix_length
        return self.keys.shape[1] == held and bool((self.offsets[:, -1] == held).all())

    # Internals

    @property
    def _prefix(self) -> _Prefix:
        return self.keys, self.values, self.offsets, self.positions

    def _used_tail(self, start: int, stop: int) -> Tail:
        if not 0 <= start <= stop <= self.tail_length:
            raise ValueError(f"tail entries {start} to {stop} are not in {self!r}")
        return self.tail_keys[:, :, start:stop], self.tail_values[:, :, start:stop]

    def _with_tail(self, start: int, stop: int, extra: int) -> LayerStore:
        return _restored(self._prefix, self._used_tail(start, stop), extra, self.prefix_length + start)

    def _derive(
        self,
        operation: str,
        argument: Any,
        tail_length: int | None,
        entries: Callable[[Tensor], Tensor],
        indices: Callable[[Tensor], Tensor],
    ) -> LayerStore:
        """Return the store whose tensors are those of this one, mapped."""
        used = self.tail_length if tail_length is None else tail_length

        def build() -> LayerStore:
            keys, values, offsets, positions = self._prefix
            prefix = (entries(keys), entries(values), indices(offsets), indices(positions))
            tail_keys, tail_values = self._used_tail(0, used)
            return _restored(prefix, (entries(tail_keys), entries(tail_values)), 0, self.prefix_length)

        return self._remember(_Request(operation, argument, used), build)

    def _remember(self, request: _Request, build: Callable[[], LayerStore]) -> LayerStore:
        alive = [(past, made) for past, ref in self._derived if (made := ref()) is not None]
        for past, made in alive:
            if past.matches(request):
                return made
        made = build()
        self._derived = [(past, weakref.ref(kept)) for past, kept in alive]
        self._derived.append((request.frozen(), weakref.ref(made)))
        return made


class _Request:
    """What was asked of a store, to recognise the same request for the layer's other tensor."""

    __slots__ = ("argument", "operation", "source", "tail_length", "version")

    def __init__(self, operation: str, argument: Any, tail_length: int) -> None:
        self.operation = operation
        self.argument = argument
        self.tail_length = tail_length
        self.source: weakref.ref[Tensor] | None = None
        self.version: int | None = None

    def frozen(self) -> _Request:
        """Return the request with a copy of its index, which the caller may overwrite afterwards."""
        index = self.argument
        if isinstance(index, Tensor):
            self.source = weakref.ref(index)
            self.version = None if index.is_inference() else index._version
            self.argument = index.clone()
        return self

    def matches(self, other: _Request) -> bool:
        if (self.operation, self.tail_length) != (other.operation, other.tail_length):
            return False
        mine, theirs = self.argument, other.argument
        if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
            return type(mine) is type(theirs) and bool(mine == theirs)
        # The very same, unwritten tensor needs no comparison, which would wait for the device.
        same = self.version is not None and self.source is not None and self.source() is theirs
        if same and theirs._version == self.version:
            return True
        if (mine.shape, mine.dtype, mine.device) != (theirs.shape, theirs.dtype, theirs.device):
            return False
        return torch.equal(mine, theirs)


def take_rows(tensor: Tensor, index: Tensor | slice) -> Tensor:
    """Return rows of a tensor, never a view: it would keep the memory of the other rows alive."""
    return tensor[index].clone() if isinstance(index, slice) else tensor.index_select(0, index)


def repeat_rows(tensor: Tensor, times: int, *, interleave: bool) -> Tensor:
    """Return every row ``times`` times."""
    if interleave:
        return tensor.repeat_interleave(times, dim=0)
    return tensor.repeat(times, *[1] * (tensor.dim() - 1))


def _restored(prefix: _Prefix, used: Tail, extra: int, prefix_length: int) -> LayerStore:
    """Return a store of a prefix, not copied, and of tail entries, copied, with room for ``extra`` more."""
    tail_keys, tail_values = roomy(used, extra)
    count = used[0].shape[2]
    cursor = new_cursor(count, prefix_length, prefix[0].device)
    return LayerStore(*prefix, tail_keys, tail_values, cursor, count, prefix_length)
