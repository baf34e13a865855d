"""Index expressions: the value of a tensor's element as a function of where the element is.

An expression has no shape. Positions are counted from the last dimension, so broadcasting needs no bookkeeping: in an
attention mask ``[b, h, q, kv]`` the key column is ``Iota(0)`` and the query row ``Iota(1)``, and an unsqueezed or
expanded tensor simply doesn't mention the new dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import sympy

__all__ = [
    "AXES",
    "BATCH",
    "HEAD",
    "KEY",
    "QUERY",
    "Abs",
    "And",
    "Bool",
    "Compare",
    "Expr",
    "Float",
    "FloorDiv",
    "Iota",
    "Kind",
    "Load",
    "Mod",
    "Not",
    "Or",
    "Size",
    "Sum",
    "Where",
    "add",
    "axes_of",
    "children",
    "cost",
    "integer",
    "kind_of",
    "linear",
    "loads_of",
    "rebuild",
    "scale",
    "show",
    "substitute",
    "total",
]

KEY: Final = 0
QUERY: Final = 1
HEAD: Final = 2
BATCH: Final = 3
AXES: Final = ("kv", "q", "h", "b")
"""Names of the axes of a mask, counted from the last dimension."""

Kind = Literal["bool", "int", "float"]
Relation = Literal["lt", "le", "gt", "ge", "eq", "ne"]


@dataclass(frozen=True, slots=True)
class Iota:
    """The position along a dimension, which is counted from the last one."""

    axis: int


@dataclass(frozen=True, slots=True)
class Bool:
    """A truth value."""

    value: bool


@dataclass(frozen=True, slots=True)
class Float:
    """A floating point number, never NaN."""

    value: float


@dataclass(frozen=True, slots=True)
class Size:
    """An integer that is the same at every position: a number, or an expression of symbolic sizes."""

    value: sympy.Expr


@dataclass(frozen=True, slots=True)
class Sum:
    """An integer ``sum(coefficient * term) + constant``; coefficients and the constant don't depend on the position.

    Only :func:`total` makes sums: flat, no term twice, sorted, so that equal sums are equal objects.
    """

    terms: tuple[tuple[Expr, sympy.Expr], ...]
    constant: sympy.Expr


@dataclass(frozen=True, slots=True)
class FloorDiv:
    """Division of integers, rounded down, by a positive number."""

    numerator: Expr
    divisor: int


@dataclass(frozen=True, slots=True)
class Mod:
    """Remainder of integers, never negative, for a positive divisor."""

    numerator: Expr
    divisor: int


@dataclass(frozen=True, slots=True)
class Abs:
    """Absolute value of an integer."""

    operand: Expr


@dataclass(frozen=True, slots=True)
class Compare:
    """A comparison of two integers or two floats."""

    relation: Relation
    left: Expr
    right: Expr


@dataclass(frozen=True, slots=True)
class Not:
    """Logical negation."""

    operand: Expr


@dataclass(frozen=True, slots=True)
class And:
    """Conjunction."""

    operands: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """Disjunction."""

    operands: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Where:
    """``yes`` where ``condition`` holds, else ``no``; both of the same kind."""

    condition: Expr
    yes: Expr
    no: Expr


@dataclass(frozen=True, slots=True)
class Load:
    """The element of a tensor about whose values nothing is known.

    Attributes:
        leaf: Name of the tensor.
        index: Where the element is, one integer for each of the tensor's dimensions, none negative.
        kind: What the tensor holds.
    """

    leaf: str
    index: tuple[Expr, ...]
    kind: Kind


Expr = Iota | Bool | Float | Size | Sum | FloorDiv | Mod | Abs | Compare | Not | And | Or | Where | Load


def kind_of(expr: Expr) -> Kind:
    """Return what an expression's values are."""
    while isinstance(expr, Where):
        expr = expr.yes
    match expr:
        case Bool() | Compare() | Not() | And() | Or():
            return "bool"
        case Float():
            return "float"
        case Load(kind=kind):
            return kind
        case _:
            return "int"


def integer(value: int) -> Size:
    """Return a number as an expression."""
    return Size(sympy.Integer(value))


def linear(expr: Expr) -> tuple[dict[Expr, sympy.Expr], sympy.Expr]:
    """Split an integer into terms with coefficients, and a constant."""
    match expr:
        case Size(value):
            return {}, value
        case Sum(terms, constant):
            return dict(terms), constant
        case _:
            return {expr: sympy.Integer(1)}, sympy.Integer(0)


def total(parts: Iterable[tuple[Expr, sympy.Expr]], constant: sympy.Expr) -> Expr:
    """Return ``sum(coefficient * part) + constant`` in canonical form: flat, merged, sorted."""
    merged: dict[Expr, sympy.Expr] = {}
    for part, factor in parts:
        terms, rest = linear(part)
        constant = constant + factor * rest
        for term, coefficient in terms.items():
            merged[term] = merged.get(term, sympy.Integer(0)) + factor * coefficient
    left = [(term, sympy.expand(factor)) for term, factor in merged.items()]
    left = sorted(((t, c) for t, c in left if c != 0), key=lambda pair: repr(pair[0]))
    constant = sympy.expand(constant)
    if not left:
        return Size(constant)
    if len(left) == 1 and left[0][1] == 1 and constant == 0:
        return left[0][0]
    return Sum(tuple(left), constant)


def add(left: Expr, right: Expr, factor: int = 1) -> Expr:
    """Return the integer ``left + factor * right``."""
    return total(((left, sympy.Integer(1)), (right, sympy.Integer(factor))), sympy.Integer(0))


