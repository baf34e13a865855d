"""How the selection is cut into programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from adakv_compile.kernels._support import Target

__all__ = ["MAX_HEADS", "Tuning", "tuning_of"]

MAX_HEADS: Final = 128
"""KV heads of a layer: sharing a budget compares every head with every other one."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """Sizes, each a power of two.

    Attributes:
        tile: Entries of one head that a program takes.
        block: Numbers that a program holds at once where it works on all heads of a row.
        num_warps: Warps of a program.
    """

    tile: int
    block: int
    num_warps: int

    def heads(self, num_heads: int) -> int:
        """Return the power of two that covers the heads; few of them share a compilation."""
        return max(8, 1 << (num_heads - 1).bit_length())

    def row_warps(self, num_heads: int) -> int:
        """Return the warps of a program that works on all heads of a row."""
        return self.num_warps * (2 if num_heads <= 32 else 4)

    def columns(self, num_heads: int) -> int:
        """Return the tiles or entries of all heads that fit into a block."""
        return self.block // self.heads(num_heads)


# In the interpreter tiles are small, so that small cases have several.
_INTERPRETER: Final = Tuning(tile=64, block=64, num_warps=4)
_GPU: Final = Tuning(tile=1024, block=4096, num_warps=4)


def tuning_of(target: Target) -> Tuning:
    """Return the sizes for a GPU."""
    return _INTERPRETER if target.capability == (0, 0) else _GPU
