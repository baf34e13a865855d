"""The backend by name, through Inductor: counts of graphs, disk caches, methods of compiled modules, reports."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import TestCase
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import DynamicCache

import adakv_compile
from adakv_compile import CompressedKV
from adakv_compile.testing import assert_compressed, graph_snapshot
from tests.backend.decoders import OneLayer
from tests.models.families import VOCAB, build

SMALL: dict[str, Any] = {"budget": 24, "window": 8, "inner": "eager", "strict": True}


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length))


def test_one_prefill_graph_and_one_decode_graph_serve_every_length() -> None:
    model = build("llama")
    model.compile(backend="adakv", options=SMALL, dynamic=True)
    counters.clear()
    for length in (30, 64, 100, 9):
        model.generate(_ids(2, length), max_new_tokens=5, do_sample=False)
    assert counters["stats"]["unique_graphs"] == 2


def test_without_dynamic_the_first_length_costs_one_more_graph() -> None:
    model = build("llama")
    model.compile(backend="adakv", options=SMALL)
    counters.clear()
    for length in (30, 64, 100, 9):
        model.generate(_ids(2, length), max_new_tokens=5, do_sample=False)
    assert counters["stats"]["unique_graphs"] == 3


def test_a_long_generation_recompiles_nothing() -> None:
    model = build("llama", layers=1, max_position_embeddings=2048)
    model.compile(backend="adakv", options=SMALL, dynamic=True)
    counters.clear()
    out = model.generate(_ids(1, 60), max_new_tokens=1000, do_sample=False, return_dict_in_generate=True)
    assert counters["stats"]["unique_graphs"] == 2
    assert out.past_key_values.layers[0].keys.head_lengths.sum() == 2 * (24 + 999)


def test_inductor_gives_the_uncompiled_tokens_when_nothing_is_evicted() -> None:
    model = build("llama")
    plain = copy.deepcopy(model)
    model.compile(backend="adakv", options={"budget": 400}, dynamic=True)
    ids, mask = _ids(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0, :9] = 0
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))


def test_a_refused_graph_is_inductors_bit_for_bit() -> None:
    x = torch.randn(2, 40, 64)
    bidirectional = OneLayer(lambda new, total: None)
    with torch.no_grad():
        plain, (k, v) = torch.compile(bidirectional, backend="inductor")(x)
        torch._dynamo.reset()
        with pytest.warns(UserWarning, match="MASK_NOT_CAUSAL"):
            ours, (our_k, our_v) = torch.compile(bidirectional, backend="adakv")(x)
    assert torch.equal(ours, plain)
    assert torch.equal(our_k, k)
    assert torch.equal(our_v, v)


_WARM = """
import torch
from torch._dynamo.utils import counters
from tests.models.families import build
model = build("llama", layers=1)
model.compile(backend="adakv", options={"budget": 24, "window": 8}, dynamic=True)
model.generate(torch.full((1, 40), 5), max_new_tokens=3, do_sample=False)
found = counters["aot_autograd"]
print(found["autograd_cache_hit"], found["autograd_cache_miss"], found["autograd_cache_bypass"])
"""


def test_a_second_process_finds_the_compiled_graphs(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    said = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _WARM],
            env=environment,
            cwd=root,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert said == [["0", "2", "0"], ["2", "0", "0"]]


def test_generate_of_a_wrapped_model_is_compressed() -> None:
    model = build("llama")
    wrapped: Any = torch.compile(model, backend="adakv", options=SMALL, dynamic=True)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    out = wrapped.generate(_ids(1, 60), **settings)
    assert isinstance(out.past_key_values.layers[0].keys, CompressedKV)
    # Only calls through the wrapper are compiled, as with every torch.compile: the model itself stays as it was.
    assert not isinstance(model.generate(_ids(1, 60), **settings).past_key_values.layers[0].keys, CompressedKV)
    other: Any = torch.compile(model, backend="eager")
    assert not isinstance(other.generate(_ids(1, 60), **settings).past_key_values.layers[0].keys, CompressedKV)


def test_the_decorator_takes_functions_modules_and_classes() -> None:
    x = torch.randn(1, 40, 64)

    @adakv_compile.compile(**SMALL)
    class Decorated(OneLayer):
        pass

    model = Decorated()
    instance = adakv_compile.compile(OneLayer(), **SMALL)
    layer = OneLayer()
    function = adakv_compile.compile(lambda value: layer(value), **SMALL)
    with torch.no_grad():
        for call in (model, instance, function):
            assert isinstance(call(x)[1][0], CompressedKV)
    assert isinstance(model, Decorated)
    assert isinstance(instance, nn.Module)
    with pytest.raises(TypeError, match=r"takes a function, an nn\.Module or an nn\.Module class"):
        adakv_compile.compile(3)
    with pytest.raises(adakv_compile.OptionsError, match="did you mean 'budget'"):
        adakv_compile.compile(OneLayer(), bugdet=3)


def test_a_failure_in_the_middle_of_a_step_leaves_the_cache_whole() -> None:
    model = OneLayer()
    compiled = torch.compile(model, backend="adakv", options=SMALL, dynamic=True)
    step = torch.randn(1, 1, 64)
    with torch.no_grad():
        _, cache = compiled(torch.randn(1, 40, 64))
        expected, _ = compiled(step, copy.deepcopy(cache))
        store = cache[0].store
        keys, store.keys = store.keys, store.keys[:, :, :8]
        with pytest.raises(Exception, match="keys"):
            compiled(step, cache)
        store.keys = keys
        found, _ = compiled(step, cache)
    assert torch.equal(found, expected)


class _Counting(OneLayer):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, cache: Any = None) -> Any:
        self.calls.add_(1)
        y, cache = super().forward(x, cache)
        return y * self.calls, cache


def test_what_the_model_changes_in_place_is_changed() -> None:
    model = _Counting()
    plain = copy.deepcopy(model)
    compiled = adakv_compile.compile(model, **{**SMALL, "budget": 400})
    cache, dense = None, None
    with torch.no_grad():
        for length in (40, 1, 1, 7):
            x = torch.randn(2, length, 64)
            y, cache = compiled(x, cache)
            expected, dense = plain(x, dense)
            torch.testing.assert_close(y, expected)
    assert model.calls == plain.calls == 4
    assert isinstance(cache, tuple)
    assert isinstance(cache[0], CompressedKV)


def test_inference_mode() -> None:
    model = build("llama")
    model.compile(backend="adakv", options=SMALL, dynamic=True)
    with torch.inference_mode():
        first = model(_ids(1, 60), use_cache=True)
        second = model(_ids(1, 1), past_key_values=first.past_key_values)
    assert second.past_key_values.layers[0].keys.head_lengths.sum() == 2 * 25


def test_a_prompt_of_one_token_and_a_window_longer_than_the_prompt() -> None:
    model = build("llama")
    plain = copy.deepcopy(model)
    model.compile(backend="adakv", options=SMALL, dynamic=True)
    for length in (1, 2, 5):
        ids = _ids(1, length)
        settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))


def test_a_cache_of_another_model_is_refused_by_name() -> None:
    with torch.no_grad():
        wide = torch.compile(build("llama"), backend="adakv", options=SMALL, dynamic=True)
        cache = wide(_ids(1, 60), past_key_values=DynamicCache()).past_key_values
        mixed = DynamicCache()
        for layer, other in zip(cache.layers, reversed(cache.layers), strict=True):
            mixed.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), len(mixed.layers))
            mixed.layers[-1].keys, mixed.layers[-1].values = layer.keys, other.values
        with pytest.raises(Exception, match=r"don't belong together: they come from different layers"):
            wide(_ids(1, 1), past_key_values=mixed)


class TestSnapshot(TestCase):
    """The graphs as a downstream project would snapshot them."""

    maxDiff = None

    def test_explain_covers_prefill_and_decode(self) -> None:
        model = build("llama")
        report = adakv_compile.explain(model, _ids(1, 60), options={"budget": 24, "window": 8})
        assert_compressed(report, n_sites=2)
        assert [site.action for site in report.sites] == ["compress", "compress", "decode", "decode"]
        page = str(report)
        assert "COMPRESS  4 query heads on 2 KV heads" in page
        assert "proved: causal" in page
        assert '"action": "decode"' in report.json()
        with pytest.raises(AssertionError, match="expected 3 compressed attentions"):
            assert_compressed(report, n_sites=3)

    def test_snapshot_of_one_layer(self) -> None:
        text = graph_snapshot(OneLayer(), torch.randn(1, 40, 64), options={"budget": 12, "window": 4})
        self.assertExpectedInline(
            text,
            """\
