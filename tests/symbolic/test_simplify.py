"""Every simplification rule, on every small value, and on random expressions."""

from __future__ import annotations

import random
from functools import cache

import pytest
import sympy
import torch
from torch import Tensor

from adakv_compile.symbolic.evaluate import evaluate
from adakv_compile.symbolic.expr import (
    Abs,
    And,
    Bool,
    Compare,
    Expr,
    Float,
    FloorDiv,
    Iota,
    Load,
    Mod,
    Not,
    Or,
    Size,
    Where,
    add,
    cost,
    integer,
    kind_of,
    scale,
    show,
)
from adakv_compile.symbolic.simplify import RULES, Simplifier

SIZE = sympy.Symbol("s", integer=True)
SHAPE = (5, 7)
EXPRESSIONS = 2400


class Generator:
    """Makes random expressions of each kind."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def boolean(self, depth: int) -> Expr:
        if depth == 0:
            return self.random.choice([Bool(True), Bool(False), Load("flags", (Iota(1), Iota(0)), "bool")])
        match self.random.randrange(8):
            case 0:
                return Not(self.boolean(depth - 1))
            case 1 | 2:
                kind = self.random.choice([And, Or])
                return kind(tuple(self.boolean(depth - 1) for _ in range(self.random.randrange(4))))
            case 3:
                return Where(self.boolean(depth - 1), self.boolean(depth - 1), self.boolean(depth - 1))
            case 4:
                condition = self.literal()
                other = self.boolean(depth - 1)
                return self.random.choice(
                    [And((condition, Or((Not(condition), other)))), Or((And((condition, other)), condition))]
                )
            case 5:
                signed = scale(Abs(self.literal_sum()), sympy.Integer(self.random.choice([1, -1])))
                return Compare("le", add(signed, integer(-1)), integer(0))
            case _:
                side = self.random.choice([self.integer, self.integer, self.float])
                relation = self.random.choice(["lt", "le", "gt", "ge", "eq", "ne"])
                return Compare(relation, side(depth - 1), side(depth - 1))

    def literal_sum(self) -> Expr:
        return add(Iota(0), self.random.choice([Iota(1), Size(SIZE)]), self.random.choice([1, -1]))

    def literal(self) -> Expr:
        flags = Load("flags", (Iota(1), Iota(0)), "bool")
        return self.random.choice([flags, Not(flags), Compare("le", self.literal_sum(), integer(0))])

    def integer(self, depth: int) -> Expr:
        if depth == 0:
            leaves = [Iota(0), Iota(1), Size(SIZE), Load("numbers", (Iota(1), Iota(0)), "int")]
            return self.random.choice([*leaves, integer(self.random.randrange(-3, 4))])
        inner = self.integer(depth - 1)
        match self.random.randrange(6):
            case 0:
                return FloorDiv(inner, self.random.randrange(1, 4))
            case 1:
                return Mod(inner, self.random.randrange(1, 4))
            case 2:
                return Abs(inner)
            case 3:
                return Where(self.boolean(depth - 1), inner, self.integer(depth - 1))
            case _:
                return add(inner, scale(self.integer(depth - 1), sympy.Integer(self.random.randrange(-2, 3))))

    def float(self, depth: int) -> Expr:
        if depth == 0:
            load = Load("reals", (Iota(1), Iota(0)), "float")
            return self.random.choice([load, Float(0.0), Float(1.0), Float(-float("inf"))])
        if self.random.random() < 0.3:
            load = Load("reals", (Iota(1), Iota(0)), "float")
            return Where(Compare("ne", load, Float(0.0)), self.float(depth - 1), load)
        return Where(self.boolean(depth - 1), self.float(depth - 1), self.float(depth - 1))


@cache
def leaves() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "flags": torch.rand(SHAPE, generator=generator) > 0.5,
        "numbers": torch.randint(-3, 4, SHAPE, generator=generator),
        "reals": torch.randint(-1, 2, SHAPE, generator=generator).float(),
    }


def value(expr: Expr, size: int) -> Tensor:
    return evaluate(expr, SHAPE, leaves(), {"s": size}).expand(SHAPE)


@cache
def expressions() -> list[Expr]:
    generator = Generator(0)
    makers = [generator.boolean, generator.integer, generator.float]
    return [makers[i % 3](1 + (i // 3) % 3) for i in range(EXPRESSIONS)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_preserves_every_value(rule: object) -> None:
    """Rules see operands in normal form, as in use; a rule that never applies isn't tested, so that fails as well."""
    simplify, applied = Simplifier(), 0
    for whole in expressions():
        expr = simplify._with_simple_operands(whole)
        result = rule.apply(expr)
        if result is None or result == expr:
            continue
        applied += 1
        assert kind_of(result) == kind_of(expr)
        if applied <= 60:
            size = (-2, 3)[applied % 2]
            assert torch.equal(value(expr, size), value(result, size)), f"{show(expr)} -> {show(result)}"
    assert applied >= 10


def test_simplifying_preserves_every_value() -> None:
    simplify = Simplifier()
    for expr in expressions()[:800]:
        simple = simplify(expr)
        assert torch.equal(value(expr, 3), value(simple, 3)), f"{show(expr)} -> {show(simple)}"


def test_simplifying_twice_changes_nothing() -> None:
    for expr in expressions()[:400]:
        simple = Simplifier()(expr)
        assert Simplifier()(simple) == simple, show(expr)


def test_the_normal_form_of_a_predicate() -> None:
    """Integers are compared with zero only, and nothing is negated that can be said without."""
    simplify = Simplifier()

    def check(expr: Expr) -> None:
        match expr:
            case Compare(relation, left, right) if kind_of(left) == "int":
                assert relation in ("le", "eq")
                assert right == integer(0)
            case Not(operand):
                assert isinstance(operand, (Load, Compare))
            case And(operands) | Or(operands):
                assert len(operands) >= 2
                for operand in operands:
                    assert type(operand) is not type(expr)
                    check(operand)
            case _:
                pass

    generator = Generator(1)
    for _ in range(400):
        check(simplify(generator.boolean(3)))


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (Compare("ge", Iota(1), Iota(0)), "kv <= q"),
        (Not(Compare("gt", Iota(0), Iota(1))), "kv <= q"),
        (Compare("lt", Iota(0), add(Iota(1), integer(1))), "kv <= q"),
        (Compare("lt", add(Iota(1), Iota(0), -1), Size(SIZE)), "q <= kv + s - 1"),
        (Compare("eq", Where(Compare("le", Iota(0), Iota(1)), integer(1), integer(0)), integer(1)), "kv <= q"),
        (Compare("le", Abs(add(Iota(0), Iota(1), -1)), integer(2)), "(kv <= q + 2) & (q <= kv + 2)"),
    ],
)
def test_forms_that_mean_the_same_become_the_same(expr: Expr, expected: str) -> None:
    assert show(Simplifier()(expr)) == expected


def test_a_long_chain_stays_small() -> None:
    simplify, expr = Simplifier(), Compare("le", Iota(0), Iota(1))
    result: Expr = expr
    for _ in range(50):
        result = simplify(And((result, expr, Or((expr, Bool(False))))))
    assert cost(result) == cost(simplify(expr))
