"""Recognise the conjunct of a mask that hides padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import sympy
import torch
from torch import fx

from adakv_compile.symbolic.expr import (
    BATCH,
    KEY,
    QUERY,
    Compare,
    Expr,
    Float,
    Iota,
    Load,
    Not,
    Size,
    axes_of,
    kind_of,
    linear,
    show,
)
from adakv_compile.symbolic.mask import PaddingFact, PaddingRelation
from adakv_compile.symbolic.read import Leaf, shape_of
from adakv_compile.symbolic.refuse import NotProvedError
from adakv_compile.symbolic.sizes import Sizes

__all__ = ["read_padding"]

_MIRRORED: Final[Mapping[str, PaddingRelation]] = {
    "lt": "gt",
    "le": "ge",
    "gt": "lt",
    "ge": "le",
    "eq": "eq",
    "ne": "ne",
}


def read_padding(
    part: Expr,
    batch: int | torch.SymInt,
    keys: sympy.Expr,
    sizes: Sizes,
    leaves: Mapping[str, Leaf],
    holders: Callable[[Expr], Sequence[fx.Node]],
) -> PaddingFact:
    """Prove that a predicate is a statement about one element of a tensor ``[B, n]``, chosen by row and column.

    Args:
        part: A predicate that uses positions only to index unknown tensors.
        batch: Size of the mask's batch dimension.
        keys: Number of keys.
        sizes: What is known about symbolic sizes.
        leaves: The unknown tensors, by name.
        holders: Finds values in the graph whose elements are an expression.

    Raises:
        NotProvedError: It is something else, or reads other rows or columns.
    """
    load, relation, value = _comparison(part)
    node = leaves[load.leaf].node
    has_rows, offset = _indexing(part, load, shape_of(node), batch, keys, sizes)
    fitting = (held for held in holders(part) if _holds_each_column(held, batch, keys, sizes))
    return PaddingFact(node, has_rows, offset, relation, value, next(fitting, None))


def _holds_each_column(node: fx.Node, batch: int | torch.SymInt, keys: sympy.Expr, sizes: Sizes) -> bool:
    """Tell whether a value has a column for each key, at most the mask's rows, and no other dimension."""
    *outer, columns = shape_of(node) or (1,)
    rows = outer.pop(0) if len(outer) == 3 else 1
    fits = sizes.equal(columns, keys) and (_is_one(rows) or sizes.equal(rows, batch))
    return fits and len(outer) < 3 and all(_is_one(size) for size in outer)


def _comparison(part: Expr) -> tuple[Load, PaddingRelation, bool | int | float]:
    """Return the only element that is read, and what it is compared with."""
    match part:
        case Load(kind="bool"):
            return part, "eq", True
        case Not(Load(kind="bool") as load):
            return load, "eq", False
        case Compare(relation, Load() as load, Float(value)):
            return load, relation, value
        case Compare(relation, Float(value), Load() as load):
            return load, _MIRRORED[relation], value
        case Compare(relation, difference, _) if kind_of(difference) == "int":
            return _integer_comparison(part, relation, difference)
        case Not(Compare("eq", difference, _)) if kind_of(difference) == "int":
            load, _, value = _integer_comparison(part, "eq", difference)
            return load, "ne", value
        case _:
            raise NotProvedError(f"{show(part)} isn't a comparison of one element with a number", part)


def _integer_comparison(part: Expr, relation: PaddingRelation, difference: Expr) -> tuple[Load, PaddingRelation, int]:
    """Solve ``factor * element + constant <relation> 0`` for the element."""
    terms, constant = linear(difference)
    match list(terms.items()):
        case [(Load() as load, factor)] if factor in (1, -1) and constant.is_Integer:
            value = int(-factor * constant)  # pyright: ignore[reportArgumentType]
            return load, relation if factor == 1 else _MIRRORED[relation], value
        case _:
            raise NotProvedError(f"{show(part)} isn't a comparison of one element with a number", part)


def _indexing(
    part: Expr,
    load: Load,
    shape: tuple[int | torch.SymInt, ...],
    batch: int | torch.SymInt,
    keys: sympy.Expr,
    sizes: Sizes,
) -> tuple[bool, sympy.Expr]:
    """Prove that an element is chosen by the batch row, if at all, and the key's column plus an offset; return both."""
    if QUERY in axes_of(load):
        raise NotProvedError(f"{show(part)} depends on the query as well", part)
    indexed = [(index, size) for index, size in zip(load.index, shape, strict=True) if not _is_one(size)]
    if keys == 1 and len(shape) > 1 and _is_one(shape[-1]):
        # One key, and a padding of one column: the dimension of the columns is of size one as well.
        indexed.append((Size(sympy.Integer(0)), 1))
    if not indexed:
        raise NotProvedError(f"{show(part)} is one condition for all keys", part)
    *rows, (column, _) = indexed
    terms, offset = linear(column)
    single_key = keys == 1 and not terms
    if not (single_key or terms == {Iota(KEY): sympy.Integer(1)}) or not sizes.at_most(0, offset):
        raise NotProvedError(f"{show(part)} isn't indexed by the key's column", part)
    match rows:
        case []:
            return False, offset
        case [(Iota(axis), size)] if axis == BATCH and sizes.equal(size, batch):
            return True, offset
        case [(Size(), _)]:
            raise NotProvedError(f"{show(part)} uses one row of padding for every row of the batch", part)
        case _:
            raise NotProvedError(f"{show(part)} isn't indexed by the row of the batch", part)


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1
