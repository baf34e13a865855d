"""Write a function of one logit or one position into the program, as an operation on all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import fx

from adakv_compile.passes.emit import Emitter
from adakv_compile.passes.literals import NotUnderstoodError
from adakv_compile.passes.nodes import shape_of

__all__ = ["inline"]

aten = torch.ops.aten

_POINTWISE: Final = (
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.__xor__.Tensor,
    aten._to_copy.default,
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.floor_divide.default,
    aten.full_like.default,
    aten.ones_like.default,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.zeros_like.default,
)
"""Operators that treat every element by itself, besides those that PyTorch marks as pointwise."""
_CONSTANT: Final = (
    aten.full.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.ones.default,
    aten.scalar_tensor.default,
    aten.zeros.default,
)
_CHOICES: Final = (aten.add.Tensor, aten.sub.Tensor, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)


@dataclass(frozen=True)
class _Element:
    """A tensor that is looked up, and the positions along its first dimensions."""

    table: fx.Node
    positions: tuple[fx.Node, ...] = ()


Value = fx.Node | _Element | object


def inline(emit: Emitter, function: fx.GraphModule, arguments: Sequence[object]) -> fx.Node:
    """Write a function of scalars into the program, on arguments that broadcast to each other.

    Args:
        emit: Where.
        function: A captured function; what it returns has no dimensions.
        arguments: For each of its parameters without dimensions a tensor of any shape; for the others what they are.

    Returns:
        Its value, of the shape that the arguments broadcast to, or of fewer dimensions.

    Raises:
        NotUnderstoodError: It does more than to compute element by element and to look elements up.
    """
    known: dict[fx.Node, Value] = {}
    for node, value in zip(function.graph.find_nodes(op="placeholder"), arguments, strict=True):
        if node.users and "val" not in node.meta:
            raise NotUnderstoodError("nothing is known of what the function takes")
        is_table = isinstance(value, fx.Node) and _rank(node) > 0
        known[node] = _Element(value) if is_table and isinstance(value, fx.Node) else value
    for node in function.graph.nodes:
        if node.op == "output":
            return _returned(known, node)
        if node.op == "get_attr":
            known[node] = _constant(emit, function, node)
        elif node.op == "call_function":
            known[node] = _call(emit, known, node)
    raise NotUnderstoodError("the function returns nothing")


def _returned(known: dict[fx.Node, Value], output: fx.Node) -> fx.Node:
    value = output.args[0]
    if isinstance(value, (tuple, list)) and len(value) == 1:
        (value,) = value
    found = known.get(value) if isinstance(value, fx.Node) else None
    if not isinstance(found, fx.Node):
        raise NotUnderstoodError("the function returns something else than one number for each logit")
    return found


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _constant(emit: Emitter, function: fx.GraphModule, node: fx.Node) -> fx.Node:
    held: object = getattr(function, str(node.target), None)
    if type(held) is not torch.Tensor or held.dim() > 0:
        raise NotUnderstoodError(f"the function holds {node.target}")
    return emit.call(aten.full.default, [], held.item(), dtype=held.dtype, device=held.device)


def _call(emit: Emitter, known: dict[fx.Node, Value], node: fx.Node) -> Value:
    if node.target is aten.index.Tensor:
        return _look_up(emit, known, node)
    allowed = (
        isinstance(node.meta.get("val"), (int, torch.SymInt))
        or torch.Tag.pointwise in getattr(node.target, "tags", ())
        or node.target in (*_POINTWISE, *_CONSTANT)
    )
    if not allowed or "val" not in node.meta or _rank(node) > 0:
        raise NotUnderstoodError(f"the function calls {node.target}")
    return _emitted(emit, known, node)


def _emitted(emit: Emitter, known: dict[fx.Node, Value], node: fx.Node) -> fx.Node:
    if any(isinstance(known.get(source), _Element) for source in node.all_input_nodes):
        raise NotUnderstoodError(f"the function calls {node.target} on more than one number")
    given = fx.map_arg((node.args, node.kwargs), lambda source: cast("fx.Node", known[source]))
    args, kwargs = cast("tuple[tuple[object, ...], dict[str, object]]", given)
    result = node.meta.get("val")
    if node.target in _CHOICES and isinstance(result, torch.Tensor) and result.dtype.is_floating_point:
        # Distances are integers, and what is added to logits are numbers of their type.
        args = tuple(_as_float(emit, value, result.dtype) for value in args)
    return emit.call(cast("Callable[..., Any]", node.target), *args, **kwargs)


def _as_float(emit: Emitter, value: object, dtype: torch.dtype) -> object:
    held = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(held, torch.Tensor) or held.dtype.is_floating_point or held.dtype is torch.bool:
        return value
    return emit.call(aten._to_copy.default, value, dtype=dtype)


def _look_up(emit: Emitter, known: dict[fx.Node, Value], node: fx.Node) -> Value:
    """Look an element up, once positions for all dimensions are known: ``table[i][j]`` is ``table[i, j]``."""
    source, positions = node.args[0], node.args[1]
    table = known.get(source) if isinstance(source, fx.Node) else None
    if not isinstance(table, _Element) or not isinstance(positions, (tuple, list)):
        raise NotUnderstoodError("the function looks up in something else than a tensor")
    found = [known.get(position) if isinstance(position, fx.Node) else None for position in positions]
    given = tuple(value for value in found if isinstance(value, fx.Node))
    if len(given) != len(positions):
        raise NotUnderstoodError("the function looks up more than one number")
    table = _Element(table.table, (*table.positions, *given))
    if len(table.positions) < len(shape_of(table.table)):
        return table
    return emit.call(aten.index.Tensor, table.table, list(table.positions))
