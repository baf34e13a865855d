"""Kernels of ``adakv::extend_v2`` as launched for the shapes of known models; it also launches those of other ops."""

from __future__ import annotations

from typing import Final

import torch

from adakv_compile.kernels._support import Target
from adakv_compile.kernels.compact.tuning import config_of
from adakv_compile.kernels.compact.tuning import constants_of as gather_constants_of
from adakv_compile.kernels.extend.triton import gather_held, score_held
from adakv_compile.kernels.extend.tuning import Scoring, blocks_of, constants_of
from benchmarks.aot.kernel import Kernel

__all__ = ["kernels"]

_NAMES: Final = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Dtype, head dimension, group, window, reduction over the group, and what hides entries or caps logits: rows that make
# one block, several blocks of whole windows, and several of parts of one.
_SHAPES: Final = (
    (torch.bfloat16, 64, 8, 32, "max", "window"),
    (torch.bfloat16, 80, 1, 32, "mean", "padding"),
    (torch.bfloat16, 128, 4, 32, "mean", ""),
    (torch.bfloat16, 128, 4, 32, "max", "window padding"),
    (torch.bfloat16, 128, 8, 64, "mean", "mask"),
    (torch.bfloat16, 128, 2, 256, "max", "bias"),
    (torch.bfloat16, 256, 8, 32, "max", "window"),
    (torch.bfloat16, 128, 4, 32, "mean", "cap"),
    (torch.bfloat16, 256, 2, 32, "max", "window cap"),
    (torch.float32, 256, 2, 32, "max", "window cap"),
    (torch.float16, 128, 4, 32, "mean", ""),
    (torch.float32, 64, 8, 32, "mean", "padding"),
    (torch.float32, 128, 4, 32, "max", ""),
    (torch.float32, 256, 2, 32, "mean", "bias"),
)


def kernels(capability: tuple[int, int]) -> list[Kernel]:
    """Return what a device of ``capability`` launches."""
    return [
        kernel for shape in _SHAPES for kernel in (_scoring(capability, *shape), _gathering(capability, *shape[:2]))
    ]


def _scoring(
    capability: tuple[int, int], dtype: torch.dtype, dim: int, group: int, window: int, gqa: str, hidden: str
) -> Kernel:
    blocks = blocks_of(Target(capability, 1), dtype.itemsize, dim, group, window)
    mask = torch.bool if "mask" in hidden else dtype if "bias" in hidden else None
    scoring = Scoring(
        batch=1,
        num_heads=8,
        group=group,
        rows=window,
        key_dim=dim,
        scored=True,
        largest=gqa == "max",
        causal=True,
        window="window" in hidden,
        mask=mask,
        padded="padding" in hidden,
    )
    # Triton takes a stride of 1 for a constant.
    constants = constants_of(blocks, scoring) | {"query_stride_d": 1}
    types = {"mask": "*u1" if mask == torch.bool else f"*{_NAMES[dtype]}", "padding": "*u1"}
    absent = {"mask": mask is None, "padding": not scoring.padded, "softcap": "cap" not in hidden}
    constants |= {name: None for name, missing in absent.items() if missing}
    names = [name for name in score_held.arg_names if name not in constants]
    return Kernel(
        f"score {_NAMES[dtype]} D{dim} G{group} W{window} {gqa} {hidden}".rstrip(),
        score_held,
        {name: types.get(name) or _type(name, _NAMES[dtype]) for name in names},
        constants,
        blocks.num_warps,
        blocks.num_stages,
        tensor_cores=dtype.itemsize == 2,
    )


def _gathering(capability: tuple[int, int], dtype: torch.dtype, dim: int) -> Kernel:
    config = config_of(Target(capability, 1), dtype.itemsize, dim, dim, 8)
    constants = gather_constants_of(config, dim, dim, 8)
    names = [name for name in gather_held.arg_names if name not in constants]
    return Kernel(
        f"gather {_NAMES[dtype]} D{dim}",
        gather_held,
        {name: _type(name, _NAMES[dtype]) for name in names},
        constants,
        config.num_warps,
        num_stages=1,
    )


def _type(argument: str, dtype: str) -> str:
    """Return Triton's type of an argument; rows of keys and queries start at multiples of 16 bytes."""
    if argument in ("offsets", "positions", "source", "new_positions", "new_offsets"):
        return "*i32"
    if argument in ("sums", "scores"):
        return "*fp32"
    if argument == "held":
        return "*u8"
    if argument in ("scale", "softcap"):
        return "fp32"
    if argument.startswith(("query_stride", "key_stride", "value_stride")):
        return "i64:16"
    if argument in ("query", "key_new", "value_new") or argument.endswith(("keys", "values")):
        return f"*{dtype}"
    return "i32"
