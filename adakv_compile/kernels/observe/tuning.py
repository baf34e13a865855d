"""Block sizes of ``adakv::observe_v3`` by device, dtype and head dimension, and what they become for a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from adakv_compile.kernels._launch import block_of
from adakv_compile.kernels._support import INTERPRETER, Target

__all__ = ["COMBINE", "Blocks", "Config", "Constants", "config_of", "lse_constants", "score_constants", "split"]

Constants = dict[str, int | bool]
"""Values of ``tl.constexpr`` parameters."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Tile of one kernel.

    Attributes:
        rows: Queries of the window at a time; fewer if a group has fewer.
        keys: Keys at a time.
        num_warps: Warps of a program.
        num_stages: Stages of the pipelined loop.
        programs: Programs per processor to split the keys into.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    programs: int = 4


@dataclass(frozen=True, slots=True)
class Config:
    """What one device uses for one dtype and head dimension.

    The left operand of a product may be held in registers, so it is the one that stays: the rows where they fit one
    block, else the tile of keys. Rows on the left cost few registers, as each thread holds the sums of few of them.

    Attributes:
        lse: Of the pass that sums; the rows stay, each block of them in programs of its own.
        single: Of the pass that scores where the rows of a group fit one block.
        many: Of the pass that scores where they do not.
    """

    lse: Blocks
    single: Blocks
    many: Blocks


COMBINE: Final[Constants] = {"ROWS": 16, "SPLITS": 64}

# By head dimension. Two programs of eight warps per processor, where registers and shared memory allow.
_AMPERE: Final = {
    32: Config(Blocks(128, 128, 8, 3), Blocks(128, 128, 8, 3), Blocks(64, 128, 8, 2)),
    64: Config(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 2)),
    128: Config(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 2)),
    256: Config(Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2)),
}
_HOPPER: Final = {
    32: Config(Blocks(128, 128, 8, 3), Blocks(128, 128, 8, 3), Blocks(64, 128, 8, 3)),
    64: Config(Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 3)),
    128: Config(Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 3)),
    256: Config(Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
}
_BLACKWELL: Final = {
    32: Config(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(32, 128, 8, 2)),
    64: Config(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(32, 128, 8, 2)),
    128: Config(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(32, 128, 8, 2)),
    256: Config(Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(32, 128, 8, 2)),
}
# 99 KiB of shared memory.
_CONSUMER: Final = {
    32: _AMPERE[32],
    64: Config(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 2)),
    128: Config(Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2)),
    256: Config(Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2)),
}
# Exact products of float32 run on the ordinary cores, and pipelined copies of them only cost registers.
_SINGLE_PRECISION: Final = {
    32: Config(Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1)),
    64: Config(Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1)),
    128: Config(Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1)),
    256: Config(Blocks(16, 32, 8, 1), Blocks(16, 32, 8, 1), Blocks(16, 32, 8, 1)),
}
# A mask of numbers that is looked up is what the assembler would spill a few bytes for.
_SINGLE_PRECISION_MASKED: Final = {
    32: _SINGLE_PRECISION[32],
    64: _SINGLE_PRECISION[64],
    128: Config(Blocks(16, 32, 8, 1), Blocks(16, 32, 8, 1), Blocks(16, 32, 8, 1)),
    256: _SINGLE_PRECISION[256],
}
# A mask that is looked up takes registers and shared memory of its own; the same for all devices.
_MASKED: Final = {
    32: Config(Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 64, 4, 2)),
    64: Config(Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 64, 4, 2)),
    128: Config(Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 64, 4, 2)),
    256: Config(Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 32, 4, 2)),
}
_INTERPRETED: Final = Config(Blocks(32, 64, 4, 1, 2), Blocks(64, 32, 4, 1, 2), Blocks(64, 32, 4, 1, 2))
_BY_CAPABILITY: Final = {(8, 0): _AMPERE, (9, 0): _HOPPER, (10, 0): _BLACKWELL, (10, 3): _BLACKWELL}


def config_of(target: Target, itemsize: int, head_dim: int, *, masked: bool) -> Config:
    """Return the blocks for a device; capabilities that the table does not name take what fits all.

    Args:
        target: The device.
        itemsize: Bytes of a number.
        head_dim: Of queries and keys.
        masked: Whether a mask is looked up.
    """
    if target.capability == INTERPRETER.capability:
        return _INTERPRETED
    width = max(32, block_of(head_dim))
    if itemsize > 2:
        return (_SINGLE_PRECISION_MASKED if masked else _SINGLE_PRECISION)[width]
    if masked:
        return _MASKED[width]
    return _BY_CAPABILITY.get(target.capability, _CONSUMER)[width]


def lse_constants(config: Config, group: int, window: int, head_dim: int) -> tuple[Blocks, Constants]:
    """Return the tile and the constants of ``observe_lse``."""
    rows, span = _rows(config.lse.rows, group, window)
    return config.lse, {
        "GROUP": group,
        "DIM": head_dim,
        "WIDTH": block_of(head_dim),
        "ROWS": rows,
        "SPAN": span,
        "KEYS": config.lse.keys,
    }


def score_constants(config: Config, group: int, window: int, head_dim: int) -> tuple[Blocks, Constants]:
    """Return the tile and the constants of ``observe_scores``."""
    covered = block_of(window, 1)
    single = block_of(group, 1) * covered <= config.single.rows
    blocks = config.single if single else config.many
    rows, span = _rows(blocks.rows, group, window)
    return blocks, {
        "GROUP": group,
        "DIM": head_dim,
        "WIDTH": block_of(head_dim),
        "ROWS": rows,
        "SPAN": span,
        "WINDOW": covered,
        "KEYS": blocks.keys,
        "KEYS_LEFT": not single,
    }


def split(target: Target, blocks: Blocks, heads: int, length: int) -> tuple[int, int]:
    """Return into how many parts each of ``heads`` goes through its keys, and the tiles of each part."""
    tiles = -(-length // blocks.keys)
    wanted = -(-target.processors * blocks.programs // max(1, heads))
    each = -(-tiles // max(1, min(tiles, wanted)))
    return -(-tiles // each), each


def _rows(most: int, group: int, window: int) -> tuple[int, int]:
    """Return the rows of a block and how many of them are of one head; ``tl.dot`` takes no fewer than 16."""
    span = min(most, block_of(window, 1))
    rows = min(most, block_of(group, 1) * span)
    return max(16, rows), span
