"""What grows and what doesn't: work of the analysis over the layers, graphs over the chunks of a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import adakv_compile
from adakv_compile import _torch
from adakv_compile.passes import masks, plan
from adakv_compile.passes.emit import Emitter
from adakv_compile.passes.masks import MaskProver
from adakv_compile.symbolic.simplify import Simplifier
from tests.models.families import VOCAB, build

OPTIONS: dict[str, Any] = {"budget": 24, "window": 8, "inner": "eager", "strict": True}
ONCE = ("classify", "_prove", "__call__")
EACH_LAYER = ("prove", "find_cache_update", "call", "fresh_size")


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls of what proves, simplifies and writes."""
    counted: Counter[str] = Counter()

    def count(owner: object, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def counting(*args: Any, **rest: Any) -> Any:
            counted[name] += 1
            return function(*args, **rest)

        monkeypatch.setattr(owner, name, counting)

    count(masks, "classify")
    count(MaskProver, "_prove")
    count(MaskProver, "prove")
    count(Simplifier, "__call__")
    count(plan, "find_cache_update")
    count(Emitter, "call")
    count(_torch, "fresh_size")
    return counted


def test_every_layer_costs_the_analysis_the_same_and_their_mask_is_proved_once(calls: Counter[str]) -> None:
    counted: dict[int, Counter[str]] = {}
    for layers in (2, 4, 8):
        calls.clear()
        torch.compiler.reset()
        ids = _ids(2, 40)
        report = adakv_compile.explain(
            build("llama", layers=layers), ids, attention_mask=torch.ones_like(ids), use_cache=True, options=OPTIONS
        )
        assert len(report.sites) == 2 * layers
        counted[layers] = Counter(calls)
    for name in ONCE:
        # In the graph of the prompt and in that of a step.
        assert 0 < counted[2][name] == counted[4][name] == counted[8][name], name
    for name in EACH_LAYER:
        two, four, eight = (counted[layers][name] for layers in (2, 4, 8))
        assert two > 0, name
        assert eight - four == 2 * (four - two), name


def test_every_graph_tells_the_time_of_each_stage() -> None:
    report = adakv_compile.explain(build("llama"), _ids(2, 40), use_cache=True, options=OPTIONS)
    for graph in report.graphs:
        assert list(graph.seconds) == ["capture", "analyse", "rewrite", "compile"]
        assert all(seconds >= 0 for seconds in graph.seconds.values())
    assert str(report).count("  capture ") == len(report.graphs)


def test_chunks_of_a_prompt_take_as_many_graphs_however_many_they_are() -> None:
    model = build("llama")
    model.compile(backend="adakv", options=OPTIONS, dynamic=True)
    counters.clear()
    cache, graphs = None, list[int]()
    with torch.no_grad():
        for chunk in _ids(1, 16 * 9 + 5).split(16, dim=1):
            cache = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            graphs.append(counters["stats"]["unique_graphs"])
            held = {layer.keys.store.keys.shape[1] for layer in cache.layers}
            assert held == {2 * min(24, cache.get_seq_length())}
    # Dynamo takes sizes that are equal in the second chunk for one, and learns better once at most.
    assert graphs[:2] == [1, 2]
    assert len(set(graphs[2:-1])) == 1
    assert graphs[-1] <= 3


def test_generate_takes_a_prompt_in_chunks() -> None:
    model, ids = build("llama"), _ids(1, 16 * 9 + 5)
    model.compile(backend="adakv", options=OPTIONS, dynamic=True)
    settings: dict[str, Any] = {"do_sample": False, "prefill_chunk_size": 16, "return_dict_in_generate": True}
    out = model.generate(ids, max_new_tokens=3, **settings)
    cache, newest = None, torch.empty(0)
    with torch.no_grad():
        for chunk in ids.split(16, dim=1):
            result = model(chunk, past_key_values=cache, use_cache=True)
            cache, newest = result.past_key_values, result.logits[0, -1]
    assert out.sequences[0, ids.shape[1]] == newest.argmax()
    counters.clear()
    model.generate(_ids(1, 16 * 30 + 3), max_new_tokens=3, **settings)
    assert counters["stats"]["unique_graphs"] == 0
    for layer in out.past_key_values.layers:
        assert layer.keys.store.keys.shape[1] == 2 * 24
