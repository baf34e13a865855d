"""What a compiled graph was made for and nobody else checks: sizes of stores, a model's tensors, masks from outside."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from adakv_compile.runtime.store import LayerStore

__all__ = ["Assumed", "Assumption", "CausalMask", "StoreSize"]


@dataclass(frozen=True, slots=True)
class StoreSize:
    """A size of the store behind a compressed past."""

    past: int
    which: Literal["entries", "capacity", "tail_length", "prefix_length"]

    def of(self, stores: Sequence[LayerStore]) -> int:
        """Return the number that it is in a call."""
        store = stores[self.past]
        return store.keys.shape[1] if self.which == "entries" else getattr(store, self.which)


@dataclass(frozen=True, slots=True)
class Assumption:
    """What the compiler assumed of stores' sizes.

    Attributes:
        holds: A function of these sizes.
        sizes: The sizes.
        otherwise: The rewritten graph, uncompiled: runs where the assumption doesn't hold.
    """

    holds: Callable[..., bool]
    sizes: tuple[StoreSize, ...]
    otherwise: Callable[..., Sequence[Any]]


class Assumed:
    """An argument that is a tensor of the model, a causal mask say, whose values the graph was made for.

    Writes through ``.data`` leave no trace and are not noticed.

    Args:
        index: Index of the argument.
        tensor: The tensor as it was; it is not kept alive.
    """

    __slots__ = ("_address", "_tensor", "_version", "index")

    def __init__(self, index: int, tensor: Tensor) -> None:
        self.index = index
        self._tensor = weakref.ref(tensor)
        self._address = tensor.data_ptr()
        self._version = tensor._version  # pyright: ignore[reportPrivateUsage]

    def holds(self, args: Sequence[Any]) -> bool:
        """Tell whether an argument is that tensor, not written to since."""
        argument = cast("Tensor", args[self.index])
        same = argument is self._tensor() and argument.data_ptr() == self._address
        return same and argument._version == self._version  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True, slots=True)
class CausalMask:
    """An argument that is a prompt's mask: whether it is causal, times padding, is seen from its values.

    Attributes:
        index: Index of the argument.
    """

    index: int

    def holds(self, args: Sequence[Any]) -> bool:
        """Tell whether every real token, the last one among them, sees itself and the real tokens before it.

        Waits for the device.

        Args:
            args: All arguments; the mask is ``[B or 1, 1, T, T]`` bool.
        """
        argument = cast("Tensor", args[self.index])
        real = argument[:, :, -1:, :]
        causal = torch.ones(argument.shape[-2:], dtype=torch.bool, device=argument.device).tril_()
        if bool(((argument == (causal & real)) | ~real.mT).all() & real[..., -1].all()):
            return True
        warnings.warn(
            'backend="adakv": the mask that this graph is given is not causal; this prompt runs uncompressed.',
            stacklevel=2,
        )
        return False
