"""Drop what only the backward pass of ``flex_attention`` reads: made inside of a graph, it is made by vmap.

Attention without a block mask makes one of a single block, and with it tables from keys to queries. No gradient is
computed here, so that nothing of them is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

import torch
from torch import fx

__all__ = ["without_backward"]

_FLEX: Final = torch.ops.higher_order.flex_attention
_FORWARD: Final = {6: 2, 7: 3, 8: 4, 9: 5}
"""Where a block mask holds tables from keys to queries, and those from queries to keys that are as good."""


def without_backward(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a Dynamo graph in which block masks that it makes itself have no tables for a backward pass.

    Args:
        gm: Dynamo's graph; it is only read.
    """
    if not gm.graph.find_nodes(op="call_function", target=_FLEX) or not _regions(gm.graph):
        return gm
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(cast("fx.Node", graph.graph_copy(gm.graph, copies)))
    for node, copy in copies.items():
        copy.meta = dict(node.meta)
    spare: list[fx.Node] = []
    for node in graph.find_nodes(op="call_function", target=_FLEX):
        tables = list(cast("tuple[object, ...]", node.args[4]))
        for backward, forward in _FORWARD.items():
            table = tables[backward]
            if isinstance(table, fx.Node) and table.op != "placeholder":
                spare.append(table)
                tables[backward] = tables[forward]
        node.update_arg(4, tuple(tables))
    _erase_unused(graph, spare)
    for region in _regions(graph):
        if all(user in region for node in region for user in node.users):
            for node in reversed(region):
                graph.erase_node(node)
    return fx.GraphModule(gm, graph)


def _regions(graph: fx.Graph) -> list[list[fx.Node]]:
    """Return the calls from each outermost beginning of a vmap to its end."""
    found: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        begins = name == "_vmap_increment_nesting"
        if begins and depth == 0:
            found.append([])
        depth += begins
        if depth:
            found[-1].append(node)
        depth -= name == "_vmap_decrement_nesting"
    return found


def _erase_unused(graph: fx.Graph, spare: Sequence[fx.Node]) -> None:
    """Erase values that nobody uses any more, and what only they were computed from, outside of any vmap."""
    inside = {node for region in _regions(graph) for node in region}
    pending = list(dict.fromkeys(spare))
    while pending:
        node = pending.pop()
        if node.users or node in inside or node.op not in ("call_function", "call_method"):
            continue
        sources = node.all_input_nodes
        graph.erase_node(node)
        pending = [other for other in dict.fromkeys((*pending, *sources)) if other is not node]
