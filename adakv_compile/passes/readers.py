"""Find who else reads a layer's cache, and whether it is returned in a form that attention does not read."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Final

import torch
from torch import fx

from adakv_compile.capture import Program
from adakv_compile.passes.attention import AttentionSite
from adakv_compile.passes.cache import CacheUpdate
from adakv_compile.passes.nodes import skip_no_ops

__all__ = ["is_returned_in_disguise", "readers_of"]

aten = torch.ops.aten

_TRANSPARENT: Final = (
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
)
_PARTS: Final = (
    operator.getitem,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.repeat_interleave.self_int,
    aten.repeat.default,
)


def is_returned_in_disguise(program: Program, site: AttentionSite, which: str) -> bool:
    """Tell whether what makes the keys (or values), and not the queries, reaches the caller around the attention.

    Args:
        program: The captured graph.
        site: The attention.
        which: ``"key"`` or ``"value"``.
    """
    own = _ancestors(site.operand(which).steps[0].node) - _ancestors(site.query)
    seen, pending = set(own), list(own)
    while pending:
        for user in pending.pop().users:
            if user.op == "output":
                return True
            if user is not site.node and user not in seen and user not in program.superseded:
                seen.add(user)
                pending.append(user)
    return False


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """Return a value and all that it is computed from in the graph."""
    found, pending = {node}, [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found and source.op == "call_function":
                found.add(source)
                pending.append(source)
    return found


def readers_of(
    program: Program,
    updates: Iterable[CacheUpdate],
    attentions: frozenset[fx.Node],
    computed: frozenset[fx.Node] = frozenset(),
) -> tuple[str, ...]:
    """Name the readers of a layer's cache other than attentions, the caller and size queries.

    A compressed cache has no dense form, so in the decode graph such a reader would have nothing to read.

    Args:
        program: The captured graph.
        updates: The layer's keys and values.
        attentions: The attentions that are going to read the compressed form.
        computed: What their keys and values are computed with from what is cached.
    """
    pending: list[fx.Node] = []
    slots: set[int] = set()
    for update in updates:
        nodes = (update.whole, update.cached, update.past, update.holder)
        pending += [node for node in nodes if node is not None]
        slots.update(update.slots)
    known = set(pending)
    found: list[str] = []
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.op == "output":
                if any(value is node and slot not in slots for slot, value in enumerate(program.outputs)):
                    found.append("the caller, in another form")
                continue
            if user in known or user in program.superseded or user in attentions or user.target is aten.sym_size.int:
                continue
            known.add(user)
            if (
                user in computed
                or user.target in _TRANSPARENT
                or user.target in _PARTS
                or skip_no_ops(user) is not user
            ):
                pending.append(user)
            else:
                found.append(str(user.target))
    return tuple(dict.fromkeys(found))
