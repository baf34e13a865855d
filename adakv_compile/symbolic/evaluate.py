"""Evaluate index expressions and proofs to dense masks on concrete sizes: the oracle of tests, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import sympy
import torch

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
    Sum,
    Where,
)
from adakv_compile.symbolic.mask import MaskKind, MaskProof, Offset, PaddingFact

__all__ = ["evaluate", "evaluate_proof", "size_value"]

_RELATIONS: Final[Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
}


def size_value(size: sympy.Expr | int, symbols: Mapping[str, int]) -> int:
    """Return an integer expression's value, given its symbols by name."""
    if isinstance(size, int):
        return size
    values = {symbol: sympy.Integer(symbols[str(symbol)]) for symbol in size.free_symbols}
    return int(size.xreplace(values))  # pyright: ignore[reportArgumentType]


def evaluate(
    expr: Expr,
    shape: Sequence[int],
    leaves: Mapping[str, torch.Tensor] | None = None,
    symbols: Mapping[str, int] | None = None,
) -> torch.Tensor:
    """Return an expression's value at every position.

    Args:
        expr: An index expression.
        shape: Sizes of the dimensions that positions range over.
        leaves: Values of the unknown tensors, by name.
        symbols: Values of symbolic sizes, by name.

    Returns:
        A tensor that broadcasts to ``shape``: bool, int64 or float.
    """
    leaves, symbols = leaves or {}, symbols or {}

    def value(part: Expr) -> torch.Tensor:
        match part:
            case Iota(axis):
                return torch.arange(shape[len(shape) - 1 - axis]).reshape(-1, *([1] * axis))
            case Bool(constant) | Float(constant):
                return torch.tensor(constant)
            case Size(constant):
                return torch.tensor(size_value(constant, symbols))
            case Sum(terms, constant):
                result = torch.tensor(size_value(constant, symbols))
                for term, factor in terms:
                    result = result + size_value(factor, symbols) * value(term)
                return result
            case FloorDiv(numerator, divisor):
                return torch.div(value(numerator), divisor, rounding_mode="floor")
            case Mod(numerator, divisor):
                return torch.remainder(value(numerator), divisor)
            case Abs(operand):
                return value(operand).abs()
            case Compare(relation, left, right):
                return _RELATIONS[relation](value(left), value(right))
            case Not(operand):
                return ~value(operand)
            case And(operands):
                result = torch.tensor(True)
                for operand in operands:
                    result = result & value(operand)
                return result
            case Or(operands):
                result = torch.tensor(False)
                for operand in operands:
                    result = result | value(operand)
                return result
            case Where(condition, yes, no):
                return torch.where(value(condition), value(yes), value(no))
            case Load(leaf, index, _):
                # A branch that is not chosen may point outside of the tensor.
                sizes = leaves[leaf].shape
                return leaves[leaf][tuple(value(i).clamp(0, n - 1) for i, n in zip(index, sizes, strict=True))]

    return value(expr)


def evaluate_proof(
    proof: MaskProof,
    shape: tuple[int, int, int],
    leaves: Mapping[str, torch.Tensor] | None = None,
    symbols: Mapping[str, int] | None = None,
) -> torch.Tensor:
    """Return the mask that a proof describes.

    Args:
        proof: A proof that isn't ``UNPROVEN``.
        shape: Batch size, queries and keys.
        leaves: Values of the tensors that the proof mentions, by the name of their node.
        symbols: Values of symbolic sizes, by name.

    Returns:
        Bool ``[B, 1, q, kv]``, true where visible.
    """
    leaves, symbols = leaves or {}, symbols or {}
    batch, queries, keys = shape
    column = torch.arange(keys)
    row = torch.arange(queries)[:, None]
    visible = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    limit = row + _offset_value(proof.offset, (), leaves, symbols)
    match proof.kind:
        case MaskKind.FULL:
            pass
        case MaskKind.CAUSAL:
            visible = visible & (column <= limit)
        case MaskKind.SLIDING_WINDOW:
            visible = visible & (column <= limit) & (column > limit - size_value(proof.window or 0, symbols))
        case MaskKind.CHUNKED:
            chunk = proof.chunk or 1
            shift = _offset_value(proof.chunk_shift, (batch, 1, queries, keys), leaves, symbols)
            visible = visible & (column <= limit) & ((column + shift) // chunk == (limit + shift) // chunk)
        case MaskKind.PREFIX:
            seen = column < size_value(proof.prefix or 0, symbols)
            visible = visible & (seen if proof.offset is None else seen | (column <= limit))
        case MaskKind.UNPROVEN:
            raise ValueError("an unproven mask has no meaning to evaluate")
    if proof.padding is not None:
        visible = visible & _padding_value(proof.padding, batch, keys, leaves, symbols)
    return visible


def _offset_value(
    offset: Offset | None, shape: Sequence[int], leaves: Mapping[str, torch.Tensor], symbols: Mapping[str, int]
) -> torch.Tensor | int:
    if offset is None or isinstance(offset, sympy.Expr):
        return size_value(offset or 0, symbols)
    return evaluate(offset, shape, leaves, symbols)


def _padding_value(
    fact: PaddingFact, batch: int, keys: int, leaves: Mapping[str, torch.Tensor], symbols: Mapping[str, int]
) -> torch.Tensor:
    """Return bool ``[B or 1, 1, 1, kv]``."""
    tensor = leaves[fact.node.name]
    start = size_value(fact.column_offset, symbols)
    rows = tensor.reshape([batch if fact.has_rows else 1, -1])[:, start : start + keys]
    return _RELATIONS[fact.relation](rows, torch.tensor(fact.value))[:, None, None, :]
