"""Shapes of blocks and launches of the attention kernel, by device, dtype and head dimension; not yet timed on any.

The launcher and the ahead-of-time compilation take their constants from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from adakv_compile.kernels._launch import block_of
from adakv_compile.kernels._support import Target

__all__ = ["Blocks", "Plan", "Shape", "blocks_of", "plan"]

# New tokens that a head's first item takes on the side.
_FEW: Final = 16
# Slots of all rows below which a step is no longer limited by bandwidth.
_SMALL: Final = 16384
# Registers that a thread may use.
_ALL: Final = 255


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a program works.

    Attributes:
        rows: Query rows of a block.
        entries: Entries of a tile.
        num_warps: Warps of a program.
        num_stages: Stages of the loops over tiles.
        least: Least tiles of an item.
        maxnreg: Registers of a thread at most. None: the assembler decides, and would rather spill a few bytes than
            lose a program per processor; with many rows, that costs more than it gives.
    """

    rows: int
    entries: int
    num_warps: int
    num_stages: int
    least: int = 1
    maxnreg: int | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a call decides how it is launched.

    Attributes:
        dtype: Of queries, keys and values.
        batch: Rows of the batch.
        num_heads: KV heads.
        group: Query heads per KV head.
        count: New tokens.
        key_dim: Head dimension of keys.
        value_dim: Head dimension of values.
        slots: Of the prefix, per row.
        capacity: Entries of the tail that may be in use, per head.
        causal: Whether new tokens hide from those before them.
        window: Whether there is a sliding window that counts.
        mask: Dtype of the mask, if there is one.
        padded: Whether there is a padding mask.
        append: Whether the cursor is on the device, and new tokens are appended.
        stored: Whether the store holds the new tokens already; then none are appended.
    """

    dtype: torch.dtype
    batch: int
    num_heads: int
    group: int
    count: int
    key_dim: int
    value_dim: int
    slots: int
    capacity: int
    causal: bool = False
    window: bool = False
    mask: torch.dtype | None = None
    padded: bool = False
    append: bool = True
    stored: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """One launch.

    Attributes:
        programs: Along the first axis of the grid, items of all heads.
        row_blocks: Along the second.
        extra: Items beyond one per head.
        num_warps: Of a program.
        num_stages: Of the loops over tiles.
        maxnreg: Registers of a thread at most.
        constants: The kernel's ``tl.constexpr`` parameters.
    """

    programs: int
    row_blocks: int
    extra: int
    num_warps: int
    num_stages: int
    maxnreg: int | None
    constants: dict[str, Any]

    @property
    def split(self) -> bool:
        """Whether heads may have more than one item."""
        return self.constants["SPLIT"]


def blocks_of(target: Target, shape: Shape) -> Blocks:
    """Return the row of the table for a call.

    Steps want bytes in flight: stages, and tiles as large as registers allow. With many rows the products count, and
    registers: accumulators of more rows go over more warps. Looking a mask up takes registers, too.
    """
    rows, masked = shape.group * shape.count, shape.mask is not None
    dim = max(block_of(shape.key_dim), block_of(shape.value_dim))
    if target.capability == (0, 0):
        return Blocks(min(block_of(rows), 32), 16, 4, 1)
    if shape.dtype.itemsize == 4:
        # No tensor cores: operands of exact products sit in registers.
        return Blocks(16, 16, 8 if dim == 256 else 4, 3, maxnreg=_ALL)
    if rows <= 16:
        if dim == 256:
            return Blocks(16, 16, 4, 4, maxnreg=_ALL if shape.stored else None)
        if masked:
            return Blocks(16, 32, 4, 3)
        if shape.batch * shape.slots < _SMALL:
            # Latency counts: smaller tiles make more programs.
            return Blocks(16, 32, 4, 4, 2)
        return Blocks(16, 64, 4, 3) if dim == 128 else Blocks(16, 64, 4, 4, maxnreg=_ALL)
    if masked:
        return Blocks(16 if dim == 256 else 32, 32, 4, 2, maxnreg=_ALL)
    if dim == 256:
        return Blocks(32, 32, 8, 2, maxnreg=_ALL)
    if rows <= 32:
        return Blocks(32, 32, 4, 4, maxnreg=_ALL)
    plain = not (shape.window or shape.padded)
    if rows >= 1024 and plain and target.capability in ((9, 0), (10, 0)):
        return Blocks(128, 64, 8, 3, maxnreg=_ALL)
    return Blocks(64, 64, 8, 3, maxnreg=_ALL)


def plan(target: Target, shape: Shape) -> Plan:
    """Return how a call is launched."""
    heads = shape.batch * shape.num_heads
    rows = shape.group * shape.count
    padded = block_of(shape.key_dim), block_of(shape.value_dim)
    blocks = blocks_of(target, shape)
    row_blocks = -(-rows // blocks.rows)
    # Products of float32 would take too many registers beside those of the loop.
    few = not shape.stored and (shape.count == 1 or (shape.count <= _FEW and shape.dtype.itemsize < 4))
    # Two programs per processor hide one another's latency. Many blocks of rows fill the device by themselves, even if
    # one head has half of everything.
    extra = 0 if row_blocks > max(4, target.processors // 2) else -(-2 * target.processors // row_blocks)
    tiles = -(-shape.capacity // blocks.entries) + (0 if few or shape.stored else -(-shape.count // blocks.entries))
    most = shape.batch * (shape.slots // blocks.entries) + heads * (2 + tiles)
    combined = block_of(min(rows, blocks.rows), 1)
    held = 32 * 32 * blocks.num_warps // (combined * padded[1])
    constants = {
        "H": shape.num_heads,
        "G": shape.group,
        "DK": shape.key_dim,
        "DV": shape.value_dim,
        "DKP": padded[0],
        "DVP": padded[1],
        "BM": blocks.rows,
        "BN": blocks.entries,
        "FEW": (1 if shape.count == 1 else _FEW) if few else 0,
        "HEADS_BLOCK": block_of(heads, 1),
        "LEAST": blocks.least,
        "SPLIT": extra > 0,
        "APPEND": shape.append,
        "STORED": shape.stored,
        "CAUSAL": shape.causal and shape.count > 1 and shape.mask is None,
        "WINDOW": shape.window and shape.mask is None,
        "MASK": 0 if shape.mask is None else 1 if shape.mask == torch.bool else 2,
        "PADDED": shape.padded,
        "ROWS": combined,
        "TOGETHER": max(1, min(8, held)),
        "THREADS": 32 * blocks.num_warps,
    }
    return Plan(
        programs=min(heads + extra, most),
        row_blocks=row_blocks,
        extra=extra,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        maxnreg=blocks.maxnreg,
        constants=constants,
    )
