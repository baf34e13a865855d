"""What Dynamo checks of compressed inputs before a step: in C++ alone, and still all that the graph was made for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adakv_compile import CompressedKV, cache_stats
from adakv_compile.backend import adakv
from adakv_compile.runtime.boundary import wrap_grown
from adakv_compile.runtime.errors import CacheError, CacheMismatchError
from adakv_compile.runtime.layout import Layout
from adakv_compile.runtime.store import LayerStore
from tests.backend.cached import BY_HEAD, Laid, only_causal
from tests.backend.decoders import causal
from tests.backend.test_layouts import FORMS, OPTIONS

LAYERS = 4
Caches = tuple[tuple[Tensor, ...], ...]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compilations:
    """The backend, counting the graphs that it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, gm: Any, inputs: Any) -> Any:
        self.count += 1
        return adakv(gm, inputs, options=OPTIONS)


class Stack(nn.Module):
    """Four layers, each with a cache of its own."""

    def __init__(self, form: Any = BY_HEAD) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Laid(form) for _ in range(LAYERS))

    def forward(self, x: Tensor, caches: Any = None) -> tuple[Tensor, list[Any]]:
        made = []
        for i, layer in enumerate(self.layers):
            y, cache = layer(x, None if caches is None else caches[i])
            x = x + y
            made.append(cache)
        return x, made


def started(module: nn.Module, dynamic: bool | None = True) -> tuple[nn.Module, Compilations, Any]:
    """Return a compiled module, what counts its graphs, and its cache after a prompt and a step."""
    backend = Compilations()
    compiled: Any = torch.compile(module, backend=backend, dynamic=dynamic)
    torch.manual_seed(1)
    with torch.no_grad():
        _, cache = compiled(torch.randn(2, 40, 64))
        _, cache = compiled(torch.randn(2, 1, 64), cache)
    return compiled, backend, cache


def token(batch: int = 2) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(batch, 1, 64)


def expect(module: Laid, cache: Any, x: Tensor) -> Tensor:
    """Return what a step computes where evicted entries are masked out."""
    entries = tuple(tensor.dense()[0] for tensor in cache)
    module.visible = only_causal(cache[0].dense()[1], 4)
    with torch.no_grad():
        expected, _ = module(x, entries)
    module.visible = causal
    return expected


@pytest.mark.parametrize("form", [BY_HEAD, FORMS["[B, L, H, D]"]], ids=["usual", "by token"])
def test_a_step_calls_no_python_to_check_its_caches(monkeypatch: pytest.MonkeyPatch, form: Any) -> None:
    compiled, backend, caches = started(Stack(form))
    calls: list[object] = []
    flatten = CompressedKV.__tensor_flatten__

    def counted(self: CompressedKV) -> Any:
        calls.append(self)
        return flatten(self)

    monkeypatch.setattr(CompressedKV, "__tensor_flatten__", counted)
    graphs = backend.count
    with torch.no_grad():
        for _ in range(3):
            _, caches = compiled(token(), caches)
    assert backend.count == graphs
    assert not calls


def test_the_layout_is_guarded_where_everything_else_is_equal() -> None:
    _, backend, (key, _) = started(Laid(BY_HEAD))
    step: Any = torch.compile(lambda cache: cache.shape[1] + torch.arange(2), backend=backend, dynamic=True)
    heads, before = key.store.num_kv_heads, backend.count
    usual = wrap_grown(key.store.emptied(heads), heads)[0]
    turned = wrap_grown(usual.store, heads, layouts=(Layout(("b", "l", "h", "d")),) * 2)[0]
    assert usual.shape == turned.shape
    with torch.no_grad():
        for graphs, view in ((1, usual), (1, usual), (2, turned), (2, turned), (2, usual)):
            step(view)
            assert backend.count - before == graphs


