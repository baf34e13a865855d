"""Add calls to a captured graph, with their fake values, and bring tensors into the layout an operator takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx

from adakv_compile import _torch
from adakv_compile.passes.axes import Axes, Dims
from adakv_compile.passes.nodes import same_size, shape_of, static_int

__all__ = ["Emitter", "Order"]

aten = torch.ops.aten
Size = int | torch.SymInt
Order = Sequence[Sequence[str]]
"""Wanted dimensions, each as the axes it is made of."""

_PROVENANCE: Final = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node")


@dataclass(frozen=True)
class Emitter:
    """Adds calls where the graph's insertion point is.

    Attributes:
        graph: The graph.
        fake_mode: The mode its fake values live in.
        like: The node whose provenance the calls get.
        made: The calls.
    """

    graph: fx.Graph
    fake_mode: _torch.FakeTensorMode
    like: fx.Node
    made: list[fx.Node] = field(default_factory=list[fx.Node])

    def undo(self) -> None:
        """Erase the calls again."""
        while self.made:
            self.graph.erase_node(self.made.pop())

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call whose fake value comes from the operator itself."""
        node = self.graph.call_function(target, args, kwargs)
        self.made.append(node)
        given = fx.map_arg((args, kwargs), lambda source: source.meta["val"])
        values, named = given  # type: ignore[misc]
        with self.fake_mode:
            node.meta["val"] = target(*values, **named)  # pyright: ignore[reportGeneralTypeIssues]
        for name in _PROVENANCE:
            if name in self.like.meta:
                node.meta[name] = self.like.meta[name]
        return node

    def arrange(self, axes: Axes, node: fx.Node, dims: Dims, order: Order) -> fx.Node:
        """Return a tensor with its dimensions split, picked from, permuted, merged and repeated into an order.

        Args:
            axes: The axes.
            node: The tensor.
            dims: Its dimensions.
            order: The wanted ones. An axis that the tensor lacks is one it does not depend on: it gets size one, or
                is repeated where it is merged with one that it has.
        """
        axes, dims, wanted = _units(axes, axes.resolve(dims), [axes.flat(group) for group in order])
        node, dims = self._split(axes, node, dims)
        node, present = self._pick(axes, node, dims)
        flat = [axis for group in wanted for axis in group]
        node, present = self._without(axes, node, present, set(flat))
        permutation = [present.index(axis) for axis in flat if axis in present]
        if permutation != sorted(permutation):
            node = self.call(aten.permute.default, node, permutation)
        present = [axis for axis in flat if axis in present]
        return self._merge(axes, node, present, wanted)

    def size(self, size: Size) -> int | fx.Node:
        """Return a size as an argument: a number, or a node before the insertion point that holds it.

        Raises:
            RuntimeError: No value of the graph holds it.
        """
        if isinstance(size, int):
            return size
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and same_size(value, size):
                return node
            if node is self.like:
                break
        raise RuntimeError(f"no value of the graph holds the size {size}")

    def _split(self, axes: Axes, node: fx.Node, dims: Dims) -> tuple[fx.Node, Dims]:
        """Give every axis a dimension of its own."""
        if all(len(dim) <= 1 for dim in dims):
            return node, dims
        shape: list[int | fx.Node] = []
        inferred = False
        for position, dim in enumerate(dims):
            if len(dim) <= 1:
                size = shape_of(node)[position]
                shape.append(size if isinstance(size, int) else self.call(aten.sym_size.int, node, position))
                continue
            for axis in dim:
                size = axes.sizes[axis]
                if not isinstance(size, int) and not inferred:
                    shape.append(-1)
                    inferred = True
                else:
                    shape.append(self.size(size))
        node = self.call(aten.reshape.default, node, shape)
        return node, tuple((axis,) for dim in dims for axis in (dim or ("",)))

    def _pick(self, axes: Axes, node: fx.Node, dims: Dims) -> tuple[fx.Node, list[str]]:
        """Take the one element that is used of each picked axis."""
        present = [dim[0] if dim else "" for dim in dims]
        for axis, index in axes.picked.items():
            if axis in present:
                position = present.index(axis)
                node = self.call(aten.select.int, node, position, index)
                del present[position]
        return node, present

    def _without(self, axes: Axes, node: fx.Node, present: list[str], wanted: set[str]) -> tuple[fx.Node, list[str]]:
        """Drop dimensions of size one that nobody asks for."""
        for position in reversed(range(len(present))):
            if present[position] not in wanted:
                if static_int(shape_of(node)[position]) != 1:
                    raise RuntimeError(f"{node.name} has the unwanted axis {present[position]!r}")
                node = self.call(aten.squeeze.dim, node, position)
                del present[position]
        return node, present

    def _merge(self, axes: Axes, node: fx.Node, present: list[str], wanted: list[tuple[str, ...]]) -> fx.Node:
        position = 0
        merged: list[list[Size]] = []
        repeated = False
        shape: list[Size] = []
        for group in wanted:
            kept = [axis for axis in group if axis in present]
            if not kept:
                node = self.call(aten.unsqueeze.default, node, position)
                shape.append(1)
                merged.append([1])
                position += 1
                continue
            for axis in group:
                size = axes.sizes[axis]
                if axis not in present:
                    node = self.call(aten.unsqueeze.default, node, position)
                    repeated = repeated or static_int(size) != 1
                else:
                    size = shape_of(node)[position]
                shape.append(size)
                position += 1
            merged.append(shape[-len(group) :])
        if repeated:
            node = self.call(aten.expand.default, node, [self._size_at(node, i, s) for i, s in enumerate(shape)])
        if any(len(sizes) > 1 for sizes in merged):
            node = self._reshaped(node, merged)
        return node

    def _size_at(self, node: fx.Node, position: int, size: Size) -> int | fx.Node:
        return -1 if same_size(shape_of(node)[position], size) else self.size(size)

    def _reshaped(self, node: fx.Node, merged: list[list[Size]]) -> fx.Node:
        """Merge neighbouring dimensions, the sizes of which are given in groups."""
        position, shape = 0, list[int | fx.Node]()
        inferred = False
        for sizes in merged:
            if len(sizes) == 1:
                size = sizes[0]
                shape.append(size if isinstance(size, int) else self.call(aten.sym_size.int, node, position))
            elif all(isinstance(size, int) for size in sizes):
                product = 1
                for size in sizes:
                    product *= int(size)
                shape.append(product)
            elif not inferred:
                shape.append(-1)
                inferred = True
            else:
                raise RuntimeError(f"two dimensions of {node.name} would have to be inferred")
            position += len(sizes)
        return self.call(aten.reshape.default, node, shape)


def _units(axes: Axes, dims: Dims, wanted: list[tuple[str, ...]]) -> tuple[Axes, Dims, list[tuple[str, ...]]]:
    """Let dimensions that are wanted as they are count as one axis, so that they are not split."""
    kept: dict[tuple[str, ...], str] = {dim: "*".join(dim) for dim in dims if len(dim) > 1 and dim in wanted}
    if not kept:
        return axes, dims, wanted
    sizes = {**axes.sizes, **{name: axes.size(dim) for dim, name in kept.items()}}
    replaced = tuple((kept[dim],) if dim in kept else dim for dim in dims)
    return (
        Axes(sizes, axes.parts, axes.picked),
        replaced,
        [(kept[group],) if group in kept else group for group in wanted],
    )
