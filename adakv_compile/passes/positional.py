"""Prove that a value depends on nothing but the position: the angles of a rotary embedding, a table of them."""

from __future__ import annotations

from typing import Final, cast

import torch
from torch import fx

from adakv_compile.capture import Program
from adakv_compile.passes.nodes import arg, shape_of, static_int
from adakv_compile.passes.region import TAKE_SIZES, operands_with

__all__ = ["is_kept", "is_positional"]

aten = torch.ops.aten

_ARANGES: Final = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_LOOKUPS: Final = (aten.index.Tensor, aten.embedding.default, aten.index_select.default)


def is_positional(program: Program, node: fx.Node, dim: int) -> bool:
    """Tell whether an element is made from its position along ``dim`` and from what the model keeps, and nothing else.

    Such a value has the same element at a position whatever is behind it: what was computed with it once stays right.

    Args:
        program: The captured graph.
        node: The value.
        dim: The dimension that is counted.
    """
    if node.op != "call_function":
        return False
    if node.target in _ARANGES:
        return _counts_from_zero(node)
    if node.target is aten.outer.default:
        first, second = cast("tuple[fx.Node, fx.Node]", node.args[:2])
        return dim == 0 and is_positional(program, first, 0) and is_kept(program, second)
    if node.target in _LOOKUPS:
        return _is_looked_up(program, node, dim)
    if node.target is aten.slice.Tensor and is_kept(program, cast("fx.Node", node.args[0])):
        rank = len(shape_of(node))
        along = cast("int", arg(node, 1, "dim", 0)) % rank
        return along == dim and arg(node, 2, "start", 0) in (0, None) and arg(node, 4, "step", 1) == 1
    carrying = operands_with(node, dim)
    if not carrying:
        return False
    carriers = {operand for operand, _ in carrying}
    others = [source for source in node.all_input_nodes if source not in carriers]
    kept = all(
        is_kept(program, source) if isinstance(source.meta.get("val"), torch.Tensor) else node.target in TAKE_SIZES
        for source in others
    )
    return kept and all(is_positional(program, operand, at) for operand, at in carrying)


def _counts_from_zero(node: fx.Node) -> bool:
    if node.target is aten.arange.default:
        return True
    return static_int(arg(node, 0, "start")) == 0 and static_int(arg(node, 2, "step", 1)) == 1


def _is_looked_up(program: Program, node: fx.Node, dim: int) -> bool:
    """Whether a value is ``table[positions]``."""
    table = cast("fx.Node", node.args[0])
    if not is_kept(program, table):
        return False
    if node.target is aten.embedding.default:
        index, before = cast("fx.Node", node.args[1]), dim
    elif node.target is aten.index_select.default:
        index, before = cast("fx.Node", node.args[2]), dim - cast("int", node.args[1])
    else:
        indices = cast("list[fx.Node | None]", node.args[1])
        if len(indices) != 1 or indices[0] is None:
            return False
        index, before = indices[0], dim
    return 0 <= before < len(shape_of(index)) and is_positional(program, index, before)


def is_kept(program: Program, node: fx.Node) -> bool:
    """Tell whether a value is made from the model's own tensors and from numbers, and so is the same in every call.

    Args:
        program: The captured graph.
        node: The value.
    """
    if node.op == "get_attr" or node in program.kept:
        return True
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    sizes = shape_of(node)
    return all(static_int(size) is not None for size in sizes) and all(
        is_kept(program, source) for source in node.all_input_nodes
    )
