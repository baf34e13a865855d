"""The attention kernel as decoding and chunked prefill launch it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from adakv_compile.kernels._support import Target
from adakv_compile.kernels.decode_attention.triton import attend
from adakv_compile.kernels.decode_attention.tuning import Shape, plan
from benchmarks.aot.kernel import Kernel

__all__ = ["kernels"]

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.bool: "u8"}
_POINTERS = ("query", "key_new", "value_new", "keys", "values", "tail_keys", "tail_values", "output")
_INDICES = ("offsets", "positions", "cursor", "counters")
_INTEGERS = ("tail_length", "prefix_length", "count", "num_all_heads", "extra", "slots", "capacity", "window")
_COLUMNS = ("mask_columns", "padding_columns")
_PROCESSORS = {(8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}


@dataclass(frozen=True)
class _Call:
    """A call and what the name of its kernel says of it."""

    name: str
    shape: Shape


def _calls() -> list[_Call]:
    one = Shape(
        torch.bfloat16, batch=1, num_heads=8, group=4, count=1, key_dim=128, value_dim=128, slots=0, capacity=256
    )
    one = replace(one, causal=True)
    small, large = replace(one, slots=8 * 1024), replace(one, slots=8 * 13107)
    found = [_Call("step, small", small), _Call("step, large", large)]
    found += [_Call(f"step, D{dim}", replace(large, key_dim=dim, value_dim=dim)) for dim in (32, 64, 80, 96, 112, 256)]
    found += [
        _Call("step, Dk192 Dv128", replace(large, key_dim=192)),
        _Call("step, fp16", replace(large, dtype=torch.float16)),
        _Call("step, 64 rows of the batch", replace(large, batch=64)),
        _Call("step, padding, window", replace(large, padded=True, window=True)),
        _Call("step, bool mask, padding", replace(large, padded=True, mask=torch.bool)),
        _Call("step, float mask", replace(large, mask=torch.bfloat16)),
        _Call("step, group 1", replace(large, num_heads=32, group=1)),
        _Call("step, group 32", replace(large, group=32)),
        _Call("step, group 128", replace(large, num_heads=1, group=128)),
        _Call("5 tokens", replace(large, count=5)),
    ]
    for name, changed in (
        ("64 tokens", replace(large, count=64)),
        ("64 tokens, float mask", replace(large, count=64, mask=torch.bfloat16, padded=True)),
        ("64 tokens, D256", replace(large, count=64, key_dim=256, value_dim=256)),
        ("4096 tokens", replace(large, count=4096, append=False)),
        ("4096 tokens, D64", replace(large, count=4096, append=False, key_dim=64, value_dim=64)),
        ("4096 tokens, D256", replace(large, count=4096, append=False, key_dim=256, value_dim=256)),
        ("4096 tokens, padding, window", replace(large, count=4096, append=False, padded=True, window=True)),
    ):
        found.append(_Call(name, changed))
    return found + [
        _Call(f"{call.name}, fp32", replace(call.shape, dtype=torch.float32))
        for call in found
        if call.shape.dtype == torch.bfloat16 and call.shape.mask is None
    ]


def _kernel(capability: tuple[int, int], call: _Call) -> Kernel:
    shape = call.shape
    chosen = plan(Target(capability, _PROCESSORS[capability]), shape)
    strides = {name: "i32" for name in attend.arg_names if "_stride_" in name}
    types = dict.fromkeys(_POINTERS, f"*{_TYPES[shape.dtype]}")
    types |= dict.fromkeys(_INDICES, "*i32") | dict.fromkeys(("sums", "partial", "partial_sums"), "*fp32")
    types |= dict.fromkeys((*_INTEGERS, *_COLUMNS), "i32") | strides | {"scale": "fp32", "padding": "*i1"}
    # What the launcher passes as None, and the strides that Triton makes constants of.
    absent: dict[str, Any] = {}
    if shape.mask is None:
        absent["mask"] = None
    else:
        types["mask"] = "*i1" if shape.mask == torch.bool else f"*{_TYPES[shape.mask]}"
    if not shape.padded:
        absent["padding"] = None
    if shape.append:
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
        name=f"decode {call.name}",
        function=attend,
        types={name: kind for name, kind in types.items() if name not in constants},
        constants=constants,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        tensor_cores=shape.dtype != torch.float32,
    )


def kernels(capability: tuple[int, int]) -> list[Kernel]:
    """Return the kernels that the tuning table launches on an architecture."""
    return [_kernel(capability, call) for call in _calls()]
