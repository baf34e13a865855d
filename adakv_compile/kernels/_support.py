"""Which calls the Triton kernels serve, and what they need to know of the device; nothing here imports Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Final

import torch

__all__ = [
    "DTYPES",
    "INTERPRETER",
    "MAX_HEAD_DIM",
    "MIN_CAPABILITY",
    "Subject",
    "Target",
    "interpreting",
    "target_of",
    "why_unsupported",
]

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM: Final = 256
MIN_CAPABILITY: Final = (8, 0)


@dataclass(frozen=True, slots=True)
class Subject:
    """What of a call decides whether Triton serves it.

    Attributes:
        device: Of its tensors.
        dtype: Of keys and values, or of scores.
        head_dims: Of keys and values; sizes may be symbolic.
    """

    device: torch.device
    dtype: torch.dtype
    head_dims: tuple[int | torch.SymInt, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """What tuning tables go by.

    Attributes:
        capability: Of CUDA, as in ``(9, 0)``; ``(0, 0)`` for Triton's interpreter.
        processors: Streaming multiprocessors.
    """

    capability: tuple[int, int]
    processors: int


INTERPRETER: Final = Target((0, 0), 2)
"""Few processors, so that small cases still split heads over several programs."""


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors, as it does under ``TRITON_INTERPRET=1``."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target((properties.major, properties.minor), properties.multi_processor_count)


def target_of(device: torch.device) -> Target:
    """Return what kernels on ``device`` are tuned for."""
    if device.type != "cuda":
        return INTERPRETER
    return _cuda_target(torch.cuda.current_device() if str(device) == "cuda" else device.index)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_unsupported(subject: Subject) -> str | None:
    """Return why Triton does not serve a call, None if it does."""
    if subject.dtype not in DTYPES:
        return f"dtype {subject.dtype} is not one of bfloat16, float16, float32"
    for size in subject.head_dims:
        if not isinstance(size, int):
            return f"head dimension {size} is not a number"
        if size > MAX_HEAD_DIM:
            return f"head dimension {size} is above {MAX_HEAD_DIM}"
    return _why_no_triton(subject.device, interpreting())


@functools.cache
def _why_no_triton(device: torch.device, interpreted: bool) -> str | None:
    if not _has_triton():
        return "the package triton is not installed"
    if device.type == "cpu":
        return None if interpreted else "Triton runs on a CPU only in its interpreter, TRITON_INTERPRET=1"
    if device.type != "cuda" or getattr(torch.version, "hip", None) is not None:
        return f"device type {device.type} of this PyTorch is not CUDA"
    capability = target_of(device).capability
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return None
