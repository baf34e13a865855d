"""From Dynamo's graph to a functional ATen program, with every compressed cache seen as a dense tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from adakv_compile import _torch
from adakv_compile.batched import write_out_vmaps
from adakv_compile.block_masks import BlockTable
from adakv_compile.forward_only import without_backward
from adakv_compile.runtime.compressed import CompressedKV
from adakv_compile.runtime.layout import Layout

__all__ = ["CaptureError", "Program", "Spelled", "capture"]


class CaptureError(Exception):
    """The graph can't be captured; it is left alone."""


@dataclass(frozen=True)
class Spelled:
    """An attention that the model writes out.

    Attributes:
        result: What the readers of ``original`` got instead: the operator's result in the same shape and dtype.
        original: What the model computes.
        exact: Whether the operator means the same only if its mask is proved to add nothing but zero and what hides.
    """

    result: fx.Node
    original: fx.Node
    exact: bool = False


@dataclass(frozen=True)
class Program:
    """A captured graph, owned by the pipeline: the rewrite may change it, Dynamo's own graph is never touched.

    Attributes:
        module: Functional pre-dispatch ATen; ``node.meta["val"]`` holds fake tensors.
        inputs: The placeholders, in the order of the example inputs.
        compressed: The placeholders whose example input is a ``CompressedKV``; in the graph they are dense.
        layouts: The layouts of those.
        kept: The placeholders that are attributes of modules, with their tensors.
        outputs: The values the user's code gets back, in order.
        mutated: For every input that the user's code changes in place, the placeholder and its final value.
        fake_mode: The mode all fakes live in.
        spelled: Attention operators that were added for attentions which the model writes out, and what they stand for.
        superseded: What only those written-out attentions need.
        refused: Operators that attend and were not understood, and why.
        checks: What must hold of the arguments of every call.
    """

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    compressed: frozenset[fx.Node]
    layouts: Mapping[fx.Node, Layout]
    kept: Mapping[fx.Node, torch.Tensor]
    outputs: tuple[object, ...]
    mutated: tuple[tuple[fx.Node, fx.Node], ...]
    fake_mode: _torch.FakeTensorMode
    spelled: Mapping[fx.Node, Spelled] = field(default_factory=dict[fx.Node, Spelled])
    superseded: frozenset[fx.Node] = frozenset()
    refused: Mapping[fx.Node, str] = field(default_factory=dict[fx.Node, str])
    checks: tuple[BlockTable, ...] = ()


def capture(gm: fx.GraphModule, example_inputs: Sequence[object]) -> Program:
    """Capture Dynamo's graph.

    Args:
        gm: Dynamo's graph. It is only read.
        example_inputs: What Dynamo passes to a backend, one for each placeholder; values are never read.

    Raises:
        CaptureError: The graph holds what the functional form can't express.
    """
    fake_mode = _torch.fake_mode_of_this_compile()
    if fake_mode is None:
        raise CaptureError("the backend was called outside of a Dynamo compilation")
    gm = without_backward(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    fakes = [
        _dense_fake(fake_mode, node.meta.get("example_value", example))
        for node, example in zip(placeholders, example_inputs, strict=True)
    ]
    module, mutated, lifted = _torch.capture(write_out_vmaps(gm), fakes, fake_mode)
    if lifted:
        raise CaptureError(f"parameters or buffers are not inputs of the graph: {', '.join(lifted)}")
    graph = module.graph
    _drop_metadata_checks(graph)
    inputs = tuple(graph.find_nodes(op="placeholder"))
    by_name = {node.name: node for node in graph.nodes}
    (returned,) = next(iter(graph.find_nodes(op="output"))).args
    assert isinstance(returned, (tuple, list))
    changed = tuple((by_name[source], by_name[value]) for value, source in mutated.items())
    layouts = {
        node: example.axes
        for node, example in zip(inputs, example_inputs, strict=True)
        if isinstance(example, CompressedKV)
    }
    return Program(
        module=module,
        inputs=inputs,
        compressed=frozenset(layouts),
        layouts=layouts,
        kept={
            node: example
            for node, example in zip(inputs, example_inputs, strict=True)
            if isinstance(example, torch.Tensor) and _torch.is_kept_by_module(example)
        },
        outputs=tuple(returned[len(mutated) :]),
        mutated=changed,
        fake_mode=fake_mode,
    )


def _drop_metadata_checks(graph: fx.Graph) -> None:
    """Erase assertions about dtypes and layouts that tracing already proved; they would count as readers of values."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _dense_fake(fake_mode: _torch.FakeTensorMode, value: object) -> object:
    """Show a compressed cache as the dense tensor whose shape it reports; leave everything else as it is."""
    if isinstance(value, CompressedKV):
        with fake_mode:
            return torch.empty(tuple(value.shape), dtype=value.dtype, device=value.device)
    if isinstance(value, torch.Tensor) and not _torch.is_fake(value):
        return fake_mode.from_tensor(value, static_shapes=True)
    return value
