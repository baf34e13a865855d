"""Shapes of blocks and launches of the attention kernel, by device, dtype and head dimension; measured nowhere else.

The launcher and the ahead-of-time compilation take their constants from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from adakv_compile.kernels._launch import block_of
from adakv_compile.kernels._support import Target

__all__ = ["Blocks", "Plan", "Shape", "blocks_of", "plan"]

FEW: Final = 16
"""New tokens that a head's first item takes on the side."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a program works.

    Attributes:
        rows: Query rows of a block.
        entries: Entries of a tile.
        num_warps: Warps of a program.
        num_stages: Stages of the loops over tiles.
        least: Least tiles of an item.
    """

    rows: int
    entries: int
    num_warps: int
    num_stages: int
    least: int = 1


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


@dataclass(frozen=True, slots=True)
class Plan:
    """One launch.

    Attributes:
        programs: Along the first axis of the grid, items of all heads.
        row_blocks: Along the second.
        extra: Items beyond one per head.
        num_warps: Of a program.
        num_stages: Of the loops over tiles.
        constants: The kernel's ``tl.constexpr`` parameters.
    """

    programs: int
    row_blocks: int
    extra: int
    num_warps: int
    num_stages: int
    constants: dict[str, Any]

    @property
    def split(self) -> bool:
        """Whether heads may have more than one item."""
        return self.constants["SPLIT"]


def blocks_of(target: Target, itemsize: int, dim: int, rows: int, entries: int) -> Blocks:
    """Return the row of the table.

    Args:
        target: The device.
        itemsize: Bytes of an element of keys and values.
        dim: The larger head dimension, padded to a power of two.
        rows: Query rows of a KV head.
        entries: Slots of all prefixes together, what there is to read at most.
    """
    if target.capability == (0, 0):
        return Blocks(min(block_of(rows), 32), 16, 4, 1)
    if itemsize == 4:
        return Blocks(16, 32 if dim <= 64 else 16, 4, 2)
    small = entries < 16384
    if rows <= 16:
        if dim <= 128:
            return Blocks(16, 32, 4, 4, 2) if small else Blocks(16, 64, 4, 3)
        return Blocks(16, 32, 4, 3)
    if dim <= 128:
        return Blocks(min(block_of(rows), 64), 64, 4, 3)
    return Blocks(min(block_of(rows), 64), 32, 4, 2)


def plan(target: Target, shape: Shape) -> Plan:
    """Return how a call is launched."""
    heads = shape.batch * shape.num_heads
    rows = shape.group * shape.count
    padded = block_of(shape.key_dim), block_of(shape.value_dim)
    blocks = blocks_of(target, shape.dtype.itemsize, max(padded), rows, shape.batch * shape.slots)
    row_blocks = -(-rows // blocks.rows)
    # Products of float32 would take too many registers beside those of the loop.
    few = shape.count == 1 or (shape.count <= FEW and shape.dtype.itemsize < 4)
    # Two programs per processor hide one another's latency. Many blocks of rows fill the device by themselves.
    extra = 0 if row_blocks >= target.processors else -(-2 * target.processors // row_blocks)
    tiles = -(-shape.capacity // blocks.entries) + (0 if few else -(-shape.count // blocks.entries))
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
        "FEW": 1 if shape.count == 1 else FEW if few else 0,
        "HEADS_BLOCK": block_of(heads, 1),
        "LEAST": blocks.least,
        "SPLIT": extra > 0,
        "APPEND": shape.append,
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
        constants=constants,
    )
