"""What Dynamo makes of compressed views in any layout: dynamic along their sequence only, one graph for each layout."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from adakv_compile.runtime.boundary import join, wrap_grown
from adakv_compile.runtime.compressed import CompressedKV
from adakv_compile.runtime.layout import STANDARD, Layout
from tests.runtime.dense import HEADS, KEY_DIM, conversation
from tests.runtime.test_layout_views import PAIRS, SINGLE

LAYOUTS = SINGLE + PAIRS


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@dataclass
class Decode:
    """A backend that runs a decode step as a compiled graph would, on whatever layout its caches have."""

    graphs: list[fx.GraphModule] = field(default_factory=list)

    def __call__(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)

        def run(*args: Any) -> tuple[Any, ...]:
            caches = [arg for arg in args if isinstance(arg, CompressedKV)]
            (new,) = (arg for arg in args if type(arg) is Tensor)
            key, value = caches[0], caches[-1]
            layout = key.axes
            entries = (
                layout.split_pair(new, HEADS, KEY_DIM)
                if layout.is_pair
                else (layout.to_standard(new, HEADS, KEY_DIM), layout.to_standard(new, HEADS, KEY_DIM))
            )
            tokens = new.shape[layout.sequence_dim]
            store = join(key, value, tokens)
            store.append(*entries)
            return wrap_grown(store, key.length + tokens, key.start, (key.axes, value.axes))[: len(caches)]

        return run


def _pair_step(pair: Tensor, new: Tensor, dim: int) -> tuple[Tensor, ...]:
    return (torch.cat([pair, new], dim),)


def _step(key: Tensor, value: Tensor, new: Tensor, dim: int) -> tuple[Tensor, ...]:
    return torch.cat([key, new], dim), torch.cat([value, new], dim)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_graph_serves_every_length(layout: Layout, dynamic: bool | None) -> None:
    backend = Decode()
    step = torch.compile(_pair_step if layout.is_pair else _step, backend=backend, dynamic=dynamic)
    new = torch.ones(layout.shape(2, HEADS, 1, KEY_DIM)).double()
    with torch.no_grad():
        for seed, length in enumerate((17, 30, 8)):
            store = conversation(seed, length=length).key.store
            views = wrap_grown(store, length, layouts=(layout, layout))[: 1 if layout.is_pair else 2]
            for tokens in range(1, 5):
                views = step(*views, new, layout.sequence_dim)
                for view in views:
                    assert view.shape == layout.shape(2, HEADS, length + tokens, KEY_DIM)
    assert len(backend.graphs) == 1
    caches = [
        node.meta["example_value"]
        for node in backend.graphs[0].graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("example_value"), CompressedKV)
    ]
    assert len(caches) == (1 if layout.is_pair else 2)
    for cache in caches:
        assert cache.axes == layout
        symbolic = [dim for dim, size in enumerate(cache.shape) if isinstance(size, torch.SymInt)]
        if dynamic is None:
            assert symbolic == [layout.sequence_dim]
        assert layout.sequence_dim in symbolic


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_graph_is_not_used_for_another_layout_of_the_same_shape(dynamic: bool | None) -> None:
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda cache: torch.arange(cache.shape[1]), backend=keep, dynamic=dynamic)
    store = conversation(length=HEADS).key.store
    for count, layout in enumerate((STANDARD, Layout(("b", "l", "h", "d"))), start=1):
        for _ in range(2):
            key, _ = wrap_grown(store, HEADS, layouts=(layout, layout))
            assert key.shape == (2, HEADS, HEADS, KEY_DIM)
            step(key)
            assert len(graphs) == count


def test_under_tracing_any_layout_is_a_dense_tensor() -> None:
    talk = conversation()
    layout = Layout(("bh", "d", "l"))
    key, _ = wrap_grown(talk.key.store, 17, layouts=(layout, layout))

    def read(cache: Tensor) -> Tensor:
        standard = cache.view(2, 3, 8, -1).transpose(2, 3)
        return torch.arange(standard.shape[2]) + (standard.detach() * 2).shape[1]

    shapes: list[torch.Size] = []

    def keep(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        (multiplied,) = graph.graph.find_nodes(op="call_function", target=operator.mul)
        shapes.append(multiplied.meta["example_value"].shape)
        return lambda *args: (torch.arange(args[-1].shape[2]) + 3,)

    out = torch.compile(read, backend=keep)(key)
    assert shapes[0][:2] == (2, 3)
    assert shapes[0][3] == 8
    assert torch.equal(out, torch.arange(17) + 3)
