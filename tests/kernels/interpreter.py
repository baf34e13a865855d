"""Arithmetic of Triton's interpreter, repaired for tests.

The interpreter keeps bfloat16 as the uint16 of its bits and computes with these: sums, products, comparisons and dots
of bfloat16 are silently wrong, and float32 is truncated where hardware rounds to nearest even. What overflows, or has
no number for a result, makes NumPy warn. Nothing but tests runs kernels in the interpreter, so nothing but tests needs
this.
"""
# The interpreter's internals have no types.
# pyright: basic

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np

__all__ = ["repaired_arithmetic", "repaired_bfloat16"]


@contextmanager
def repaired_arithmetic() -> Generator[None]:
    """Let Triton's interpreter compute as hardware does: bfloat16 correctly, infinities and NaN without a warning."""
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__

    def quiet(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return run(*args, **kwargs)

    with repaired_bfloat16(), mock.patch.object(interpreter.GridExecutor, "__call__", quiet):
        yield


@contextmanager
def repaired_bfloat16() -> Generator[None]:
    """Let Triton's interpreter compute bfloat16 as hardware does: in float32, rounded to nearest even."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bfloat16(value: Any) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def widened(value: Any) -> Any:
        if not is_bfloat16(value):
            return value
        bits = np.asarray(value.data).astype(np.uint32) << np.uint32(16)
        return handle(bits.view(np.float32), tl.float32)

    def narrowed(data: np.ndarray) -> Any:
        bits = np.asarray(data, dtype=np.float32, order="C").view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return handle(np.where(np.isnan(data), np.uint16(0x7FC0), rounded.astype(np.uint16)), tl.bfloat16)

    def elementwise(original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method that computes ``op(*operands)``; all operands have one type."""

        def compute(self: Any, *arguments: Any) -> Any:
            *operands, op = arguments
            # A choice moves bits: it needs no repair, and its condition is no bfloat16.
            if op is np.where or not any(map(is_bfloat16, operands)):
                return original(self, *arguments)
            result = op(*(widened(operand).data for operand in operands))
            return handle(result, tl.int1) if result.dtype == np.bool_ else narrowed(result)

        return compute

    def cast(original: Callable[..., Any]) -> Callable[..., Any]:
        def convert(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
            if target.scalar == tl.bfloat16 and not is_bfloat16(source):
                return narrowed(np.asarray(source.data))
            if is_bfloat16(source) and target.scalar != tl.bfloat16:
                wide = widened(source)
                return wide if target.scalar == tl.float32 else original(self, wide, target, *rounding)
            return original(self, source, target, *rounding)

        return convert

    def fused(original: Callable[..., Any]) -> Callable[..., Any]:
        def compute(self: Any, left: Any, right: Any, addend: Any) -> Any:
            result = original(self, widened(left), widened(right), widened(addend))
            return narrowed(result.data) if is_bfloat16(addend) else result

        return compute

    def dot(original: Callable[..., Any]) -> Callable[..., Any]:
        def compute(self: Any, left: Any, right: Any, accumulator: Any, *how: Any, **named: Any) -> Any:
            result = original(self, widened(left), widened(right), widened(accumulator), *how, **named)
            return narrowed(result.data) if is_bfloat16(accumulator) else result

        return compute

    repairs = {
        "unary_op": elementwise,
        "binary_op": elementwise,
        "ternary_op": elementwise,
        "create_fma": fused,
        "create_dot": dot,
        "cast_impl": cast,
        "create_fp_to_fp": cast,
    }
    with ExitStack() as stack:
        for name, repair in repairs.items():
            stack.enter_context(mock.patch.object(builder, name, repair(getattr(builder, name))))
        yield
