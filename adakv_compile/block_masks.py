"""Block masks that a graph is given: whether their tables say what the function says that the graph was made for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

__all__ = ["BlockTable"]


@dataclass(frozen=True, slots=True)
class BlockTable:
    """Arguments that are the tables of a ``BlockMask``.

    A mask made by ``create_block_mask`` agrees with its function; one put together by hand may not, and kernels believe
    the tables: a block that is not listed is hidden, one that is listed as full is seen whole.

    Attributes:
        tables: Indices of ``kv_num_blocks``, ``kv_indices``, ``full_kv_num_blocks`` and ``full_kv_indices``, the last
            two None where no block is marked as full.
        block: Queries and keys of a block: numbers, or the indices of the arguments that hold them.
        visible: The function's values, of all arguments: ``[B or 1, H or 1, Tq, Tk]`` bool.
    """

    tables: tuple[int, int, int | None, int | None]
    block: tuple[tuple[int, bool], tuple[int, bool]]
    visible: fx.GraphModule

    def holds(self, args: Sequence[Any]) -> bool:
        """Tell whether the tables hide and show what the function does. Waits for the device.

        Args:
            args: All arguments.
        """
        rows, columns = (args[size] if is_index else size for size, is_index in self.block)
        visible = cast("Tensor", self.visible(*args))
        listed = self._count(args, 0)
        full = self._count(args, 2) if self.tables[2] is not None else torch.zeros_like(listed)
        some, every = _blocks(visible, int(rows), int(columns))
        if (
            listed.shape[-2:] == some.shape[-2:]
            and full.shape[-2:] == some.shape[-2:]
            and bool(((listed + full <= 1) & (~some | (listed + full == 1)) & (every | (full == 0))).all())
        ):
            return True
        warnings.warn(
            'backend="adakv": the tables of a block mask do not say what its mask_mod says; this call runs '
            "uncompressed.",
            stacklevel=2,
        )
        return False

    def _count(self, args: Sequence[Any], first: int) -> Tensor:
        """Return how often each block is listed, ``[B or 1, H or 1, rows, columns]``."""
        counts = cast("Tensor", args[cast("int", self.tables[first])])
        indices = cast("Tensor", args[cast("int", self.tables[first + 1])])
        used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
        found = torch.zeros(indices.shape, dtype=torch.int64, device=indices.device)
        # What lies behind the listed ones is arbitrary.
        return found.scatter_add_(-1, indices.long() * used, used.long())


def _blocks(visible: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return which blocks show some of their keys, and which all of those that there are."""
    height, width = visible.shape[-2:]
    beyond = (0, -width % columns, 0, -height % rows)
    some = F.pad(visible, beyond, value=False)
    every = F.pad(visible, beyond, value=True)
    shape = (*visible.shape[:-2], some.shape[-2] // rows, rows, some.shape[-1] // columns, columns)
    return some.reshape(shape).any(-1).any(-2), every.reshape(shape).all(-1).all(-2)
