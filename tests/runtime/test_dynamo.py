"""What Dynamo makes of compressed views: dense inputs of the logical shape, and one graph for all lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from adakv_compile.runtime.boundary import join, wrap_grown
from adakv_compile.runtime.compressed import CompressedKV
from tests.runtime.dense import conversation


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@dataclass
class Decode:
    """A backend that runs a decode step as a compiled graph would: join, append, wrap."""

    graphs: list[fx.GraphModule] = field(default_factory=list)

    def __call__(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)

        def run(*args: Any) -> tuple[Any, ...]:
            key, value = (arg for arg in args if isinstance(arg, CompressedKV))
            new = next(arg for arg in args if type(arg) is torch.Tensor)
            store = join(key, value, new.shape[2])
            store.append(new, new)
            return (*wrap_grown(store, key.length + new.shape[2], key.start), new)

        return run


def _step(key: torch.Tensor, value: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, ...]:
    key, value = torch.cat([key, new], dim=-2), torch.cat([value, new], dim=-2)
    return key, value, F.scaled_dot_product_attention(new, key, value)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_graph_serves_every_length_and_every_prompt(mode: Callable[[], Any]) -> None:
    backend = Decode()
    step = torch.compile(_step, backend=backend)
    with mode():
        for seed, length in enumerate((17, 30, 8)):
            talk = conversation(seed, length=length)
            key, value = talk.key, talk.value
            for tokens in range(70):
                key, value, _ = step(key, value, torch.ones(2, 3, 1, 8).double())
                assert key.shape == (2, 3, length + tokens + 1, 8)
    assert len(backend.graphs) == 1


def test_views_of_a_sliding_window_use_the_same_graph() -> None:
    backend = Decode()
    step = torch.compile(_step, backend=backend)
    talk = conversation()
    new = torch.ones(2, 3, 1, 8).double()
    with torch.no_grad():
        step(talk.key, talk.value, new)
        step(talk.key[:, :, 4:], talk.value[:, :, 4:], new)
        step(torch.cat([talk.key, new], 2), torch.cat([talk.value, new], 2), new)
    assert len(backend.graphs) == 1


def test_the_graph_sees_dense_inputs_of_the_logical_shape() -> None:
    backend = Decode()
    talk = conversation()
    with torch.no_grad():
        torch.compile(_step, backend=backend)(talk.key, talk.value, torch.ones(2, 3, 1, 8).double())
    (graph,) = backend.graphs
    calls = [node.target for node in graph.graph.find_nodes(op="call_function", target=torch.cat)]
    assert len(calls) == 2
    caches = [
        node.meta["example_value"]
        for node in graph.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("example_value"), CompressedKV)
    ]
    assert len(caches) == 2
    for cache in caches:
        batch, heads, length, dim = cache.shape
        assert (batch, heads, dim) == (2, 3, 8)
        assert isinstance(length, torch.SymInt)
    attention = graph.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    assert tuple(attention[0].meta["example_value"].shape) == (2, 3, 1, 8)


def test_other_batch_sizes_compile_again_and_run() -> None:
    backend = Decode()
    step = torch.compile(_step, backend=backend)
    with torch.no_grad():
        for batch in (1, 2, 3, 4):
            talk = conversation(batch=batch)
            key, _, _ = step(talk.key, talk.value, torch.ones(batch, 3, 1, 8).double())
            assert key.shape[0] == batch
    assert len(backend.graphs) <= 3  # one row, two rows, then a symbolic number of rows


def test_tracing_leaves_the_views_alone() -> None:
    talk = conversation()

    def read(key: torch.Tensor) -> torch.Tensor:
        return torch.arange(key.shape[2]) + key.size(-1)

    out = torch.compile(read, backend="eager")(talk.key)
    assert torch.equal(out, torch.arange(17) + 8)
    assert torch.equal(talk.key.dense()[1], talk.held)
    assert talk.key.store.tail_length == 0