def scale(expr: Expr, factor: sympy.Expr) -> Expr:
    """Return an integer times a size."""
    return total(((expr, factor),), sympy.Integer(0))


def children(expr: Expr) -> tuple[Expr, ...]:
    """Return the direct operands of an expression."""
    match expr:
        case Sum(terms, _):
            return tuple(term for term, _ in terms)
        case FloorDiv(numerator, _) | Mod(numerator, _):
            return (numerator,)
        case Abs(operand) | Not(operand):
            return (operand,)
        case Compare(_, left, right):
            return (left, right)
        case And(operands) | Or(operands):
            return operands
        case Where(condition, yes, no):
            return (condition, yes, no)
        case Load(_, index, _):
            return index
        case _:
            return ()


def rebuild(expr: Expr, operands: tuple[Expr, ...]) -> Expr:
    """Return the same operator on other operands."""
    match expr:
        case Sum(terms, constant):
            factors = (factor for _, factor in terms)
            return total(zip(operands, factors, strict=True), constant)
        case FloorDiv(_, divisor):
            return FloorDiv(operands[0], divisor)
        case Mod(_, divisor):
            return Mod(operands[0], divisor)
        case Abs():
            return Abs(operands[0])
        case Not():
            return Not(operands[0])
        case Compare(relation):
            return Compare(relation, operands[0], operands[1])
        case And():
            return And(operands)
        case Or():
            return Or(operands)
        case Where():
            return Where(operands[0], operands[1], operands[2])
        case Load(leaf, _, kind):
            return Load(leaf, operands, kind)
        case _:
            return expr


def substitute(expr: Expr, positions: Mapping[int, Expr]) -> Expr:
    """Replace positions, all at once: the element somewhere else. Not simplified."""
    if isinstance(expr, Iota):
        return positions.get(expr.axis, expr)
    operands = children(expr)
    return rebuild(expr, tuple(substitute(operand, positions) for operand in operands)) if operands else expr


def axes_of(expr: Expr) -> frozenset[int]:
    """Return the dimensions on which an expression depends."""
    if isinstance(expr, Iota):
        return frozenset((expr.axis,))
    return frozenset[int]().union(*(axes_of(operand) for operand in children(expr)))


def loads_of(expr: Expr) -> tuple[Load, ...]:
    """Return the reads of unknown tensors in an expression, in order, each once."""
    found = (expr,) if isinstance(expr, Load) else ()
    return tuple(dict.fromkeys((*found, *(load for operand in children(expr) for load in loads_of(operand)))))


def cost(expr: Expr) -> tuple[int, int]:
    """Return the number of operators and the depth."""
    costs = [cost(operand) for operand in children(expr)]
    return 1 + sum(size for size, _ in costs), 1 + max((depth for _, depth in costs), default=0)


_SIGNS: Final[Mapping[str, str]] = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


def show(expr: Expr) -> str:
    """Write an expression for people, in the names of a mask's axes."""
    match expr:
        case Iota(axis):
            return AXES[axis] if axis < len(AXES) else f"dim{-axis - 1}"
        case Bool(value) | Float(value) | Size(value):
            return str(value)
        case Sum(terms, constant):
            return _show_sum(terms, constant)
        case FloorDiv(numerator, divisor):
            return f"({show(numerator)}) // {divisor}"
        case Mod(numerator, divisor):
            return f"({show(numerator)}) % {divisor}"
        case Abs(operand):
            return f"abs({show(operand)})"
        case Compare(relation, left, right):
            return _show_comparison(relation, left, right)
        case Not(operand):
            return f"~({show(operand)})"
        case And(operands):
            return " & ".join(f"({show(operand)})" for operand in operands)
        case Or(operands):
            return " | ".join(f"({show(operand)})" for operand in operands)
        case Where(condition, yes, no):
            return f"where({show(condition)}, {show(yes)}, {show(no)})"
        case Load(leaf, index, _):
            return f"{leaf}[{', '.join(show(i) for i in index)}]"


def _show_sum(terms: Iterable[tuple[Expr, sympy.Expr]], constant: sympy.Expr) -> str:
    text = ""
    for term, factor in terms:
        if factor == 1 or factor == -1:
            piece = show(term)
        elif factor.is_number:
            piece = f"{abs(int(factor))}*{show(term)}"  # pyright: ignore[reportArgumentType]
        else:
            piece = f"({factor})*{show(term)}"
        negative = bool(factor.is_number and factor < 0)  # pyright: ignore[reportOperatorIssue]
        text += (" - " if text else "-") + piece if negative else (" + " if text else "") + piece
    if constant == 0 and text:
        return text
    return f"{text} + {constant}" if text else str(constant)


def _show_comparison(relation: str, left: Expr, right: Expr) -> str:
    """Write a comparison with zero with the negative terms on the other side."""
    if right == integer(0) and isinstance(left, Sum):
        positive = [(t, c) for t, c in left.terms if not (c.is_number and c < 0)]  # pyright: ignore[reportOperatorIssue]
        negative = [(t, -c) for t, c in left.terms if c.is_number and c < 0]  # pyright: ignore[reportOperatorIssue]
        first = _show_sum(positive, sympy.Integer(0)) if positive else "0"
        second = _show_sum(negative, -left.constant)
        return f"{first} {_SIGNS[relation]} {second}"
    return f"{show(left)} {_SIGNS[relation]} {show(right)}"
