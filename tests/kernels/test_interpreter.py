"""Triton's interpreter, as repaired for tests, computes bfloat16 like PyTorch."""
# Device code has no Python types.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from adakv_compile.kernels._support import interpreting
from tests.kernels.interpreter import repaired_bfloat16

pytestmark = pytest.mark.skipif(not interpreting(), reason="Triton runs natively here")

SIZE = 4096
ROWS, COLUMNS, INNER = 16, 32, 64


@triton.jit
def _elementwise(x, y, total, product, difference, negated, absolute, less, larger, SIZE: tl.constexpr):  # noqa: ANN001, ANN202, N803
    index = tl.arange(0, SIZE)
    left, right = tl.load(x + index), tl.load(y + index)
    tl.store(total + index, left + right)
    tl.store(product + index, left * right)
    tl.store(difference + index, left - right)
    tl.store(negated + index, -left)
    tl.store(absolute + index, tl.abs(left))
    tl.store(less + index, left < right)
    tl.store(larger + index, tl.maximum(left, right))


@triton.jit
def _cast(source, target, SIZE: tl.constexpr):  # noqa: ANN001, ANN202, N803
    index = tl.arange(0, SIZE)
    tl.store(target + index, tl.load(source + index).to(target.dtype.element_ty))


@triton.jit
def _dot(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # noqa: ANN001, ANN202, N803
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(left, right, input_precision="ieee"))


def numbers() -> torch.Tensor:
    """Random float32 bits of any exponent, with infinities, zeros, ties of rounding and not-a-numbers."""
    drawn = torch.randint(-(2**31), 2**31, (SIZE,), dtype=torch.int32)
    drawn[:1024] = (drawn[:1024] & ~0xFFFF) | 0x8000
    drawn[1024:1034] = torch.tensor([0, -(2**31), 0x7F800000, -0x800000, 0x7FC00000, 0x7F800001, 1, 2, 0x7F7FFFFF, -1])
    return drawn.view(torch.float32)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_arithmetic() -> None:
    x, y = torch.randn(SIZE).bfloat16(), torch.randn(SIZE).bfloat16()
    results = [torch.empty_like(x) for _ in range(5)]
    less, larger = torch.empty(SIZE, dtype=torch.bool), torch.empty_like(x)
    _elementwise[(1,)](x, y, *results, less, larger, SIZE=SIZE)
    for result, expected in zip(results, (x + y, x * y, x - y, -x, x.abs()), strict=True):
        assert_equal(result, expected)
    assert_equal(less, x < y)
    assert_equal(larger, torch.maximum(x, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int32])
def test_casts(dtype: torch.dtype) -> None:
    source = torch.randint(-1000, 1000, (SIZE,), dtype=dtype) if dtype == torch.int32 else numbers().to(dtype)
    half = torch.empty(SIZE, dtype=torch.bfloat16)
    _cast[(1,)](source, half, SIZE=SIZE)
    assert_equal(half, source.to(torch.float32).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_casts_back(dtype: torch.dtype) -> None:
    source, result = torch.randn(SIZE).bfloat16(), torch.empty(SIZE, dtype=dtype)
    _cast[(1,)](source, result, SIZE=SIZE)
    assert_equal(result, source.to(dtype))


def test_dot() -> None:
    """Products of small integers are exact in float32: the sum's order can't matter."""
    a, b = (torch.randint(-8, 9, shape).bfloat16() for shape in ((ROWS, INNER), (INNER, COLUMNS)))
    c = torch.empty(ROWS, COLUMNS)
    _dot[(1,)](a, b, c, ROWS, COLUMNS, INNER)
    assert_equal(c, a.float() @ b.float())


@triton.jit
def _log(source, target, SIZE: tl.constexpr):  # noqa: ANN001, ANN202, N803
    index = tl.arange(0, SIZE)
    tl.store(target + index, tl.log2(tl.load(source + index)))


def test_results_that_are_no_numbers_cause_no_warning() -> None:
    source, result = torch.tensor([0.0, -1.0, 1.0, torch.inf]), torch.empty(4)
    _log[(1,)](source, result, SIZE=4)
    assert_equal(result, source.log2())


def test_the_repair_ends() -> None:
    from triton.runtime import interpreter

    before = dict(vars(interpreter.InterpreterBuilder))
    with repaired_bfloat16():
        assert dict(vars(interpreter.InterpreterBuilder)) != before
    assert dict(vars(interpreter.InterpreterBuilder)) == before
