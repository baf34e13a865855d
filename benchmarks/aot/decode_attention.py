"""The attention kernel as decoding and chunked prefill launch it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from adakv_compile.kernels._support import Target
from adakv_compile.kernels.decode_attention.triton import attend
from adakv_compile.kernels.decode_attention.tuning import Shape, plan
from benchmarks.aot.kernel import Kernel

__all__ = ["STEP", "Call", "kernel_of", "kernels"]

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.bool: "u8"}
_POINTERS = ("query", "key_new", "value_new", "keys", "values", "tail_keys", "tail_values", "output")
_INDICES = ("offsets", "positions", "cursor", "counters")
_INTEGERS = ("tail_length", "prefix_length", "count", "num_all_heads", "extra", "slots", "capacity", "window")
_COLUMNS = ("mask_columns", "padding_columns")
_PROCESSORS = {(8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}


@dataclass(frozen=True)
class Call:
    """A call and what the name of its kernel says of it; with a soft cap and sinks, or neither."""

    name: str
    shape: Shape
    capped: bool = False


STEP: Final = Shape(
    dtype=torch.bfloat16,
    batch=1,
    num_heads=8,
    group=4,
    count=1,
    key_dim=128,
    value_dim=128,
    slots=8 * 13107,
    capacity=256,
    causal=True,
)
"""One token over a long prefix."""


def _calls() -> list[Call]:
    step = STEP
    chunk = replace(step, count=64)
    prompt = replace(step, count=4096, append=False)
    calls = {
        "step": step,
        "step, small": replace(step, slots=8 * 1024),
        "step, D64": replace(step, key_dim=64, value_dim=64),
        "step, D80": replace(step, key_dim=80, value_dim=80),
        "step, D256": replace(step, key_dim=256, value_dim=256),
        "step, Dk192 Dv128": replace(step, key_dim=192),
        "step, 64 rows": replace(step, batch=64),
        "step, padding, window": replace(step, padded=True, window=True),
        "step, float mask, padding": replace(step, mask=torch.bfloat16, padded=True),
        "step, group 32": replace(step, group=32),
        "5 tokens": replace(step, count=5),
        "64 tokens": chunk,
        "64 tokens, D64": replace(chunk, key_dim=64, value_dim=64),
        "64 tokens, D256": replace(chunk, key_dim=256, value_dim=256),
        "64 tokens, float mask, padding": replace(chunk, mask=torch.bfloat16, padded=True),
        "4096 tokens": prompt,
        "4096 tokens, D256": replace(prompt, key_dim=256, value_dim=256),
        "4096 tokens, padding, window": replace(prompt, padded=True, window=True),
    }
    exact = ("step", "step, D256", "step, padding, window", "5 tokens", "64 tokens", "4096 tokens, D256")
    calls |= {f"{name}, fp32": replace(calls[name], dtype=torch.float32) for name in exact}
    capped = (
        "step",
        "step, D256",
        "step, padding, window",
        "step, fp32",
        "64 tokens",
        "64 tokens, D256",
        "4096 tokens",
    )
    return [
        *(Call(f"decode {name}", shape) for name, shape in calls.items()),
        *(Call(f"decode {name}, soft cap, sinks", calls[name], capped=True) for name in capped),
    ]


def kernel_of(capability: tuple[int, int], call: Call) -> Kernel:
    """Return what a call launches on an architecture."""
    shape = call.shape
    chosen = plan(Target(capability, _PROCESSORS[capability]), shape)
    # Those of heads and tokens are multiples of the head dimension; a mask has any number of columns.
    strides = {
        name: "i32" if name.startswith(("mask", "padding")) else "i32:16"
        for name in attend.arg_names
        if "_stride_" in name
    }
    types = dict.fromkeys(_POINTERS, f"*{_TYPES[shape.dtype]}")
    types |= dict.fromkeys(_INDICES, "*i32") | dict.fromkeys(("sums", "partial", "partial_sums"), "*fp32")
    types |= (
        dict.fromkeys((*_INTEGERS, *_COLUMNS), "i32")
        | strides
        | {"scale": "fp32", "softcap": "fp32", "padding": "*i1", "sinks": "*bf16"}
    )
    # What the launcher passes as None, and the strides that Triton makes constants of.
    absent: dict[str, Any] = {}
    if not call.capped:
        absent |= {"softcap": None, "sinks": None}
    if shape.mask is None:
        absent["mask"] = None
    else:
        types["mask"] = "*i1" if shape.mask == torch.bool else f"*{_TYPES[shape.mask]}"
    if not shape.padded:
        absent["padding"] = None
    if shape.stored:
        absent |= {"key_new": None, "value_new": None, "sums": None}
        if not chosen.split:
            absent["counters"] = None
    elif shape.append:
        absent["sums"] = None
    else:
        absent["cursor"] = None
        if not chosen.split:
            absent["counters"] = None
    if not chosen.split:
        absent |= {"partial": None, "partial_sums": None}
    unit = {f"{name}_stride_d": 1 for name in ("query", "key", "value")} | {"mask_stride_m": 1, "padding_stride_m": 1}
    constants = absent | unit | chosen.constants
    return Kernel(
        name=call.name,
        function=attend,
        types={name: kind for name, kind in types.items() if name not in constants},
        constants=constants,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        tensor_cores=shape.dtype != torch.float32,
        maxnreg=chosen.maxnreg,
    )


def kernels(capability: tuple[int, int]) -> list[Kernel]:
    """Return the kernels that the tuning table launches on an architecture."""
    return [kernel_of(capability, call) for call in _calls()]
