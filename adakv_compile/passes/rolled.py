"""Find buffers that hold the newest entries of a layer: they move from slot to slot, so no slot is a position."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from adakv_compile.capture import Program
from adakv_compile.passes.attention import AttentionSite
from adakv_compile.passes.nodes import shape_of, skip_no_ops
from adakv_compile.passes.written import WRITES, dim_of, is_copy

__all__ = ["room_of_newest"]

aten = torch.ops.aten
Size = int | torch.SymInt


def room_of_newest(program: Program, site: AttentionSite) -> Size | None:
    """Return for how many tokens a buffer of the newest entries has room; ``None`` if this is no such buffer.

    Two forms are known, those of a static cache with a sliding window: a buffer that was rolled before it is written to
    and read, and one to which the end of what attention reads is copied.

    Args:
        program: The captured graph; it is only read.
        site: The attention.
    """
    rooms = [_room(program, site, which) for which in ("key", "value")]
    return rooms[0] if None not in rooms else None


def _room(program: Program, site: AttentionSite, which: str) -> Size | None:
    read = {step.node for step in site.operand(which).steps}
    values = (*(final for _, final in program.mutated), *program.outputs)
    for value in values:
        held = skip_no_ops(value) if isinstance(value, fx.Node) else None
        if held is None or not is_copy(held):
            continue
        source = skip_no_ops(cast("fx.Node", held.args[1]))
        if held in read and (rolled := _rolled(source)) is not None:
            return shape_of(rolled)[cast("list[int]", rolled.args[2])[0]]
        if source.target is aten.slice.Tensor and skip_no_ops(cast("fx.Node", source.args[0])) in read:
            return shape_of(source)[dim_of(source, 1)]
    return None


def _rolled(node: fx.Node) -> fx.Node | None:
    """Return the rotation that a value was written over, if it goes along one dimension."""
    while node.target in WRITES:
        node = skip_no_ops(cast("fx.Node", node.args[0]))
    one_dim = node.target is aten.roll.default and len(node.args) > 2 and len(cast("list[int]", node.args[2])) == 1
    return node if one_dim else None
