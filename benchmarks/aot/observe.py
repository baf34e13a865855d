"""Kernels of ``adakv::observe_v3`` as launched for the shapes of known models."""

from __future__ import annotations

from typing import Final

from adakv_compile.kernels._support import Target
from adakv_compile.kernels.observe.triton import observe_combine, observe_lse, observe_scores
from adakv_compile.kernels.observe.tuning import COMBINE, config_of, lse_constants, score_constants
from benchmarks.aot.kernel import Kernel

__all__ = ["kernels"]

# Name, bytes, pointer type.
_DTYPES: Final = (("bf16", 2), ("fp16", 2), ("fp32", 4))
# Head dimension, group, window, reduction over the group, padding and sliding window, soft cap: a group whose rows make
# one block and one whose rows make several, of whole windows or of parts of one; the mean and the maximum of each.
_SHAPES: Final = (
    (32, 1, 32, "mean", False, False),
    (64, 4, 32, "max", True, False),
    (80, 1, 32, "mean", True, False),
    (96, 4, 32, "mean", False, False),
    (112, 8, 32, "max", False, False),
    (128, 4, 32, "mean", False, False),
    (128, 4, 32, "max", True, False),
    (128, 8, 32, "mean", False, False),
    (128, 8, 32, "max", True, False),
    (128, 2, 512, "max", True, False),
    (256, 2, 32, "mean", False, False),
    (256, 8, 32, "max", True, False),
    (128, 4, 32, "mean", False, True),
    (256, 2, 32, "max", True, True),
    (256, 8, 32, "mean", False, True),
)


def kernels(capability: tuple[int, int]) -> list[Kernel]:
    """Return what a device of ``capability`` launches."""
    found = [
        Kernel(
            "observe_combine",
            observe_combine,
            {"partials": "*fp32", "lse": "*fp32", "splits": "i32", "rows": "i32"},
            dict(COMBINE),
        )
    ]
    target = Target(capability, 1)
    for dtype, itemsize in _DTYPES:
        for head_dim, group, window, reduction, masked, capped in _SHAPES:
            if dtype == "fp16" and head_dim != 128:
                continue
            config = config_of(target, itemsize, head_dim)
            what = f"{dtype} D{head_dim} G{group} W{window}{' masked' * masked}{' capped' * capped}"
            absent: dict[str, int | None] = {"stride_qd": 1, "stride_kd": 1}
            if not capped:
                absent["softcap"] = None
            if not masked:
                absent |= {"padding": None, "stride_pb": 0, "stride_pl": 0}
            for name, function, (blocks, constants), chosen in (
                ("observe_lse", observe_lse, lse_constants(config, group, window, head_dim), {}),
                (
                    f"observe_scores {reduction}",
                    observe_scores,
                    score_constants(config, group, window, head_dim),
                    {"LARGEST": reduction == "max"},
                ),
            ):
                values = {**absent, **constants, **chosen}
                found.append(
                    Kernel(
                        f"{name} {what}",
                        function,
                        {argument: _type(argument, dtype) for argument in function.arg_names if argument not in values},
                        values,
                        blocks.num_warps,
                        blocks.num_stages,
                        tensor_cores=itemsize == 2,
                    )
                )
    return found


def _type(argument: str, dtype: str) -> str:
    """Return Triton's type of an argument; rows of keys and queries start at multiples of 16 bytes."""
    if argument in ("query", "key"):
        return f"*{dtype}"
    if argument == "padding":
        return "*u8"
    if argument in ("partials", "lse", "scores"):
        return "*fp32"
    if argument in ("scale", "softcap", "to_base_2"):
        return "fp32"
    return "i32:16" if argument.startswith(("stride_q", "stride_k")) else "i32"