def test_a_step_is_never_run_on_a_cache_of_another_layout() -> None:
    module = Laid(BY_HEAD)
    compiled, _, (key, value) = started(module)
    by_token = Layout(("b", "l", "h", "d"))
    odd = wrap_grown(key.store, key.length, layouts=(by_token, by_token))
    with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        compiled(token(), odd)
    with torch.no_grad():
        found, _ = compiled(token(), (key, value))
    torch.testing.assert_close(found, expect(module, (key, value), token()), rtol=1e-4, atol=1e-5)


def test_a_step_is_never_run_on_a_cache_of_another_dtype() -> None:
    compiled, backend, cache = started(Laid(BY_HEAD))
    graphs = backend.count
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        compiled(token(), tuple(tensor.double() for tensor in cache))
    # The same weights in the other dtype are another graph.
    compiled.double()
    with torch.no_grad():
        _, grown = compiled(token().double(), tuple(tensor.double() for tensor in cache))
    assert backend.count > graphs
    assert grown[0].dtype == torch.float64


def test_a_step_is_never_run_on_a_cache_of_another_device() -> None:
    compiled, _, (key, _) = started(Laid(BY_HEAD))
    prefix = (part.to("meta") for part in key.store.parts[:4])
    meta = wrap_grown(LayerStore.sealed(*prefix, key.length), key.length)
    with torch.no_grad(), pytest.raises(RuntimeError, match="device"):
        compiled(token(), meta)


def test_a_dense_cache_in_place_of_a_compressed_one_and_back() -> None:
    module = Laid(BY_HEAD)
    compiled, _, cache = started(module)
    x = token()
    dense = tuple(tensor.dense()[0] for tensor in cache)
    with torch.no_grad():
        expected, _ = module(x, dense)
        found, grown = compiled(x, dense)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not isinstance(grown[0], CompressedKV)
        found, _ = compiled(x, cache)
    torch.testing.assert_close(found, expect(module, cache, x), rtol=1e-4, atol=1e-5)


def test_keys_and_values_of_two_conversations_are_told_apart() -> None:
    compiled, backend, (key, value) = started(Laid(BY_HEAD))
    graphs, other = backend.count, value[torch.tensor([1, 0])]
    with torch.no_grad(), pytest.raises(CacheMismatchError, match="different layers, conversations or devices"):
        compiled(token(), (key, other))
    assert backend.count == graphs


def test_a_view_without_entries_is_refused() -> None:
    compiled, _, cache = started(Laid(BY_HEAD))
    for tensor in cache:
        tensor.backing = None
    with torch.no_grad(), pytest.raises(CacheError, match="holds no entries"):
        compiled(token(), cache)


def test_entries_appended_in_eager_mode_are_attended_to() -> None:
    module = Laid(BY_HEAD)
    compiled, backend, cache = started(module)
    graphs = backend.count
    new = torch.randn(2, 2, 3, 16)
    cache = tuple(torch.cat([tensor, new], 2) for tensor in cache)
    assert all(tensor.pending is not None for tensor in cache)
    with torch.no_grad():
        found, grown = compiled(token(), cache)
    assert backend.count == graphs
    assert grown[0].shape[2] == 45
    torch.testing.assert_close(found, expect(module, cache, token()), rtol=1e-4, atol=1e-5)


def test_a_view_that_dropped_its_oldest_slots_never_shows_them() -> None:
    module = Laid(BY_HEAD)
    compiled, _, cache = started(module)
    late = tuple(tensor[:, :, 36:] for tensor in cache)
    assert late[0].start == 36
    try:
        with torch.no_grad():
            found, _ = compiled(token(), late)
    except CacheError:
        return
    torch.testing.assert_close(found, expect(module, late, token()), rtol=1e-4, atol=1e-5)


def test_a_prompt_in_inference_mode_goes_on_in_it() -> None:
    backend = Compilations()
    compiled: Any = torch.compile(Stack(), backend=backend, dynamic=True)
    with torch.inference_mode():
        _, caches = compiled(torch.randn(2, 40, 64))
        for _ in range(3):
            _, caches = compiled(token(), caches)
    assert backend.count == 2
    assert cache_stats(caches).bytes_held > 0
