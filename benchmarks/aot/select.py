"""Kernels of ``adakv::select_v1``."""

from __future__ import annotations

from typing import Any

from adakv_compile.kernels._support import Target
from adakv_compile.kernels.select.triton import rank_keys, refine
from adakv_compile.kernels.select.triton_share import allocate, emit
from adakv_compile.kernels.select.tuning import MAX_HEADS, tuning_of
from benchmarks.aot.kernel import Kernel

__all__ = ["kernels"]

# Of arguments that are no constants; the others point to int32.
_TYPES = {
    "scores": "*fp32",
    "valid": "*i1",
    "total": "i32",
    "protected_from": "i32",
    "length": "i32",
    "num_heads": "i32",
    "first_live": "i32",
    "valid_row": "i64",
    "valid_head": "i64",
    "valid_stride": "i64",
    "group_heads": "i32",
    "step": "i32",
    "tiles": "i32",
    "slots": "i32",
}


def kernels(capability: tuple[int, int]) -> list[Kernel]:
    """Return every kernel as :func:`adakv_compile.kernels.select.gpu.choose` launches it."""
    tuning = tuning_of(Target(capability, 1))
    found = [_rank_keys(tuning.tile, tuning.num_warps, *case) for case in (("max", 7), ("avg", 5), ("avg", 63))]
    found += [_rank_keys(tuning.tile, tuning.num_warps, *case, padded=True) for case in (("max", 7), ("avg", 5))]
    for heads in (8, MAX_HEADS):
        constants = {"HEADS": tuning.heads(heads), "TILE": tuning.tile}
        found.append(_kernel(f"refine, {heads} heads", refine, tuning.num_warps, constants))
    for heads, joint in ((8, False), (8, True), (16, True), (32, True), (64, True), (MAX_HEADS, True)):
        constants = {
            "JOINT": joint,
            "ALPHA_NUMERATOR": 1,
            "ALPHA_DENOMINATOR": 5 if joint else 1,
            "HEADS": tuning.heads(heads),
            "COLUMNS": tuning.columns(heads),
            "TILE": tuning.tile,
        }
        found.append(
            _kernel(
                f"allocate, {heads} heads, {'adaptive' if joint else 'uniform'}",
                allocate,
                tuning.row_warps(heads),
                constants,
            )
        )
    found.append(_kernel("emit", emit, tuning.num_warps, {"COLUMNS": tuning.columns(1), "TILE": tuning.tile}))
    return found


def _rank_keys(tile: int, num_warps: int, pool: str, kernel_size: int, padded: bool = False) -> Kernel:
    constants = {
        "HAS_VALID": padded,
        "TOTAL_PER_ROW": padded,
        "PROTECTED_PER_ROW": padded,
        "JOINT": True,
        "MAX_POOL": pool == "max",
        "KERNEL_SIZE": kernel_size,
        "TILE": tile,
    }
    name = f"rank_keys, {pool} {kernel_size}"
    if padded:
        types = {"total": "*i64", "protected_from": "*i64"}
        return _kernel(f"{name}, padded", rank_keys, num_warps, constants, types)
    return _kernel(name, rank_keys, num_warps, {**constants, "valid": None})


def _kernel(
    name: str, function: Any, num_warps: int, constants: dict[str, Any], types: dict[str, str] | None = None
) -> Kernel:
    known = _TYPES | (types or {})
    types = {argument: known.get(argument, "*i32") for argument in function.arg_names if argument not in constants}
    return Kernel(name, function, types, constants, num_warps)
