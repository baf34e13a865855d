"""The op dialect that rewritten graphs call; importing this package registers all of it.

One folder per op: ``op.py`` is the contract (schema, fake kernel, table), ``reference.py`` the implementation in plain
PyTorch, which runs on any device and is what faster kernels are tested against; ``gpu.py`` launches the Triton kernels
of ``triton.py`` with the constants of ``tuning.py``, ``cpu.py`` is for CPUs, ``native.cpp`` its kernel in C++,
``entry.cpp`` the dispatcher's way to it.
"""

from __future__ import annotations

from typing import Final

import torch

from adakv_compile.kernels import (
    attend,
    attention,
    compact,
    decode_attention,
    entries,
    extend,
    lay_out,
    observe,
    padded_attention,
    prefill_attention,
    retain,
    select,
)
from adakv_compile.kernels._registration import KERNELS, Kernels, OpSpec
from adakv_compile.kernels._support import Subject, why_unsupported
from adakv_compile.kernels.decode_attention import native

__all__ = [
    "KERNELS",
    "SPECS",
    "Kernels",
    "OpSpec",
    "Subject",
    "attend",
    "attention",
    "build_ahead",
    "compact",
    "decode_attention",
    "entries",
    "extend",
    "lay_out",
    "observe",
    "padded_attention",
    "prefill_attention",
    "retain",
    "select",
    "why_unsupported",
]

SPECS: Final[tuple[OpSpec, ...]] = (
    observe.SPEC,
    select.SPEC,
    compact.SPEC,
    decode_attention.SPEC,
    attend.SPEC,
    extend.SPEC,
    prefill_attention.SPEC,
    padded_attention.SPEC,
    attention.SPEC,
    entries.SPEC,
    lay_out.SPEC,
    retain.SPEC,
)
"""Every op of the dialect."""


def build_ahead(kernels: Kernels, device: torch.device) -> None:
    """Begin to build what an implementation is compiled from, so that no step has to wait for it.

    Args:
        kernels: The implementation that graphs will call.
        device: Where they will run.
    """
    if kernels == "auto" and device.type == "cpu":
        native.build_ahead()
