"""Read the values of a captured graph as index expressions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import fx

from adakv_compile.symbolic.expr import Bool, Expr, Float, Iota, Kind, Load, Size, Where, cost, integer, kind_of
from adakv_compile.symbolic.expr import substitute as substituted
from adakv_compile.symbolic.simplify import Simplifier
from adakv_compile.symbolic.sizes import Sizes

__all__ = ["Handler", "Leaf", "Reader", "choices", "kind_of_dtype", "shape_of"]

_INTEGERS: Final = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_MAX_COST: Final = 240
_MAX_DEPTH: Final = 48
_MAX_CHOICES: Final = 64


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor about whose values nothing is known.

    Attributes:
        node: Its node in the graph.
        why: What stopped the reader there, for people.
    """

    node: fx.Node
    why: str


Handler = Callable[["Reader", fx.Node], Expr | None]
"""Returns the element of a node's value, in which position ``Iota(0)`` is the one along the last dimension; ``None``
when the operator was called in a way that isn't understood."""


def shape_of(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """Return the sizes of a tensor value; symbolic ones stay symbolic."""
    return tuple(node.meta["val"].shape)


def kind_of_dtype(dtype: torch.dtype) -> Kind | None:
    """Return what a dtype holds; ``None`` for complex numbers and other exotic ones."""
    if dtype is torch.bool:
        return "bool"
    if dtype.is_floating_point:
        return "float"
    return "int" if dtype in _INTEGERS else None


def choices(expr: Expr) -> int:
    """Return the number of alternatives of a nested ``where``."""
    return choices(expr.yes) + choices(expr.no) if isinstance(expr, Where) else 1


class Reader:
    """Reads nodes of one graph; every node is read once, so identical masks of many layers cost one reading.

    Whatever isn't understood becomes a :class:`~adakv_compile.symbolic.expr.Load` of that node: an unknown tensor is
    always a true description, it only proves less.

    Args:
        sizes: What is known about symbolic sizes.
        handlers: The vocabulary: one handler for each operator.
        known: What is known of an input's values.
        given: Likewise, of inputs that hold positions: none is negative, of which somebody makes sure at every call.
    """

    def __init__(
        self,
        sizes: Sizes,
        handlers: Mapping[object, Handler],
        known: Callable[[fx.Node], Expr | None] = lambda _: None,
        given: Mapping[fx.Node, Expr] | None = None,
    ) -> None:
        self.sizes = sizes
        self.given = given or {}
        self.simplify = Simplifier()
        self.leaves: dict[str, Leaf] = {}
        self._handlers = handlers
        self._known = known
        self._memo: dict[fx.Node, Expr] = {}
        self._holders: dict[Expr, list[fx.Node]] = {}

    def read(self, node: fx.Node) -> Expr:
        """Return the element of a tensor value as a function of its position."""
        pending = [node]
        while pending:
            current = pending[-1]
            if current in self._memo:
                pending.pop()
                continue
            missing = [
                source
                for source in (current.all_input_nodes if current.target in self._handlers else ())
                if source not in self._memo and isinstance(source.meta.get("val"), torch.Tensor)
            ]
            if missing:
                pending.extend(missing)
                continue
            pending.pop()
            found = self._memo[current] = self._understand(current)
            self._holders.setdefault(found, []).append(current)
        return self._memo[node]

    def holders(self, expr: Expr) -> Sequence[fx.Node]:
        """Return the nodes that were read and whose elements are ``expr``, whatever their shapes."""
        return self._holders.get(expr, ())

    def operand(self, argument: object) -> Expr | None:
        """Return an operator's argument: a tensor that has been read, a number, or a symbolic size."""
        value = argument
        if isinstance(argument, fx.Node):
            if argument in self._memo:
                return self._memo[argument]
            value = argument.meta.get("val")
        match value:
            case bool():
                return Bool(value)
            case int():
                return integer(value)
            case torch.SymInt():
                return Size(self.sizes.expr(value))
            case float() if value == value:
                return Float(value)
            case _:
                return None

    def same(self, left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
        """Tell whether two sizes are provably equal."""
        return self.sizes.equal(left, right)

    def broadcasts(self, source: fx.Node, target: fx.Node) -> bool:
        """Tell whether ``source`` has the shape of ``target``, or can be read as if it had."""
        narrow, wide = shape_of(source), shape_of(target)
        if len(narrow) > len(wide):
            return False
        aligned = zip(reversed(narrow), reversed(wide), strict=False)
        return all(_is_one(small) or self.same(small, large) for small, large in aligned)

    def leaf(self, node: fx.Node, why: str) -> Expr:
        """Return the element of a tensor about which nothing is known."""
        self.leaves[node.name] = Leaf(node, why)
        shape = shape_of(node)
        index = tuple(
            integer(0) if _is_one(size) else Iota(len(shape) - 1 - dimension) for dimension, size in enumerate(shape)
        )
        return Load(node.name, index, kind_of_dtype(node.meta["val"].dtype) or "float")

    def _understand(self, node: fx.Node) -> Expr:
        kind = kind_of_dtype(node.meta["val"].dtype)
        if node.op == "placeholder":
            leaf = self.leaf(node, "an input of the graph")
            if node in self.given:
                return self.given[node]
            expr = self._known(node)
            return leaf if expr is None else expr
        handler = self._handlers.get(node.target if node.op != "get_attr" else "get_attr")
        if handler is None or kind is None:
            return self.leaf(node, f"computed by {node.target}")
        expr = handler(self, node)
        if expr is None or not _is_small(expr):
            return self.leaf(node, f"computed by {node.target} in a way that is not followed")
        expr = self.simplify(self._at_single_positions(node, self.simplify(expr)))
        # A handler that gets a dtype wrong must not be believed.
        return expr if _is_small(expr) and kind_of(expr) == kind else self.leaf(node, f"computed by {node.target}")

    def _at_single_positions(self, node: fx.Node, expr: Expr) -> Expr:
        """Use that the position along a dimension of size one is zero."""
        shape = shape_of(node)
        single = {axis: integer(0) for axis, size in enumerate(reversed(shape)) if _is_one(size)}
        return substituted(expr, single)


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1


def _is_small(expr: Expr) -> bool:
    if choices(expr) > _MAX_CHOICES:
        return False
    size, depth = cost(expr)
    return size <= _MAX_COST and depth <= _MAX_DEPTH
