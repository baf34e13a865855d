"""Kernels of ``adakv::compact_v1`` as launched for the shapes of known models."""

from __future__ import annotations

from typing import Final

from adakv_compile.kernels._support import Target
from adakv_compile.kernels.compact.triton import compact_kernel
from adakv_compile.kernels.compact.tuning import config_of, constants_of
from benchmarks.aot.kernel import Kernel

__all__ = ["kernels"]

# Dimensions of keys and values, heads.
_SHAPES: Final = ((64, 64, 8), (80, 80, 32), (128, 128, 8), (192, 128, 40), (256, 256, 4))
_BYTES: Final = {"bf16": 2, "fp32": 4}
_POINTERS: Final = {"positions": "*i32", "offsets": "*i32"}


def kernels(capability: tuple[int, int]) -> list[Kernel]:
    """Return what a device of ``capability`` launches."""
    target = Target(capability, 1)
    found: list[Kernel] = []
    for dtype, itemsize in _BYTES.items():
        for key_dim, value_dim, num_heads in _SHAPES:
            config = config_of(target, itemsize, key_dim, value_dim, num_heads)
            # Triton takes a stride of 1 for a constant, and knows whether others are multiples of 16.
            constants = constants_of(config, key_dim, value_dim, num_heads) | {"stride_kd": 1, "stride_vd": 1}
            found.append(
                Kernel(
                    f"compact {dtype} D{key_dim},{value_dim} H{num_heads}",
                    compact_kernel,
                    {name: _type(name, dtype) for name in compact_kernel.arg_names if name not in constants},
                    constants,
                    config.num_warps,
                    num_stages=1,
                )
            )
    return found


def _type(argument: str, dtype: str) -> str:
    if argument in ("key", "value", "keys", "values"):
        return f"*{dtype}"
    if argument.startswith("stride_"):
        return "i64:16"
    return _POINTERS.get(argument, "i32")
