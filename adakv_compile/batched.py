"""Write out what ``torch.vmap`` does in a Dynamo graph, which can't be captured before dispatch otherwise.

Dynamo traces ``vmap`` (of an associative scan, of a block mask) as calls that enter a level, wrap tensors, compute
on what looks like single examples, unwrap, and leave the level. Capturing happens above the level at which that is
resolved. So each such stretch is traced alone, below it, to operators on whole batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Final

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from adakv_compile._torch import FakeTensor

__all__ = ["write_out_vmaps"]

_MODULE: Final = "torch._functorch.predispatch"
_ENTER: Final = "_vmap_increment_nesting"
_LEAVE: Final = "_vmap_decrement_nesting"


def write_out_vmaps(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a graph without ``vmap``: ``gm`` itself where there is none, else a copy.

    Args:
        gm: Dynamo's graph; not modified.
    """
    stretches = list(_stretches(gm.graph))
    if not stretches:
        return gm
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    pending = iter([*stretches, []])
    stretch = next(pending)
    for node in gm.graph.nodes:
        if stretch and node in stretch:
            if node is stretch[-1]:
                _write_out(gm, stretch, graph, copies)
                stretch = next(pending)
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.lint()
    return fx.GraphModule(gm, graph)


def _stretches(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Yield the nodes from each entry of an outermost level to the matching exit."""
    depth, stretch = 0, list[fx.Node]()
    for node in graph.nodes:
        called = _predispatch(node)
        if called == _ENTER:
            depth += 1
        if depth:
            stretch.append(node)
        if called == _LEAVE:
            depth -= 1
            if depth == 0:
                yield stretch
                stretch = []


def _predispatch(node: fx.Node) -> str:
    target = node.target
    return getattr(target, "__name__", "") if getattr(target, "__module__", "") == _MODULE else ""


def _write_out(
    gm: fx.GraphModule,
    stretch: Sequence[fx.Node],
    graph: fx.Graph,
    copies: dict[fx.Node, fx.Node],
) -> None:
    """Append to ``graph`` what a stretch computes, and enter its results into ``copies``."""
    inside = set(stretch)
    inputs = list(dict.fromkeys(source for node in stretch for source in node.all_input_nodes if source not in inside))
    results = [node for node in stretch if any(user not in inside for user in node.users)]
    alone = fx.Graph()
    own = {source: alone.placeholder(source.name) for source in inputs}
    for node in stretch:
        own[node] = alone.node_copy(node, own.__getitem__)
    alone.output(tuple(own[node] for node in results))
    examples = [_example(gm, source) for source in inputs]
    # Dynamo's own mode, not the one that it gives to backends; both know sizes by the same symbols.
    modes = [example.fake_mode for example in examples if isinstance(example, FakeTensor)]
    with modes[0] if modes else nullcontext(), torch.no_grad():
        traced = make_fx(fx.GraphModule(gm, alone))(*examples)
    values = dict(zip(traced.graph.find_nodes(op="placeholder"), (copies[source] for source in inputs), strict=True))
    returned: Any = None
    for node in traced.graph.nodes:
        if node.op == "output":
            returned = node.args[0]
        elif node.op != "placeholder":
            values[node] = graph.node_copy(node, values.__getitem__)
    copies.update({node: values[value] for node, value in zip(results, returned, strict=True)})


def _example(gm: fx.GraphModule, node: fx.Node) -> Any:
    """Return the fake value of a node."""
    if node.op == "get_attr":
        return getattr(gm, str(node.target))
    return node.meta["example_value"]
