"""What was kept of a buffer that the caller owns, on the buffer itself."""

from __future__ import annotations

import weakref
from typing import Any, Final

from torch import Tensor

from adakv_compile.runtime.compressed import CompressedKV, make_view
from adakv_compile.runtime.store import LayerStore

__all__ = ["SideStore", "attach", "attached", "beside", "forget"]

_NAME: Final = "_adakv_side_store"


class SideStore:
    """The entries that attention reads in place of a layer's two preallocated buffers.

    It is an attribute of the buffer of keys, so that it lives and dies with the conversation's memory. Whatever happens
    to the buffers between two calls (zeroed, reordered, overwritten) raises their version counters, and what was kept
    is then not used any more. Writes that PyTorch itself does not count (through ``.data``, NumPy) are not seen.

    Attributes:
        store: What is kept; its length is the position that the next token must have.
    """

    __slots__ = ("_key", "_key_state", "_value", "_value_state", "store")

    def __init__(self, key: Tensor, value: Tensor, store: LayerStore) -> None:
        self.store = store
        self._key = weakref.ref(key)
        self._value = weakref.ref(value)
        self.seal(key, value)

    def seal(self, key: Tensor, value: Tensor) -> None:
        """Take the buffers as they are now for what the store was made from."""
        self._key_state = _state(key)
        self._value_state = _state(value)

    def belongs_to(self, key: Tensor, value: Tensor) -> bool:
        """Tell whether these are the buffers, and nobody wrote to them since."""
        # A tensor's attributes are copied with it in some places: a copy is another conversation.
        return (
            self._key() is key
            and self._value() is value
            and self._key_state == _state(key)
            and self._value_state == _state(value)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return nothing: a copied buffer is dense until the next prompt."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def attach(key: Tensor, value: Tensor, store: LayerStore) -> None:
    """Let a store stand in for a layer's buffers from now on.

    Tensors made under ``torch.inference_mode`` don't count their changes, so they get none and stay dense.
    """
    if key.is_inference() or value.is_inference():
        forget(key)
        return
    setattr(key, _NAME, SideStore(key, value, store))


def attached(key: Tensor, value: Tensor) -> SideStore | None:
    """Return what was kept of two buffers, if that is still what they hold."""
    side = getattr(key, _NAME, None)
    return side if isinstance(side, SideStore) and side.belongs_to(key, value) else None


def beside(tensor: Tensor) -> CompressedKV | None:
    """Return a view of what was kept of the buffers of which this is the keys, None if nothing was."""
    side = getattr(tensor, _NAME, None)
    return make_view(side.store, "key", side.store.length) if isinstance(side, SideStore) else None


def forget(key: Tensor) -> None:
    """Drop what was kept of a buffer."""
    if getattr(key, _NAME, None) is not None:
        delattr(key, _NAME)


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor._version, tensor.data_ptr()
