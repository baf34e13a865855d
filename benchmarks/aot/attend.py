"""The attention kernel as a layer launches it that reads another layer's store."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.aot.decode_attention import STEP, Call, kernel_of
from benchmarks.aot.kernel import Kernel

__all__ = ["kernels"]


def _calls() -> list[Call]:
    step = replace(STEP, append=False, stored=True)
    chunk = replace(step, count=64)
    large = replace(step, key_dim=256, value_dim=256)
    return [
        Call("attend step", step),
        Call("attend step, D256", large),
        Call("attend step, D256, padding, window", replace(large, padded=True, window=True)),
        Call("attend step, float mask", replace(step, mask=torch.bfloat16)),
        Call("attend step, soft cap, sinks", step, capped=True),
        Call("attend step, fp32", replace(step, dtype=torch.float32)),
        Call("attend 5 tokens, padding, window", replace(step, count=5, padded=True, window=True)),
        Call("attend 64 tokens", chunk),
        Call("attend 64 tokens, D256, padding, window", replace(large, count=64, padded=True, window=True)),
        Call("attend 64 tokens, fp32", replace(chunk, dtype=torch.float32)),
    ]


def kernels(capability: tuple[int, int]) -> list[Kernel]:
    """Return the kernels that the tuning table launches on an architecture."""
    return [kernel_of(capability, call) for call in _calls()]
