"""Find keys that are cached before their position embedding, which is applied to all of them at every step.

What is computed position by position can as well be computed once for every new entry, and kept.
"""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import fx

from adakv_compile.capture import Program
from adakv_compile.passes.attention import Operand
from adakv_compile.passes.axes import Dims, climb
from adakv_compile.passes.emit import Emitter
from adakv_compile.passes.nodes import arg, same_size, shape_of, skip_no_ops
from adakv_compile.passes.positional import is_kept, is_positional
from adakv_compile.passes.region import TAKE_SIZES, Region, clone, find_region

__all__ = ["Late", "find_late"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Late:
    """How what attention reads is computed from what is cached.

    Attributes:
        region: The computation.
        source: What is cached, ``[..., past and new, ...]``.
        result: What is computed from it, of the same shape.
        dims: Dimensions of both.
    """

    region: Region
    source: fx.Node
    result: fx.Node
    dims: Dims

    def of_new(self, emit: Emitter, new: fx.Node, dim: int) -> fx.Node:
        """Compute the result for the newest entries alone.

        Args:
            emit: Adds the calls.
            new: The newest entries.
            dim: The dimension of their sequence.
        """
        count = shape_of(new)[dim]
        length = count if isinstance(count, int) else emit.call(aten.sym_size.int, new, dim)
        back = -length if isinstance(length, int) else emit.call(operator.neg, length)
        sources = {self.source: new}
        for node, at in self.region.positional.items():
            sources[node] = emit.call(aten.slice.Tensor, node, at, back)
        return clone(emit, self.region, sources, length)[self.result]


def find_late(program: Program, operand: Operand) -> tuple[Operand, Late] | None:
    """Return keys or values in terms of what is cached, and how they are computed from it.

    Args:
        program: The captured graph.
        operand: The keys or values, which are not cached themselves.
    """
    top = operand.steps[-1]
    dims = operand.axes.resolve(top.dims)
    column = next((i for i, dim in enumerate(dims) if dim == operand.column), None)
    if column is None or not top.whole:
        return None
    returned = {skip_no_ops(output) for output in program.outputs if isinstance(output, fx.Node)}

    def is_source(node: fx.Node, dim: int) -> bool:
        if node in program.compressed or node in returned:
            return True
        return node.target is aten.cat.default and arg(node, 1, "dim", 0) in (dim, dim - len(shape_of(node)))

    region = find_region([(top.node, column)], is_source, lambda node, dim: is_positional(program, node, dim))
    if region is None or len(region.sources) != 1 or not _stays(program, region):
        return None
    ((source, at),) = region.sources.items()
    shapes = shape_of(source), shape_of(top.node)
    if at != column or len(shapes[0]) != len(shapes[1]):
        return None
    if not all(same_size(a, b) for a, b in zip(*shapes, strict=True)):
        return None
    steps = tuple(climb(operand.axes, source, dims))
    return dataclasses.replace(operand, steps=steps), Late(region, source, top.node, dims)


def _stays(program: Program, region: Region) -> bool:
    """Whether a computation is the same in every call: with the model's own tensors and with numbers."""
    ours = {*region.nodes, *region.sources, *region.positional}
    for node in region.nodes:
        for source in node.all_input_nodes:
            if source in ours:
                continue
            if isinstance(source.meta.get("val"), torch.Tensor):
                if not is_kept(program, source):
                    return False
            elif node.target not in TAKE_SIZES:
                return False
    return True
