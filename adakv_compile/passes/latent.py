"""Find attentions whose keys and values are computed from a cache that all heads share: multi-head latent attention.

What is cached is small and has one head; keys and values of all query heads are computed from it at every step,
position by position (DeepSeek-V2, arXiv 2405.04434). So which entries to keep is one decision for all heads, and a step
computes keys and values of the kept entries only.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from adakv_compile.capture import Program
from adakv_compile.passes.attention import AttentionSite, Operand
from adakv_compile.passes.axes import Axes, climb
from adakv_compile.passes.nodes import arg, shape_of, skip_no_ops, static_int
from adakv_compile.passes.region import Region, find_region

__all__ = ["find_latent"]

aten = torch.ops.aten


def find_latent(program: Program, site: AttentionSite) -> tuple[AttentionSite, Region] | None:
    """Return an attention in terms of what is cached, and how keys and values are computed from it.

    Args:
        program: The captured graph.
        site: The attention, whose keys and values are not cached themselves.
    """
    returned = {skip_no_ops(output) for output in program.outputs if isinstance(output, fx.Node)}

    def is_source(node: fx.Node, dim: int) -> bool:
        if node in program.compressed or node in returned:
            return True
        return node.target is aten.cat.default and arg(node, 1, "dim", 0) in (dim, dim - len(shape_of(node)))

    results = [(operand.steps[0].node, 2) for operand in (site.keys, site.values)]
    region = find_region(results, is_source)
    if region is None or len(region.sources) != 2:
        return None
    order = sorted(region.sources, key=lambda node: _slot(program, node))
    operands = [_operand(node, region.sources[node]) for node in order]
    if operands[0] is None or operands[1] is None:
        return None
    return dataclasses.replace(site, keys=operands[0], values=operands[1]), region


def _slot(program: Program, node: fx.Node) -> int:
    """Return the first output that holds a value: a layer's keys come before its values."""
    slots = [
        i for i, output in enumerate(program.outputs) if isinstance(output, fx.Node) and skip_no_ops(output) is node
    ]
    return slots[0] if slots else len(program.outputs)


def _operand(node: fx.Node, dim: int) -> Operand | None:
    """Describe a cached tensor with one head, ``[B, 1, L, D]`` or ``[B, L, D]``."""
    shape = shape_of(node)
    if (len(shape), dim) == (4, 2) and static_int(shape[1]) == 1:
        names = ["batch", "heads", "column", "inner"]
    elif (len(shape), dim) == (3, 1):
        names = ["batch", "column", "inner"]
    else:
        return None
    axes = Axes()
    steps = tuple(climb(axes, node, axes.name(shape, names)))
    if "heads" not in names:
        axes.add("heads", 1)
    return Operand(steps, axes, *(axes.flat((name,)) for name in ("batch", "heads", "column", "inner")))
