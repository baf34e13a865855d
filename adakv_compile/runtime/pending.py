"""New entries that one of a layer's two tensors has seen and the other may not have seen yet."""

from __future__ import annotations

from torch import Tensor

from adakv_compile.runtime.store import LayerStore

__all__ = ["Pending"]


class Pending:
    """Entries appended to one view in eager mode, which wait for the layer's other view.

    A model appends to its keys and to its values by two separate ``cat`` calls, but the two share a store. So an eager
    append only notes the new entries; attention, which sees both views, writes both into the store's tail. Views sliced
    from an appended one share this object, and so learn where the entries went.

    Attributes:
        entries: ``[B, Hkv, T, D]``, detached.
        base: Tail entries of the store in front of them.
        store: The store whose tail holds them by now, or None.
        floor: Lowest position in that store's tail, which may have released older ones: a view that starts before it
            doesn't move to that store.
    """

    __slots__ = ("base", "entries", "floor", "store")

    def __init__(self, entries: Tensor, base: int) -> None:
        self.entries = entries
        self.base = base
        self.store: LayerStore | None = None
        self.floor = 0

    def __deepcopy__(self, memo: dict[int, object]) -> Pending:
        copied = Pending(self.entries.clone(), self.base)
        memo[id(self)] = copied
        return copied
