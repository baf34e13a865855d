"""Simplification of index expressions by a table of named rules, each of which preserves every value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import sympy

from adakv_compile.symbolic.expr import (
    Abs,
    And,
    Bool,
    Compare,
    Expr,
    Float,
    FloorDiv,
    Load,
    Mod,
    Not,
    Or,
    Size,
    Sum,
    Where,
    add,
    children,
    integer,
    kind_of,
    linear,
    rebuild,
    scale,
)

__all__ = ["RULES", "Rule", "Simplifier"]

_TRUE: Final = Bool(True)
_FALSE: Final = Bool(False)
_ZERO: Final = integer(0)
_MAX_STEPS: Final = 64
_MAX_ABSOLUTE: Final = 3
"""Every absolute value in a sum doubles the cases."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One simplification.

    Attributes:
        name: Stable name, for messages and tests.
        apply: Takes an expression whose operands are simplified; returns an equal one, or ``None``.
    """

    name: str
    apply: Callable[[Expr], Expr | None]


class Simplifier:
    """Applies :data:`RULES` to a fixpoint, remembering what it has simplified.

    The normal form of a predicate has negations only on what can't be negated, and integer comparisons only as
    ``x <= 0`` and ``x == 0``.
    """

    def __init__(self) -> None:
        self._memo: dict[Expr, Expr] = {}

    def __call__(self, expr: Expr) -> Expr:
        """Return a simpler expression with the same values."""
        found = self._memo.get(expr)
        if found is None:
            found = self._at_root(self._with_simple_operands(expr))
            self._memo[expr] = found
            self._memo[found] = found
        return found

    def _with_simple_operands(self, expr: Expr) -> Expr:
        operands = children(expr)
        simple = tuple(self(operand) for operand in operands)
        return expr if simple == operands else rebuild(expr, simple)

    def _at_root(self, expr: Expr) -> Expr:
        for _ in range(_MAX_STEPS):
            changed = next((new for rule in RULES if (new := rule.apply(expr)) is not None and new != expr), None)
            if changed is None:
                return expr
            expr = self._with_simple_operands(changed)
        return expr


def _sum_of_where(expr: Expr) -> Expr | None:
    """Lift choices: 2 * where(c, a, b) + r  =  where(c, 2 * a + r, 2 * b + r)."""
    if not isinstance(expr, Sum):
        return None
    for term, factor in expr.terms:
        if isinstance(term, Where):
            rest = add(expr, scale(term, factor), -1)
            return Where(term.condition, add(rest, scale(term.yes, factor)), add(rest, scale(term.no, factor)))
    return None


def _division(expr: Expr) -> Expr | None:
    match expr:
        case FloorDiv(numerator, 1):
            return numerator
        case Mod(_, 1):
            return _ZERO
        case FloorDiv(Size(value), divisor) if value.is_Integer:
            return Size(sympy.Integer(int(value) // divisor))
        case Mod(Size(value), divisor) if value.is_Integer:
            return Size(sympy.Integer(int(value) % divisor))
        case FloorDiv(Where(condition, yes, no), divisor):
            return Where(condition, FloorDiv(yes, divisor), FloorDiv(no, divisor))
        case Mod(Where(condition, yes, no), divisor):
            return Where(condition, Mod(yes, divisor), Mod(no, divisor))
        case _:
            return None


def _absolute(expr: Expr) -> Expr | None:
    match expr:
        case Abs(Size(value)) if value.is_Integer:
            return Size(abs(value))
        case Abs(Where(condition, yes, no)):
            return Where(condition, Abs(yes), Abs(no))
        case _:
            return None


def _compare_where(expr: Expr) -> Expr | None:
    """Lift choices: where(c, a, b) <= x  =  where(c, a <= x, b <= x)."""
    match expr:
        case Compare(relation, Where(condition, yes, no), other):
            return Where(condition, Compare(relation, yes, other), Compare(relation, no, other))
        case Compare(relation, other, Where(condition, yes, no)):
            return Where(condition, Compare(relation, other, yes), Compare(relation, other, no))
        case _:
            return None


def _compare_integers(expr: Expr) -> Expr | None:
    """Every comparison of integers becomes ``x <= 0`` or ``x == 0``."""
    if not isinstance(expr, Compare) or kind_of(expr.left) != "int" or kind_of(expr.right) != "int":
        return None
    left, right = expr.left, expr.right
    match expr.relation:
        case "le":
            return Compare("le", add(left, right, -1), _ZERO)
        case "lt":
            return Compare("le", add(add(left, right, -1), integer(1)), _ZERO)
        case "ge":
            return Compare("le", add(right, left, -1), _ZERO)
        case "gt":
            return Compare("le", add(add(right, left, -1), integer(1)), _ZERO)
        case "ne":
            return Not(Compare("eq", left, right))
        case "eq":
            difference = add(left, right, -1)
            terms, _ = linear(difference)
            first = next(iter(terms.values()), sympy.Integer(1))
            # One of the two signs, so that equal facts look equal.
            return Compare("eq", scale(difference, sympy.Integer(-1)) if first.is_negative else difference, _ZERO)


def _compare_numbers(expr: Expr) -> Expr | None:
    match expr:
        case Compare(relation, Size(left), Size(right)) if left.is_Integer and right.is_Integer:
            return Bool(_holds(relation, int(left), int(right)))
        case Compare(relation, Float(left), Float(right)):
            return Bool(_holds(relation, left, right))
        case _:
            return None


def _holds(relation: str, left: float, right: float) -> bool:
    facts = {
        "lt": left < right,
        "le": left <= right,
        "gt": left > right,
        "ge": left >= right,
        "eq": left == right,
        "ne": left != right,
    }
    return facts[relation]


def _compare_absolute(expr: Expr) -> Expr | None:
    """abs(x) + r <= 0 is a conjunction of both signs of x, r - abs(x) <= 0 a disjunction."""
    if not (isinstance(expr, Compare) and expr.relation == "le" and expr.right == _ZERO):
        return None
    terms = linear(expr.left)[0]
    if sum(isinstance(term, Abs) for term in terms) > _MAX_ABSOLUTE:
        return None
    for term, factor in terms.items():
        if isinstance(term, Abs) and factor in (1, -1):
            rest = add(expr.left, scale(term, factor), -1)
            signs = tuple(Compare("le", add(rest, term.operand, sign), _ZERO) for sign in (1, -1))
            return And(signs) if factor == 1 else Or(signs)
    return None


def _negation(expr: Expr) -> Expr | None:
    match expr:
        case Not(Bool(value)):
            return Bool(not value)
        case Not(Not(operand)):
            return operand
        case Not(And(operands)):
            return Or(tuple(Not(operand) for operand in operands))
        case Not(Or(operands)):
            return And(tuple(Not(operand) for operand in operands))
        case Not(Compare("le", left, right)) if kind_of(left) == "int":
            return Compare("gt", left, right)
        case Not(Compare("eq", left, right)) if kind_of(left) == "float":
            return Compare("ne", left, right)
        case Not(Compare("ne", left, right)) if kind_of(left) == "float":
            return Compare("eq", left, right)
        case _:
            return None


def _flat(expr: And | Or, kind: type[And] | type[Or]) -> Iterator[Expr]:
    for operand in expr.operands:
        if isinstance(operand, kind):
            yield from operand.operands
        else:
            yield operand


def _conjunction(expr: Expr) -> Expr | None:
    if not isinstance(expr, And):
        return None
    operands = tuple(dict.fromkeys(operand for operand in _flat(expr, And) if operand != _TRUE))
    if _FALSE in operands:
        return _FALSE
    if len(operands) < 2:
        return operands[0] if operands else _TRUE
    return And(operands)


def _disjunction(expr: Expr) -> Expr | None:
    if not isinstance(expr, Or):
        return None
    operands = tuple(dict.fromkeys(operand for operand in _flat(expr, Or) if operand != _FALSE))
    if _TRUE in operands:
        return _TRUE
    if len(operands) < 2:
        return operands[0] if operands else _FALSE
    return Or(operands)


def _common_factor(expr: Expr) -> Expr | None:
    """(a & b) | (a & c)  =  a & (b | c); with c empty, that is absorption."""
    if not isinstance(expr, Or) or not expr.operands:
        return None
    parts = [part.operands if isinstance(part, And) else (part,) for part in expr.operands]
    common = tuple(operand for operand in parts[0] if all(operand in other for other in parts[1:]))
    if not common:
        return None
    return And((*common, Or(tuple(And(tuple(x for x in part if x not in common)) for part in parts))))


def _complement(expr: Expr) -> Expr | None:
    """A & (~a | b)  =  a & b, which is what is left of a choice that is masked again by its condition."""
    match expr:
        case And(operands):
            for i, operand in enumerate(operands):
                if isinstance(operand, Or):
                    others = operands[:i] + operands[i + 1 :]
                    kept = tuple(part for part in operand.operands if _opposite(part) not in others)
                    if len(kept) < len(operand.operands):
                        return And((*operands[:i], Or(kept), *operands[i + 1 :]))
            return None
        case _:
            return None


def _opposite(expr: Expr) -> Expr:
    """Return the normal form of the negation of a literal."""
    match expr:
        case Not(operand):
            return operand
        case Compare("le", left, right) if right == _ZERO and kind_of(left) == "int":
            return Compare("le", add(integer(1), left, -1), _ZERO)
        case _:
            return Not(expr)


def _choice(expr: Expr) -> Expr | None:
    match expr:
        case Where(Bool(value), yes, no):
            return yes if value else no
        case Where(_, yes, no) if yes == no:
            return yes
        case Where(Not(condition), yes, no):
            return Where(condition, no, yes)
        case Where(condition, Where(inner, yes, _), no) if inner == condition:
            return Where(condition, yes, no)
        case Where(condition, yes, Where(inner, _, no)) if inner == condition:
            return Where(condition, yes, no)
        case _:
            return None


def _choice_of_predicates(expr: Expr) -> Expr | None:
    match expr:
        case Where(condition, Bool(True), no):
            return Or((condition, no))
        case Where(condition, Bool(False), no):
            return And((Not(condition), no))
        case Where(condition, yes, Bool(True)):
            return Or((Not(condition), yes))
        case Where(condition, yes, Bool(False)):
            return And((condition, yes))
        case Where(condition, yes, no) if kind_of(yes) == "bool":
            return Or((And((condition, yes)), And((Not(condition), no))))
        case _:
            return None


def _choice_of_zero(expr: Expr) -> Expr | None:
    """where(x != 0, a, x)  =  where(x != 0, a, 0): how an inverted padding mask is filled with -inf."""
    match expr:
        case Where(Compare("ne", Load() as load, Float(0.0)), yes, no) if no == load:
            return Where(expr.condition, yes, Float(0.0))
        case _:
            return None


RULES: Final[tuple[Rule, ...]] = (
    Rule("sum-of-where", _sum_of_where),
    Rule("division", _division),
    Rule("absolute", _absolute),
    Rule("compare-where", _compare_where),
    Rule("compare-integers", _compare_integers),
    Rule("compare-numbers", _compare_numbers),
    Rule("compare-absolute", _compare_absolute),
    Rule("negation", _negation),
    Rule("conjunction", _conjunction),
    Rule("disjunction", _disjunction),
    Rule("common-factor", _common_factor),
    Rule("complement", _complement),
    Rule("choice", _choice),
    Rule("choice-of-predicates", _choice_of_predicates),
    Rule("choice-of-zero", _choice_of_zero),
)
"""Applied in this order at every operator, until none applies."""
