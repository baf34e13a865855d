"""Facts about symbolic sizes, found without leaving a trace in the shape environment."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from adakv_compile.symbolic.sizes import Sizes


@pytest.fixture
def env() -> ShapeEnv:
    return ShapeEnv()


def size(env: ShapeEnv, hint: int, name: str) -> torch.SymInt:
    source = ConstantSource(name)
    symbol = env.create_symbol(hint, source, DimDynamic.DYNAMIC, None)
    made = env.create_symintnode(symbol, hint=hint, source=source)
    assert isinstance(made, torch.SymInt)
    return made


def test_plain_numbers() -> None:
    sizes = Sizes()
    assert sizes.is_empty
    assert sizes.equal(3, 3)
    assert not sizes.equal(3, 4)
    assert sizes.at_most(3, 4)
    assert not sizes.at_most(4, 3)


def test_sums_are_compared_as_expressions(env: ShapeEnv) -> None:
    a, b = size(env, 5, "a"), size(env, 7, "b")
    sizes = Sizes.of([3, a])
    assert sizes.equal(a + b, b + a)
    assert sizes.equal((a + b) - a, b)
    assert sizes.equal(a * (b + 1), a * b + a)
    assert not sizes.equal(a, b)
    assert not sizes.equal(a, 5)  # true of the example, not of the program
    assert sizes.at_most(a, a + 1)
    assert not sizes.at_most(a, b)


def test_ranges_and_guards_are_used(env: ShapeEnv) -> None:
    a, b = size(env, 5, "a"), size(env, 7, "b")
    sizes = Sizes.of([a])
    assert sizes.at_most(2, a)  # sizes are specialised for zero and one
    assert not sizes.at_most(3, a)
    torch._check(a <= b)
    assert Sizes.of([a]).at_most(a, b)


def test_a_proved_equality_replaces(env: ShapeEnv) -> None:
    a, b = size(env, 5, "a"), size(env, 5, "b")
    expr = Sizes.of([a]).expr(a)
    assert bool(a == b)  # what a guard does: from here on they are the same
    assert Sizes.of([a]).equal(expr, Sizes.of([a]).expr(b))


def test_extrema_are_decided_where_ranges_allow_it(env: ShapeEnv) -> None:
    a = size(env, 9, "a")
    largest = torch.sym_max(a - 7, 0)
    undecided = Sizes.of([a]).expr(largest)
    assert undecided.free_symbols
    assert not Sizes.of([a]).equal(largest, a - 7)
    assert bool(a >= 7)
    sizes = Sizes.of([a])
    assert sizes.equal(largest, a - 7)
    assert sizes.equal(torch.sym_min(a, 3), 3)


def test_nothing_is_guarded(env: ShapeEnv) -> None:
    a, b = size(env, 5, "a"), size(env, 7, "b")
    sizes = Sizes.of([a])
    for fact in (sizes.equal, sizes.at_most):
        fact(a, b)
        fact(a + 2, b)
        fact(torch.sym_max(a, b), b)
    assert not env.guards
    assert not env.replacements


def test_expressions_of_sympy_are_accepted(env: ShapeEnv) -> None:
    a = size(env, 5, "a")
    sizes = Sizes.of([a])
    assert sizes.equal(sizes.expr(a) + sympy.Integer(1), a + 1)
