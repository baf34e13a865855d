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
# Head dimension, group, window, reduction over the group, and what hides keys or caps logits: a group whose rows make
# one block and one whose rows make several, of whole windows or of parts of one; the mean and the maximum of each.
_SHAPES: Final = (
    (32, 1, 32, "mean", ""),
    (64, 4, 32, "max", "padding"),
    (80, 1, 32, "mean", "padding"),
    (96, 4, 32, "mean", ""),
    (112, 8, 32, "max", ""),
    (128, 4, 32, "mean", ""),
    (128, 4, 32, "max", "padding"),
    (128, 8, 32, "mean", ""),
    (128, 8, 32, "max", "padding"),
    (128, 2, 512, "max", "padding"),
    (256, 2, 32, "mean", ""),
    (256, 8, 32, "max", "padding"),
    (128, 4, 32, "mean", "cap"),
    (256, 2, 32, "max", "padding cap"),
    (256, 8, 32, "mean", "cap"),
    (64, 4, 32, "mean", "mask padding"),
    (128, 4, 32, "max", "bias"),
    (128, 8, 32, "mean", "bias cap"),
    (256, 2, 32, "mean", "mask padding"),
    (256, 8, 32, "max", "bias cap padding"),
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
        for head_dim, group, window, reduction, extra in _SHAPES:
            if dtype == "fp16" and head_dim != 128:
                continue
            config = config_of(target, itemsize, head_dim, masked="mask" in extra or "bias" in extra)
            what = f"{dtype} D{head_dim} G{group} W{window} {extra}".rstrip()
            absent: dict[str, int | None] = {"stride_qd": 1, "stride_kd": 1}
            if "cap" not in extra:
                absent["softcap"] = None
            kind = 1 if "mask" in extra else 2 if "bias" in extra else 0
            absent |= {"MASK": kind, "stride_mm": 1}
            if kind == 0:
                absent |= {"mask": None, "stride_mb": 0, "stride_mh": 0, "stride_mt": 0, "stride_mm": 0}
            if "padding" not in extra:
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
                        {
                            argument: _type(argument, dtype, kind)
                            for argument in function.arg_names
                            if argument not in values
                        },
                        values,
                        blocks.num_warps,
                        blocks.num_stages,
                        tensor_cores=itemsize == 2,
                    )
                )
    return found


def _type(argument: str, dtype: str, mask: int) -> str:
    """Return Triton's type of an argument; rows of keys and queries start at multiples of 16 bytes."""
    if argument in ("query", "key"):
        return f"*{dtype}"
    if argument == "mask":
        return "*i1" if mask == 1 else f"*{dtype}"
    if argument == "padding":
        return "*u8"
    if argument in ("partials", "lse", "scores"):
        return "*fp32"
    if argument in ("scale", "softcap", "to_base_2"):
        return "fp32"
    return "i32:16" if argument.startswith(("stride_q", "stride_k")) else "i32"
