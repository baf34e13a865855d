"""The measured generation itself, on the plain model: no backend, no compilation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from adakv_compile.cli.errors import CommandError
from adakv_compile.cli.generate import Run, Settings, agreement, generate
from adakv_compile.cli.loading import Loaded, encode, load, parse_options
from adakv_compile.runtime.stats import CacheStats
from tests.cli.inputs import FACT, RETRIEVER, document

GREEDY = Settings(max_new_tokens=5)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(str(RETRIEVER), "auto", "cpu")


@pytest.fixture(scope="module")
def ids(loaded: Loaded) -> torch.Tensor:
    return encode(loaded, document(90), 5)


class _Listener:
    """Records what a run reports while it goes on."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def run(self, loaded: Loaded, ids: torch.Tensor, settings: Settings) -> Run:
        record = self.events.append
        return generate(loaded, ids, settings, "plain", write=record, read=record, begin=lambda: record("begin"))


@pytest.fixture
def listener() -> _Listener:
    return _Listener()


def test_text_is_streamed_after_the_first_token(loaded: Loaded, ids: torch.Tensor, listener: _Listener) -> None:
    run = listener.run(loaded, ids, GREEDY)
    assert listener.events[0] == "begin"
    assert "".join(listener.events[1:]).strip() == run.text.strip()
    assert len(listener.events) > 3
    assert run.text == f"{FACT} ."


def test_times_leave_compilation_apart(loaded: Loaded, ids: torch.Tensor, listener: _Listener) -> None:
    run = listener.run(loaded, ids, GREEDY)
    assert run.compiling == 0
    assert run.first_token > 0
    assert run.per_token is not None
    assert run.per_token > 0


def test_a_single_token_has_no_time_per_token(loaded: Loaded, ids: torch.Tensor, listener: _Listener) -> None:
    run = listener.run(loaded, ids, Settings(max_new_tokens=1))
    assert run.per_token is None
    assert len(run.tokens) == 1


@pytest.mark.parametrize("chunk", [1, 40, 99, 100, 1000])
def test_parts_of_a_prompt_add_up(loaded: Loaded, ids: torch.Tensor, listener: _Listener, chunk: int) -> None:
    whole = _Listener().run(loaded, ids, GREEDY)
    if chunk == 1:
        ids, whole = ids[:, :6], _Listener().run(loaded, ids[:, :6], GREEDY)
    run = listener.run(loaded, ids, replace(GREEDY, chunk=chunk))
    length = ids.shape[1]
    assert run.tokens == whole.tokens
    assert run.chunks == -(-length // chunk)
    assert listener.events[: run.chunks] == [*range(chunk, length, chunk), "begin"]
    assert run.stats.layers[0].logical_length == length + len(run.tokens) - 1


def test_sampling_is_seeded(loaded: Loaded, ids: torch.Tensor) -> None:
    settings = Settings(max_new_tokens=5, temperature=5.0, seed=1)
    first, again = (_Listener().run(loaded, ids, settings) for _ in range(2))
    other = _Listener().run(loaded, ids, replace(settings, seed=2))
    assert first.tokens == again.tokens
    assert first.tokens != other.tokens


def test_the_dense_cache_is_measured(loaded: Loaded, ids: torch.Tensor) -> None:
    run = _Listener().run(loaded, ids, GREEDY)
    config = loaded.model.config
    tokens = ids.shape[1] + len(run.tokens) - 1
    entries = config.num_hidden_layers * config.num_key_value_heads * tokens
    assert run.stats.bytes_held == run.stats.bytes_dense == 2 * entries * config.head_dim * 4


def test_a_model_that_returns_no_cache(loaded: Loaded, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded.model.generation_config, "use_cache", False)
    with pytest.raises(CommandError, match="returned no KV cache"):
        _Listener().run(loaded, ids, GREEDY)


@pytest.mark.parametrize(
    ("one", "other", "index"), [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2), (1, 2, 3), 2), ((), (1,), 0)]
)
def test_agreement(one: tuple[int, ...], other: tuple[int, ...], index: int | None) -> None:
    run = Run("", (), "", 1, 1.0, None, 0.0, CacheStats(()))
    assert agreement(replace(run, tokens=one), replace(run, tokens=other)) == index


def test_options_are_read_as_python_literals() -> None:
    named: dict[str, object] = {"budget": "0.25", "method": "snapkv", "window": None}
    assert parse_options(named, ["pool=avg", "sinks = 8"]) == {
        "budget": 0.25,
        "method": "snapkv",
        "pool": "avg",
        "sinks": 8,
    }
