"""How kernels are launched, and the few device functions they share."""
# Device code is compiled by Triton, not checked by Python's type checkers: its values have no Python types.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["LOG2E", "block_of", "dot", "factors_of", "launch", "scaled"]

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    device: torch.device,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Launch a kernel on the device of its tensors, which need not be the current one.

    Args:
        kernel: A ``@triton.jit`` function.
        grid: Programs along each axis; nothing is launched if one is 0.
        *args: Its arguments in order: tensors, numbers, None.
        device: Where its tensors are.
        num_warps: Warps of a program.
        num_stages: Stages of pipelined loops.
        **constants: Its ``tl.constexpr`` parameters, and options of the compiler such as ``maxnreg``.
    """
    if 0 in grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)


def block_of(size: int, least: int = 16) -> int:
    """Return the power of two that covers ``size`` and that ``tl.dot`` accepts."""
    return max(least, triton.next_power_of_2(size))


def factors_of(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """Return the factors that :func:`scaled` takes: those of products, and of what is capped, if it is."""
    log2_e = math.log2(math.e)
    return (scale * log2_e, None) if softcap is None else (scale / softcap, softcap * log2_e)


@triton.jit
def dot(left, right):
    """Product with float32 accumulation; exact products for float32, which tensor cores would round to tf32."""
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def scaled(products, scale, softcap):
    """Return the logits of products in units of log 2, capped unless `softcap` is None; see :func:`factors_of`."""
    logits = products * scale
    if softcap is not None:
        # The exponential alone would lose the digits of logits far below the cap.
        square = logits * logits
        near = logits - logits * square * (1.0 / 3.0 - square * (2.0 / 15.0))
        far = 1.0 - 2.0 / (tl.exp2(logits * (2.0 * LOG2E)) + 1.0)
        logits = tl.where(square < 0.01, near, far) * softcap
    return logits