graph 0: compress
%0 = input -> f32[1, 40, 64]
%1 = input -> f32[64, 64]
%2 = input -> f32[64]
%3 = input -> f32[32, 64]
%4 = input -> f32[32]
%5 = input -> f32[32, 64]
%6 = input -> f32[32]
%7 = linear.default(%0, %1, %2) -> f32[1, 40, 64]
%8 = view.default(%7, [1, 40, 4, 16]) -> f32[1, 40, 4, 16]
%9 = transpose.int(%8, 1, 2) -> f32[1, 4, 40, 16]
%10 = linear.default(%0, %3, %4) -> f32[1, 40, 32]
%11 = view.default(%10, [1, 40, 2, 16]) -> f32[1, 40, 2, 16]
%12 = transpose.int(%11, 1, 2) -> f32[1, 2, 40, 16]
%13 = linear.default(%0, %5, %6) -> f32[1, 40, 32]
%14 = view.default(%13, [1, 40, 2, 16]) -> f32[1, 40, 2, 16]
%15 = transpose.int(%14, 1, 2) -> f32[1, 2, 40, 16]
%16 = scaled_dot_product_attention.default(%9, %12, %15, None, 0.0, True, scale=0.25, enable_gqa=True) -> f32[1, 4, 40, 16]
%17 = adakv.observe_v3.default(%9, %12, None, None, None, None, 0.25, None, None, 'method=ada-snapkv;budget=12;window=4;pool=max;kernel_size=7;alpha=0.2;safeguard=soft;ties=position;beta=20;gqa=mean;sinks=4;layer=0;num_layers=1') -> f32[1, 2, 40]
%18 = adakv.select_v1.default(%17, None, None, 'method=ada-snapkv;budget=12;window=4;pool=max;kernel_size=7;alpha=0.2;safeguard=soft;ties=position;beta=20;gqa=mean;sinks=4;layer=0;num_layers=1') -> (i32[1, 24], i32[1, 3])
%19 = getitem(%18, 0) -> i32[1, 24]
%20 = getitem(%18, 1) -> i32[1, 3]
%21 = adakv.compact_v1.default(%12, %15, %19, %20) -> (f32[1, 24, 16], f32[1, 24, 16])
%22 = getitem(%21, 0) -> f32[1, 24, 16]
%23 = getitem(%21, 1) -> f32[1, 24, 16]
%24 = transpose.int(%16, 1, 2) -> f32[1, 40, 4, 16]
%25 = view.default(%24, [1, 40, 64]) -> f32[1, 40, 64]
return [%22, %23, %20, %19, %25]""",
        )
