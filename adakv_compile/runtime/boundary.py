"""What the compiled callable does with caches at every call: views to a store before, a store to views after."""

from __future__ import annotations

from torch import Tensor

from adakv_compile.runtime.compressed import CompressedKV, make_view
from adakv_compile.runtime.errors import CacheMismatchError
from adakv_compile.runtime.layout import STANDARD, Layout
from adakv_compile.runtime.store import LayerStore

__all__ = ["join", "wrap_grown", "wrap_prefill"]


def join(key: Tensor, value: Tensor, extra: int = 0) -> LayerStore:
    """Return the store that holds exactly what a layer's views show, with room for ``extra`` more tail entries.

    The caller may append to it in place: it is the views' own store only when they are its newest views, otherwise a
    fork, so no other conversation is ever written to.

    Args:
        key: The layer's cached keys, a :class:`CompressedKV`, or its one tensor of keys and values.
        value: Its cached values, or the same tensor again.
        extra: Entries the caller is going to append.

    Raises:
        CacheMismatchError: The two are not the keys and the values of one layer at one length.
        TailGrowthError: There is no memory for ``extra`` more entries.
    """
    # Every decode step comes through here for every layer; the first condition is the common case, whole.
    if type(key) is CompressedKV and type(value) is CompressedKV:
        store = key.backing
        if (
            store is not None
            and value.backing is store
            and key.waiting is None
            and value.waiting is None
            and key.length == value.length
            and key.start == value.start
            and key.kind == "key"
            and value.kind == "value"
            and key.start + key.length - store.prefix_length == store.tail_length
            and store.tail_length + extra <= store.capacity
        ):
            return store
    return _join(key, value, extra)


def wrap_prefill(
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    positions: Tensor,
    length: int,
    start: int = 0,
    layouts: tuple[Layout, Layout] = (STANDARD, STANDARD),
) -> tuple[CompressedKV, CompressedKV]:
    """Return the key view and the value view of what an eviction kept.

    Args:
        keys: ``[B, N, Dk]``.
        values: ``[B, N, Dv]``.
        offsets: ``[B, Hkv + 1]`` int32.
        positions: ``[B, N]`` int32.
        length: Tokens seen so far, from position 0, whatever ``start`` is.
        start: Position of the views' first slot.
        layouts: Of keys and values. If they are a pair's, both results are one view.
    """
    store = LayerStore.sealed(keys, values, offsets, positions, length)
    return wrap_grown(store, length - start, start, layouts)


def wrap_grown(
    store: LayerStore, length: int, start: int = 0, layouts: tuple[Layout, Layout] = (STANDARD, STANDARD)
) -> tuple[CompressedKV, CompressedKV]:
    """Return the views of a store after an append.

    Args:
        store: The store, its host mirror already advanced.
        length: Logical length of the views: slots from ``start`` on.
        start: Position of the views' first slot.
        layouts: Of keys and values. If they are a pair's, both results are one view.
    """
    of_keys, of_values = layouts
    if of_keys is not STANDARD and of_keys.is_pair:
        pair = make_view(store, "pair", length, start, None, of_keys)
        return pair, pair
    keys = make_view(store, "key", length, start, None, of_keys)
    return keys, make_view(store, "value", length, start, None, of_values)


def _join(key: Tensor, value: Tensor, extra: int) -> LayerStore:
    if not isinstance(key, CompressedKV) or not isinstance(value, CompressedKV):
        raise _mismatch(key, value, "one of them is not compressed")
    if type(key) is not CompressedKV or type(value) is not CompressedKV:
        raise _mismatch(key, value, "the heads were repeated before the call")
    store, value_store = key.store, value.store
    if key.kind == value.kind == "pair" and key is value:
        return _newest(key, value, store, None, None, extra)
    if "pair" in (key.kind, value.kind):
        raise _mismatch(key, value, "a tensor of keys and values goes with itself only")
    if key.kind != "key" or value.kind != "value":
        raise _mismatch(key, value, "keys and values were exchanged, or one was used twice")
    if (key.start, key.length) != (value.start, value.length):
        raise _mismatch(key, value, "they cover different tokens")
    if store is not value_store:
        raise _mismatch(key, value, "they come from different layers, conversations or devices")
    new_keys, new_values = key.pending, value.pending
    if (new_keys is None) != (new_values is None) or key.tail_length != value.tail_length:
        raise _mismatch(key, value, "tokens were appended to one of them only")
    return _newest(key, value, store, new_keys, new_values, extra)


def _newest(
    key: CompressedKV,
    value: CompressedKV,
    store: LayerStore,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    extra: int,
) -> LayerStore:
    """Return the views' store, forked if it has other views' entries, with pending entries written into it."""
    tail, start = key.tail_length, key.start
    waiting = 0 if new_keys is None else new_keys.shape[2]
    room = waiting + extra
    outgrown, floor = start - store.prefix_length, 0
    if tail + room > store.capacity and 2 * outgrown >= tail > 0:
        # Half of the tail has left a sliding window: moving the rest costs no more than growing, and bounds it.
        floor = min(start, store.prefix_length + tail)
        store = store.without_oldest(floor, tail, room)
    elif tail != store.tail_length:
        store = store.fork(tail, room)
    else:
        store.reserve(room)
    if new_keys is not None and new_values is not None:
        store.append(new_keys, new_values)
        for view in (key, value):
            pending = view.waiting
            if pending is not None and pending.entries.shape[2] == waiting:
                pending.store, pending.floor = store, floor
            view.backing, view.waiting = store, None
    return store


def _mismatch(key: Tensor, value: Tensor, reason: str) -> CacheMismatchError:
    return CacheMismatchError(
        f"These keys and values don't belong together: {reason}. Keys: {_describe(key)}; values: {_describe(value)}."
        " Pass the cache that this model returned, both tensors of each layer, changed in the same way."
    )


def _describe(tensor: Tensor) -> str:
    if isinstance(tensor, CompressedKV):
        return repr(tensor)
    return f"{type(tensor).__name__} of shape {list(tensor.shape)}, {tensor.dtype}, {tensor.device}"
