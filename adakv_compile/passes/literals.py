"""Numbers and tensors among the arguments of a written-out attention."""

from __future__ import annotations

import math

import torch
from torch import fx

from adakv_compile import _torch
from adakv_compile.passes.nodes import shape_of, skip_no_ops

__all__ = ["Factor", "NotUnderstoodError", "factor_of", "is_factor", "is_zero", "number_of", "tensor_of"]

aten = torch.ops.aten

Factor = tuple[float | fx.Node, bool]
"""A number or a tensor of one element, and whether it divides."""


class NotUnderstoodError(Exception):
    """The softmax is no attention, or one whose meaning isn't certain; says why in words."""


def is_factor(value: object) -> bool:
    """Tell whether a value can be a factor."""
    try:
        factor_of(value)
    except NotUnderstoodError:
        return False
    return True


def factor_of(value: object) -> float | fx.Node:
    """Return a factor: a number, or a tensor without dimensions whose value is data.

    Raises:
        NotUnderstoodError: It is neither, or hides everything.
    """
    if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor) and not shape_of(value):
        constant = _constant(skip_no_ops(value))
        if isinstance(constant, fx.Node):
            return value
    factor = number_of(value)
    if not factor or math.isinf(factor):
        raise NotUnderstoodError(f"the logits are scaled by {factor}")
    return factor


def number_of(value: object) -> float:
    """Return a number, also one that was made into a tensor.

    Raises:
        NotUnderstoodError: It is none.
    """
    if isinstance(value, fx.Node):
        value = _constant(skip_no_ops(value))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise NotUnderstoodError(f"{value} is not a number")
    return float(value)


def is_zero(node: fx.Node) -> bool:
    """Tell whether a tensor was made of zeros."""
    node = skip_no_ops(node)
    if node.target is aten.expand.default:
        node = skip_no_ops(tensor_of(node.args[0]))
    if node.target is aten.zeros.default:
        return True
    return node.target is aten.full.default and number_of(node.args[1]) == 0


def tensor_of(value: object) -> fx.Node:
    """Return an argument that is a tensor.

    Raises:
        NotUnderstoodError: It is something else.
    """
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        raise NotUnderstoodError(f"{value} takes part")
    return value


def _constant(node: fx.Node) -> object:
    """Return the value of a tensor that holds one constant, or the node itself."""
    if node.op == "get_attr":
        held: object = getattr(node.graph.owning_module, str(node.target), None)
        if isinstance(held, torch.Tensor) and not _torch.is_fake(held) and held.numel() == 1:
            return held.item()
        return node
    if node.target is aten.full.default and not shape_of(node):
        return node.args[1]
    return node.args[0] if node.target is aten.scalar_tensor.default else node
