"""Arithmetic and conversions of elements, done only where the dtype's rounding can't change the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch

from adakv_compile.symbolic.expr import Compare, Expr, Float, Load, Not, Size, Where, integer, kind_of, loads_of, scale
from adakv_compile.symbolic.read import choices, kind_of_dtype

__all__ = [
    "WIDE_INTEGERS",
    "cast",
    "comparand",
    "fits_every_dtype",
    "float_arithmetic",
    "integer_product",
    "too_many",
]

_MAX_CHOICES: Final = 64
_EXACT: Final = 256
"""Integers up to this are exact in every floating point dtype (bfloat16 has the fewest digits)."""
_TINY: Final = 1e-4
"""Smaller numbers may become zero in half precision."""
WIDE_INTEGERS: Final = (torch.int32, torch.int64)


def cast(expr: Expr, dtype: torch.dtype) -> Expr | None:
    """Convert an element to another dtype; ``None`` when the result isn't exactly known."""
    source, target = kind_of(expr), kind_of_dtype(dtype)
    if target == "bool":
        match source:
            case "bool":
                return expr
            case "int":
                return Not(Compare("eq", expr, integer(0)))
            case "float":
                return Compare("ne", expr, Float(0.0))
    if isinstance(expr, Where) and source != "bool":
        yes, no = cast(expr.yes, dtype), cast(expr.no, dtype)
        return None if yes is None or no is None else Where(expr.condition, yes, no)
    match expr, target:
        case _, "int" if source == "bool":
            return Where(expr, integer(1), integer(0))
        case _, "float" if source == "bool":
            return Where(expr, Float(1.0), Float(0.0))
        case _, "int" if source == "int" and (_fits(expr, dtype) or fits_every_dtype(expr)):
            return expr
        case Size(value), "float" if fits_every_dtype(expr):
            return Float(float(value))
        case Float(value), "int" if value.is_integer() and 0 <= value < _EXACT / 2:
            return integer(int(value))
        case Float(value), "float" if value == 0 or abs(value) > _TINY:
            return Float(_fit(value, dtype))
        case _:
            return None


def fits_every_dtype(expr: Expr) -> bool:
    """Tell whether an element is a number that every integer dtype holds and every floating point one exactly."""
    return isinstance(expr, Size) and bool(expr.value.is_Integer) and 0 <= int(expr.value) < _EXACT / 2  # pyright: ignore[reportArgumentType]


def _fits(expr: Expr, dtype: torch.dtype) -> bool:
    # Positions are far below 2**31; what a tensor holds may not be.
    return dtype is torch.int64 or (dtype is torch.int32 and not loads_of(expr))


def _fit(value: float, dtype: torch.dtype) -> float:
    """Return what is left of a number in a dtype that may overflow; small numbers may still be inexact."""
    limit = torch.finfo(dtype).max
    return math.copysign(math.inf, value) if abs(value) > limit else value


def _is_exact(value: float, dtype: torch.dtype) -> bool:
    """Tell whether arithmetic in double precision with this number is arithmetic in ``dtype``."""
    # Eight binary digits, of which up to four behind the point.
    short = (value * 16).is_integer() and abs(value) * 16 <= _EXACT
    return short or abs(value) >= torch.finfo(dtype).max or (value.is_integer() and abs(value) <= _EXACT)


def float_arithmetic(
    operate: Callable[[float, float], float], left: Expr, right: Expr, dtype: torch.dtype
) -> Expr | None:
    """Operate on the alternatives of two nested choices between numbers, where the results are exactly known."""
    if too_many(left, right):
        return None
    if isinstance(left, Where):
        yes = float_arithmetic(operate, left.yes, right, dtype)
        no = float_arithmetic(operate, left.no, right, dtype)
        return None if yes is None or no is None else Where(left.condition, yes, no)
    if isinstance(right, Where):
        yes = float_arithmetic(operate, left, right.yes, dtype)
        no = float_arithmetic(operate, left, right.no, dtype)
        return None if yes is None or no is None else Where(right.condition, yes, no)
    if not (isinstance(left, Float) and isinstance(right, Float)):
        return None
    if not (_is_exact(left.value, dtype) and _is_exact(right.value, dtype)):
        result = operate(left.value, right.value)
        # Times one, plus zero: the result is one of the operands, rounded as it is in the dtype.
        plain = result == 0 or abs(result) in (abs(left.value), abs(right.value))
        return Float(torch.tensor(result, dtype=dtype).item()) if plain else None
    result = _fit(operate(left.value, right.value), dtype)
    return Float(result) if not math.isnan(result) and _is_exact(result, dtype) else None


def integer_product(left: Expr, right: Expr) -> Expr | None:
    """Multiply integers of which at least one doesn't depend on the position, or is a choice between such."""
    for factor, other in ((left, right), (right, left)):
        match factor:
            case Size(value):
                return scale(other, value)
            case Where(condition, yes, no):
                first, second = integer_product(yes, other), integer_product(no, other)
                return None if first is None or second is None else Where(condition, first, second)
            case _:
                continue
    return None


def comparand(expr: Expr, dtype: torch.dtype) -> Expr | None:
    """Return one side of a comparison, as the numbers that are really compared."""
    kind = kind_of(expr)
    if not dtype.is_floating_point:
        return cast(expr, dtype) if kind == "bool" else expr
    match expr:
        case Where(condition, yes, no):
            first, second = comparand(yes, dtype), comparand(no, dtype)
            return None if first is None or second is None else Where(condition, first, second)
        case Load(kind="float"):
            return expr
        case Float(value):
            return expr if _is_exact(value, dtype) else None
        case _:
            return cast(expr, dtype)


def too_many(left: Expr, right: Expr) -> bool:
    """Tell whether an operation on two nested choices would have too many alternatives."""
    return choices(left) * choices(right) > _MAX_CHOICES
