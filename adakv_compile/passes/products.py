"""The two products of an attention, in every way that PyTorch spells a product of matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import fx

from adakv_compile.passes.axes import Axes, Dims
from adakv_compile.passes.nodes import shape_of, static_int

__all__ = ["PRODUCTS", "Product", "label"]

aten = torch.ops.aten

PRODUCTS: Final = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)


@dataclass(frozen=True)
class Product:
    """A product whose dimensions have names.

    Attributes:
        left: The first operand.
        right: The second.
        left_dims: Its dimensions.
        right_dims: Its dimensions.
        dims: Those of the result.
    """

    left: fx.Node
    right: fx.Node
    left_dims: Dims
    right_dims: Dims
    dims: Dims


def label(axes: Axes, node: fx.Node) -> Product | None:
    """Name the dimensions of a product with new axes; ``None`` if it is none that is understood."""
    if node.target is aten.einsum.default:
        return _einsum(axes, node)
    operands = node.args[1:3] if node.target is aten.baddbmm.default else node.args[:2]
    left, right = cast("tuple[fx.Node, fx.Node]", operands)
    wide = shape_of(node)
    if len(shape_of(left)) < 2 or len(shape_of(right)) < 2 or len(wide) < 2:
        return None
    dims = axes.name(wide, [*(f"y{i}" for i in range(len(wide) - 2)), "row", "column"])
    inner = axes.add("inner", shape_of(left)[-1])
    row, column = dims[-2:]
    return Product(
        left,
        right,
        (*_batch(left, dims, wide), row, (inner,)),
        (*_batch(right, dims, wide), (inner,), column),
        dims,
    )


def _batch(operand: fx.Node, dims: Dims, wide: tuple[int | torch.SymInt, ...]) -> Dims:
    """Return the leading dimensions of an operand, those that are repeated without an axis."""
    sizes = shape_of(operand)[:-2]
    offset = len(wide) - 2 - len(sizes)
    return tuple(
        () if static_int(size) == 1 and static_int(wide[offset + i]) != 1 else dims[offset + i]
        for i, size in enumerate(sizes)
    )


def _einsum(axes: Axes, node: fx.Node) -> Product | None:
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if not arrow or "." in equation or len(letters) != 2 or any(len(set(part)) != len(part) for part in letters):
        return None
    left, right = cast("tuple[fx.Node, fx.Node]", tuple(operands))
    names: dict[str, str] = {}
    for part, operand in zip(letters, (left, right), strict=True):
        for letter, size in zip(part, shape_of(operand), strict=True):
            if letter not in names:
                names[letter] = axes.add(f"e{letter}", size)
            elif static_int(axes.sizes[names[letter]]) == 1:
                axes.sizes[names[letter]] = size
    if set(letters[0]) - set(letters[1]) - set(output) or set(letters[1]) - set(letters[0]) - set(output):
        return None  # an operand is summed along a dimension of its own
    left_dims, right_dims, dims = (tuple((names[letter],) for letter in part) for part in (*letters, output))
    return Product(left, right, left_dims, right_dims, dims)
