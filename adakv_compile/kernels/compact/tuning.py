"""Block sizes of ``adakv::compact_v1`` by device, element size and head dimension."""

from __future__ import annotations

from dataclasses import dataclass

from adakv_compile.kernels._launch import block_of
from adakv_compile.kernels._support import INTERPRETER, Target

__all__ = ["Config", "config_of", "constants_of"]


@dataclass(frozen=True, slots=True)
class Config:
    """How one launch is divided.

    Attributes:
        slots: Slots of a program.
        num_warps: Warps of a program.
    """

    slots: int
    num_warps: int


def config_of(target: Target, itemsize: int, key_dim: int, value_dim: int, num_heads: int) -> Config:
    """Return the blocks: 8 KiB of the wider rows a program, with registers for several programs at once."""
    if target.capability == INTERPRETER.capability:
        return Config(slots=32, num_warps=4)
    row = itemsize * max(block_of(key_dim), block_of(value_dim))
    # Every slot is compared with the end of every head.
    most = max(16, 8192 // block_of(num_heads))
    return Config(slots=min(max(16, 8192 // row), 64, most), num_warps=4)


def constants_of(config: Config, key_dim: int, value_dim: int, num_heads: int) -> dict[str, int]:
    """Return the kernel's ``tl.constexpr`` parameters."""
    return {
        "KEY_DIM": key_dim,
        "KEY_WIDTH": block_of(key_dim),
        "VALUE_DIM": value_dim,
        "VALUE_WIDTH": block_of(value_dim),
        "HEADS": block_of(num_heads, 1),
        "SLOTS": config.slots,
    }
