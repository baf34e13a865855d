"""Pointwise ATen operators as index expressions; the operators that move elements are in ``movement``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeGuard

import sympy
import torch
from torch import fx

from adakv_compile.symbolic.arithmetic import (
    WIDE_INTEGERS,
    cast,
    comparand,
    fits_every_dtype,
    float_arithmetic,
    integer_product,
    too_many,
)
from adakv_compile.symbolic.expr import (
    Abs,
    And,
    Compare,
    Expr,
    FloorDiv,
    Iota,
    Mod,
    Not,
    Or,
    Size,
    Where,
    add,
    integer,
    kind_of,
    scale,
)
from adakv_compile.symbolic.joining import JOINING
from adakv_compile.symbolic.movement import MOVEMENT
from adakv_compile.symbolic.read import Handler, Reader, kind_of_dtype

__all__ = ["VOCABULARY"]

aten = torch.ops.aten


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def _is_tensor(argument: object) -> TypeGuard[fx.Node]:
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor)


def _operands(reader: Reader, node: fx.Node, count: int) -> list[Expr] | None:
    """Return the first operands if each of them is understood and broadcasts to the result."""
    found: list[Expr] = []
    for argument in node.args[:count]:
        if _is_tensor(argument) and not reader.broadcasts(argument, node):
            return None
        expr = reader.operand(argument)
        if expr is None:
            return None
        found.append(expr)
    return found if len(found) == count else None


def _arithmetic(reader: Reader, node: fx.Node, name: str, flipped: bool = False) -> Expr | None:
    """Read a sum, difference, product, maximum or minimum of two operands."""
    operands = _operands(reader, node, 2)
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    if operands is None or alpha != 1:
        return None
    kind, dtype = kind_of_dtype(_dtype(node)), _dtype(node)
    if kind == "bool":
        return {"add": Or, "maximum": Or, "mul": And, "minimum": And}[name](tuple(operands)) if name != "sub" else None
    left, right = cast(operands[0], dtype), cast(operands[1], dtype)
    if left is None or right is None:
        return None
    if flipped:
        left, right = right, left
    if kind == "float":
        return float_arithmetic(_FLOAT_OPERATIONS[name], left, right, dtype)
    if dtype not in WIDE_INTEGERS or too_many(left, right):
        return None
    match name:
        case "add":
            return add(left, right)
        case "sub":
            return add(left, right, -1)
        case "mul":
            return integer_product(left, right)
        case "maximum":
            return Where(Compare("ge", left, right), left, right)
        case _:
            return Where(Compare("le", left, right), left, right)


_FLOAT_OPERATIONS: Final[Mapping[str, Callable[[float, float], float]]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "maximum": max,
    "minimum": min,
}


def _compare(relation: str) -> Handler:
    def handler(reader: Reader, node: fx.Node) -> Expr | None:
        operands = _operands(reader, node, 2)
        if operands is None or too_many(*operands):
            return None
        kinds = {kind_of(operand) for operand in operands}
        dtypes = [a.meta["val"].dtype for a in node.args[:2] if _is_tensor(a)]
        dtype = torch.int64
        narrow = kinds == {"int"} and any(d not in WIDE_INTEGERS for d in dtypes)
        if narrow and not any(fits_every_dtype(operand) for operand in operands):
            # A number that doesn't fit a narrow dtype wraps around.
            return None
        if "float" in kinds:
            dtype = next((d for d in dtypes if d.is_floating_point), torch.float32)
        left, right = (comparand(operand, dtype) for operand in operands)
        if left is None or right is None:
            return None
        return Compare(relation, left, right)  # pyright: ignore[reportArgumentType]

    return handler


def _logical(name: str) -> Handler:
    """Read a logical operator, or a bitwise one of truth values."""

    def handler(reader: Reader, node: fx.Node) -> Expr | None:
        operands = _operands(reader, node, 1 if name == "not" else 2)
        if operands is None or kind_of_dtype(_dtype(node)) != "bool":
            return None
        truths = [truth for operand in operands if (truth := cast(operand, torch.bool)) is not None]
        match name, truths:
            case "not", [value]:
                return Not(value)
            case "and", [left, right]:
                return And((left, right))
            case "or", [left, right]:
                return Or((left, right))
            case "xor", [left, right]:
                return Where(left, Not(right), right)
            case _:
                return None

    return handler


def _divide(reader: Reader, node: fx.Node) -> Expr | None:
    """Read floor division or the remainder by a positive number."""
    operands = _operands(reader, node, 2)
    has_mode = node.target in (aten.div.Tensor_mode, aten.div.Scalar_mode)
    if has_mode and node.kwargs.get("rounding_mode") != "floor":
        return None
    if operands is None or _dtype(node) not in WIDE_INTEGERS:
        return None
    numerator, divisor = cast(operands[0], torch.int64), operands[1]
    if numerator is None or not isinstance(divisor, Size) or not divisor.value.is_Integer or divisor.value <= 0:  # pyright: ignore[reportOperatorIssue]
        return None
    kind = Mod if node.target in (aten.remainder.Scalar, aten.remainder.Tensor) else FloorDiv
    return kind(numerator, int(divisor.value))  # pyright: ignore[reportArgumentType]


def _negate(reader: Reader, node: fx.Node) -> Expr | None:
    operands = _operands(reader, node, 1)
    if operands is None or _dtype(node) not in WIDE_INTEGERS:
        return None
    return scale(operands[0], sympy.Integer(-1))


def _absolute(reader: Reader, node: fx.Node) -> Expr | None:
    operands = _operands(reader, node, 1)
    return Abs(operands[0]) if operands is not None and _dtype(node) in WIDE_INTEGERS else None


def _convert(reader: Reader, node: fx.Node) -> Expr | None:
    operands = _operands(reader, node, 1)
    return None if operands is None else _converted(node.args[0], operands[0], _dtype(node))


def _converted(argument: object, expr: Expr, dtype: torch.dtype) -> Expr | None:
    """Convert an argument; nothing has to be known about a number that keeps its dtype or gets a wider one."""
    source = argument.meta["val"].dtype if _is_tensor(argument) else None
    keeps = source is dtype or (source is not None and kind_of(expr) != "bool" and _widens(source, dtype))
    return expr if keeps else cast(expr, dtype)


def _widens(source: torch.dtype, target: torch.dtype) -> bool:
    return kind_of_dtype(source) == kind_of_dtype(target) and torch.promote_types(source, target) is target


def _where(reader: Reader, node: fx.Node) -> Expr | None:
    return _choose(reader, node, 0, 1, 2)


def _masked_fill(reader: Reader, node: fx.Node) -> Expr | None:
    return _choose(reader, node, 1, 2, 0)


def _choose(reader: Reader, node: fx.Node, condition: int, yes: int, no: int) -> Expr | None:
    """Read a choice, given where its condition and its alternatives are among the arguments."""
    operands = _operands(reader, node, 3)
    if operands is None:
        return None
    test = cast(operands[condition], torch.bool)
    first = _converted(node.args[yes], operands[yes], _dtype(node))
    second = _converted(node.args[no], operands[no], _dtype(node))
    return None if test is None or first is None or second is None else Where(test, first, second)


def _filled(position: int | None, value: float = 0.0) -> Handler:
    """Read a tensor of one number: given as an argument, or implied by the operator."""

    def handler(reader: Reader, node: fx.Node) -> Expr | None:
        default: object = bool(value) if _dtype(node) is torch.bool else value
        if position is not None and position >= len(node.args):
            return None
        number = reader.operand(default if position is None else node.args[position])
        return None if number is None else cast(number, _dtype(node))

    return handler


def _overwritten(reader: Reader, node: fx.Node) -> Expr | None:
    """Read ``copy(old, new)`` and ``fill(old, value)``: the functional forms of in-place writes."""
    source = node.args[1]
    if _is_tensor(source) and not reader.broadcasts(source, node):
        return None
    value = reader.operand(source)
    return None if value is None else _converted(source, value, _dtype(node))


def _arange(reader: Reader, node: fx.Node) -> Expr | None:
    if _dtype(node) not in WIDE_INTEGERS:
        return None
    bounds = [reader.operand(argument) for argument in node.args[:3]]
    start = bounds[0] if len(bounds) > 1 else integer(0)
    step = bounds[2] if len(bounds) > 2 else integer(1)
    if not isinstance(start, Size) or not isinstance(step, Size):
        return None
    return add(start, scale(Iota(0), step.value))


def _constant(reader: Reader, node: fx.Node) -> Expr | None:
    """Read a constant of the program that holds one number."""
    owner = node.graph.owning_module
    value = getattr(owner, str(node.target), None)
    if not isinstance(value, torch.Tensor) or type(value) is not torch.Tensor or value.numel() != 1:
        return None
    expr = reader.operand(value.reshape(()).tolist())
    return None if expr is None else cast(expr, _dtype(node))


_OPERATORS: Final[Mapping[Handler, tuple[object, ...]]] = {
    lambda r, n: _arithmetic(r, n, "add"): (aten.add.Tensor, aten.add.Scalar),
    lambda r, n: _arithmetic(r, n, "sub"): (aten.sub.Tensor, aten.sub.Scalar),
    lambda r, n: _arithmetic(r, n, "sub", flipped=True): (aten.rsub.Tensor, aten.rsub.Scalar),
    lambda r, n: _arithmetic(r, n, "mul"): (aten.mul.Tensor, aten.mul.Scalar),
    lambda r, n: _arithmetic(r, n, "maximum"): (aten.maximum.default,),
    lambda r, n: _arithmetic(r, n, "minimum"): (aten.minimum.default,),
    _compare("eq"): (aten.eq.Tensor, aten.eq.Scalar),
    _compare("ne"): (aten.ne.Tensor, aten.ne.Scalar),
    _compare("lt"): (aten.lt.Tensor, aten.lt.Scalar),
    _compare("le"): (aten.le.Tensor, aten.le.Scalar),
    _compare("gt"): (aten.gt.Tensor, aten.gt.Scalar),
    _compare("ge"): (aten.ge.Tensor, aten.ge.Scalar),
    _logical("not"): (aten.bitwise_not.default, aten.logical_not.default),
    _logical("and"): (
        aten.bitwise_and.Tensor,
        aten.bitwise_and.Scalar,
        aten.logical_and.default,
        aten.__and__.Tensor,
        aten.__and__.Scalar,
    ),
    _logical("or"): (
        aten.bitwise_or.Tensor,
        aten.bitwise_or.Scalar,
        aten.logical_or.default,
        aten.__or__.Tensor,
        aten.__or__.Scalar,
    ),
    _logical("xor"): (
        aten.bitwise_xor.Tensor,
        aten.bitwise_xor.Scalar,
        aten.logical_xor.default,
        aten.__xor__.Tensor,
        aten.__xor__.Scalar,
    ),
    _divide: (
        aten.floor_divide.default,
        aten.floor_divide.Scalar,
        aten.div.Tensor_mode,
        aten.div.Scalar_mode,
        aten.remainder.Scalar,
        aten.remainder.Tensor,
    ),
    _negate: (aten.neg.default,),
    _absolute: (aten.abs.default,),
    _convert: (
        aten._to_copy.default,
        aten.type_as.default,
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.detach_.default,
        aten.lift_fresh_copy.default,
    ),
    _where: (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar),
    _masked_fill: (aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    _filled(None, 0.0): (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default),
    _filled(None, 1.0): (aten.ones.default, aten.ones_like.default, aten.new_ones.default),
    _filled(0): (aten.scalar_tensor.default,),
    _filled(1): (aten.full.default, aten.full_like.default),
    _filled(2): (aten.new_full.default,),
    _overwritten: (aten.copy.default, aten.fill.Scalar, aten.fill.Tensor),
    _arange: (aten.arange.default, aten.arange.start, aten.arange.start_step),
    _constant: ("get_attr",),
}

VOCABULARY: Final[Mapping[object, Handler]] = {
    **{target: handler for handler, targets in _OPERATORS.items() for target in targets},
    **MOVEMENT,
    **JOINING,
}
"""What the reader understands, by operator; everything else is an unknown tensor."""
