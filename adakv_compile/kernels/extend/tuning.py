"""Shapes of blocks and launches of the scoring kernel of ``adakv::extend_v2``, by device, dtype and head dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adakv_compile.kernels._launch import block_of
from adakv_compile.kernels._support import INTERPRETER, Target

__all__ = ["Blocks", "Scoring", "blocks_of", "constants_of", "programs_of"]


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a program works.

    Attributes:
        rows: Most query rows of a block.
        entries: Entries of a tile.
        num_warps: Warps of a program.
        num_stages: Stages of the loop over tiles.
    """

    rows: int
    entries: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Scoring:
    """What of a call decides the kernel's constants.

    Attributes:
        batch: Rows of the batch.
        num_heads: KV heads.
        group: Query heads per KV head.
        rows: Last queries that score.
        key_dim: Head dimension of keys.
        scored: Whether scores are wanted.
        largest: Whether the group's maximum counts rather than its mean.
        causal: Whether new tokens hide from those before them.
        window: Whether there is a sliding window that counts.
        mask: Dtype of the mask, if there is one.
        padded: Whether there is a padding mask.
    """

    batch: int
    num_heads: int
    group: int
    rows: int
    key_dim: int
    scored: bool
    largest: bool
    causal: bool
    window: bool
    mask: torch.dtype | None
    padded: bool


def blocks_of(target: Target, itemsize: int, dim: int, group: int, rows: int) -> Blocks:
    """Return the blocks for keys of ``dim`` that ``rows`` queries of each head of a ``group`` score."""
    if target.capability == INTERPRETER.capability:
        return Blocks(64, 32, 4, 1)
    width = block_of(dim)
    # Exact products run on the ordinary cores.
    if itemsize > 2:
        return Blocks(32, 32, 8, 1) if width <= 128 else Blocks(16, 32, 4, 1)
    # Rows of one block stay while keys stream past; of several, they stream past every tile of keys.
    if width <= 128 and block_of(group, 1) * block_of(rows, 1) <= 128:
        return Blocks(128, 64, 8, 3)
    return Blocks(64, 32, 8, 2)


def constants_of(blocks: Blocks, scoring: Scoring) -> dict[str, int | bool]:
    """Return the kernel's ``tl.constexpr`` parameters."""
    span = min(blocks.rows, block_of(scoring.rows, 1))
    rows = max(16, min(blocks.rows, span * block_of(scoring.group, 1)))
    return {
        "H": scoring.num_heads,
        "G": scoring.group,
        "DK": scoring.key_dim,
        "DKP": block_of(scoring.key_dim),
        "BM": rows,
        "BN": blocks.entries,
        "SPAN": span,
        "WINDOW_BLOCK": block_of(scoring.rows, 1),
        "SINGLE": scoring.rows <= span and scoring.group * span <= rows,
        "HEADS_BLOCK": block_of(scoring.batch * scoring.num_heads, 1),
        "SCORED": scoring.scored,
        "LARGEST": scoring.largest,
        "CAUSAL": scoring.causal and scoring.mask is None,
        "WINDOW": scoring.window and scoring.mask is None,
        "MASK": 0 if scoring.mask is None else 1 if scoring.mask == torch.bool else 2,
        "PADDED": scoring.padded,
    }


def programs_of(target: Target, blocks: Blocks, heads: int, entries: int, fresh: int) -> tuple[int, int]:
    """Return the programs of a launch, and how many of them are beyond one per head.

    Args:
        target: The device.
        blocks: As launched.
        heads: KV heads of all rows.
        entries: Slots of all prefixes together.
        fresh: Entries per head behind them.
    """
    # Two programs per processor hide one another's latency.
    extra = 2 * target.processors
    most = entries // blocks.entries + heads * (3 + fresh // blocks.entries)
    return min(heads + extra, most), extra
