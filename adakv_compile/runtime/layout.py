"""How the dimensions of a cached tensor are made of batch, heads, sequence and head dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["STANDARD", "Layout"]

_AXES: Final = "pbhld"
"""The order in which :meth:`Layout.to_standard` puts them."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which axes each dimension of a cached tensor holds.

    The axes are ``b`` (batch), ``h`` (KV heads), ``l`` (sequence), ``d`` (head dimension), and ``p`` where keys and
    values are one tensor (0: keys, 1: values). Decoders cache ``[B, H, L, D]``, ``[B, L, H, D]``, ``[B * H, D, L]``,
    ``[B, L, H * D]``, ``[B, H, L, 2 * D]``, ``[2, B, H, L, D]`` and more.

    Attributes:
        dims: The axes of every dimension, the major one first, or ``"1"`` for a dimension of size one:
            ``("bh", "d", "l")`` is ``[B * H, D, L]``. The sequence has a dimension of its own.

    Raises:
        ValueError: An axis is missing, occurs twice, is unknown, or the sequence shares its dimension.
    """

    dims: tuple[str, ...]

    def __post_init__(self) -> None:
        axes = "".join(dim for dim in self.dims if dim != "1")
        if sorted(axes.replace("p", "", 1)) != sorted("bhld") or "l" not in self.dims or "" in self.dims:
            raise ValueError(
                f"{self.dims!r} is no layout of a cached tensor: each of b, h, l and d occurs once, p at most once, l"
                " in a dimension of its own, and a dimension without an axis is '1'"
            )

    @property
    def rank(self) -> int:
        """How many dimensions the tensor has."""
        return len(self.dims)

    @property
    def sequence_dim(self) -> int:
        """The dimension that grows."""
        return self.dims.index("l")

    @property
    def batch_dim(self) -> int | None:
        """The dimension of the batch rows; None if they share one with another axis."""
        return self.dims.index("b") if "b" in self.dims else None

    @property
    def is_pair(self) -> bool:
        """Whether the tensor holds keys and values."""
        return any("p" in dim for dim in self.dims)

    def __str__(self) -> str:
        names = (" * ".join("2" if axis == "p" else axis.upper() for axis in dim) for dim in self.dims)
        return f"[{', '.join(names)}]"

    def shape(self, batch: Any, heads: Any, length: Any, dim: Any) -> tuple[Any, ...]:
        """Return the shape of the tensor; sizes may be symbolic.

        Args:
            batch: Rows.
            heads: KV heads.
            length: Tokens.
            dim: Head dimension, of keys and values alike in a pair.
        """
        return self._shape({"1": 1, "p": 2, "b": batch, "h": heads, "l": length, "d": dim})

    def to_standard(self, tensor: Tensor, heads: int, dim: int) -> Tensor:
        """Return a tensor of this layout as ``[B, Hkv, T, D]``, a view of it.

        Args:
            tensor: A plain tensor of any length; sizes may be symbolic.
            heads: KV heads.
            dim: Head dimension.

        Raises:
            ValueError: This is the layout of a pair, which :meth:`split_pair` takes apart.
        """
        if self.is_pair:
            raise ValueError(f"{self} holds keys and values")
        return self._by_axis(tensor, heads, dim)

    def split_pair(self, tensor: Tensor, heads: int, dim: int) -> tuple[Tensor, Tensor]:
        """Return keys and values, each ``[B, Hkv, T, D]``, of a tensor of a pair's layout; views of it.

        Raises:
            ValueError: This is not the layout of a pair.
        """
        if not self.is_pair:
            raise ValueError(f"{self} does not hold keys and values")
        keys, values = self._by_axis(tensor, heads, dim).unbind(0)
        return keys, values

    def from_standard(self, tensor: Tensor) -> Tensor:
        """Return ``[B, Hkv, T, D]`` in this layout; what :meth:`to_standard` undoes.

        Raises:
            ValueError: This is the layout of a pair, which :meth:`join_pair` makes.
        """
        if self.is_pair:
            raise ValueError(f"{self} holds keys and values")
        return self._merged(_AXES[1:], tensor)

    def join_pair(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return keys and values, each ``[B, Hkv, T, D]``, in this layout of a pair; what :meth:`split_pair` undoes.

        Raises:
            ValueError: This is not the layout of a pair.
        """
        if not self.is_pair:
            raise ValueError(f"{self} does not hold keys and values")
        return self._merged(_AXES, torch.stack([keys, values]))

    def _shape(self, sizes: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple([sizes[dim] if len(dim) == 1 else math.prod([sizes[axis] for axis in dim]) for dim in self.dims])

    def _by_axis(self, tensor: Tensor, heads: int, dim: int) -> Tensor:
        """Return a view with one dimension for each axis, in the order of ``_AXES``."""
        axes = "".join(self.dims).replace("1", "")
        if len(axes) != len(self.dims) or "1" in self.dims:
            sizes: dict[str, Any] = {"p": 2, "h": heads, "l": tensor.shape[self.sequence_dim], "d": dim}
            at, shared = next((at, dim) for at, dim in enumerate(self.dims) if "b" in dim)
            sizes["b"] = tensor.shape[at] // math.prod([sizes[axis] for axis in shared if axis != "b"])
            tensor = tensor.reshape([sizes[axis] for axis in axes])
        return tensor.permute([axes.index(axis) for axis in _AXES if axis in axes])

    def _merged(self, given: str, tensor: Tensor) -> Tensor:
        """Return a tensor with one dimension for each of the ``given`` axes in this layout."""
        sizes: dict[str, Any] = {"1": 1} | dict(zip(given, tensor.shape, strict=True))
        axes = "".join(self.dims).replace("1", "")
        return tensor.permute([given.index(axis) for axis in axes]).reshape(self._shape(sizes))


STANDARD: Final = Layout(("b", "h", "l", "d"))
"""``[B, Hkv, L, D]``."""
