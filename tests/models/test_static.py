"""The static caches of transformers: preallocated buffers that the prompt makes, or that were made before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from adakv_compile.runtime.side import attached, beside
from tests.models.families import VOCAB, build
from tests.models.reference import kept_mask, masked_decode

BUDGET, WINDOW, PROMPT, SLOTS = 24, 8, 72, 96
OPTIONS: dict[str, Any] = {"budget": BUDGET, "window": WINDOW, "inner": "eager", "strict": True}


def _prompt(seed: int = 0, padding: int = 5) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, VOCAB, (2, PROMPT), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def _compiled(name: str, budget: int = BUDGET) -> PreTrainedModel:
    model = build(name)
    model.compile(backend="adakv", options={**OPTIONS, "budget": budget}, dynamic=True)
    return model


def _generate(model: PreTrainedModel) -> Any:
    ids, mask = _prompt()
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(ids, attention_mask=mask, cache_implementation="static", **settings)


def _stores(cache: Any) -> list[bool]:
    return [attached(layer.keys, layer.values) is not None for layer in cache.layers]


def _static(model: PreTrainedModel, *, early: bool) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=SLOTS)
    if early:
        cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    return cache


def _prompted(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the last logits of a prompt."""
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits[:, -1]


def _steps(model: PreTrainedModel, cache: Any, mask: Tensor, tokens: Tensor) -> Iterator[Tensor]:
    """Yield the logits of every token fed after a prompt."""
    for t in range(tokens.shape[1]):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        position = mask.sum(-1, keepdim=True) - 1
        with torch.no_grad():
            out = model(tokens[:, t : t + 1], attention_mask=mask, position_ids=position, past_key_values=cache)
        yield out.logits[:, -1]


def _turn(model: PreTrainedModel, cache: Any, prompt: tuple[Tensor, Tensor], tokens: Tensor) -> list[Tensor]:
    """Return the last logits of a prompt and those of every token fed after it."""
    return [_prompted(model, cache, *prompt), *_steps(model, cache, prompt[1], tokens)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_budget_as_long_as_the_text_changes_no_token(name: str) -> None:
    expected = _generate(build(name))
    found = _generate(_compiled(name, budget=200))
    assert torch.equal(found.sequences, expected.sequences)
    assert all(_stores(found.past_key_values))


@pytest.mark.parametrize("early", [False, True], ids=["made by the prompt", "made before"])
def test_a_small_budget_is_dense_attention_with_evicted_entries_masked(early: bool) -> None:
    model, plain = _compiled("llama"), build("llama")
    (ids, mask), steps = _prompt(), torch.randint(2, VOCAB, (2, 5))
    cache, dense = _static(model, early=early), DynamicCache(config=plain.config)
    prompt = _prompted(model, cache, ids, mask)
    torch.testing.assert_close(prompt, _prompted(plain, dense, ids, mask), rtol=1e-4, atol=1e-3)
    kept = [kept_mask(beside(layer.keys)) for layer in cache.layers]
    for keep in kept:
        assert keep.sum(dim=(1, 2)).tolist() == [2 * BUDGET] * 2
        assert not keep[0, :, :5].any(), "padding was kept"
        assert keep[:, :, -WINDOW:].all(), "the observation window was evicted"
    expected = masked_decode(plain, dense, kept, steps, mask)
    for t, logits in enumerate(_steps(model, cache, mask, steps)):
        assert all(_stores(cache)), "attention read the buffers"
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=2e-3)


def test_a_second_conversation_in_the_same_cache_is_a_new_one() -> None:
    model, steps = _compiled("llama"), torch.randint(2, VOCAB, (2, 3))
    cache = _static(model, early=True)
    _turn(model, cache, _prompt(), steps)
    cache.reset()
    found = _turn(model, cache, _prompt(seed=1), steps)
    assert all(_stores(cache))
    expected = _turn(model, _static(model, early=True), _prompt(seed=1), steps)
    torch.testing.assert_close(found, expected)


def test_a_position_set_back_to_zero_is_a_new_conversation() -> None:
    model, plain, steps = _compiled("llama", budget=200), build("llama"), torch.randint(2, VOCAB, (2, 3))
    cache, dense = _static(model, early=True), _static(plain, early=True)
    for seed, new in enumerate((steps, steps.flip(1))):
        for one in (cache, dense):
            for layer in one.layers:
                layer.cumulative_length.zero_()
        found = _turn(model, cache, _prompt(seed), new)
        torch.testing.assert_close(found, _turn(plain, dense, _prompt(seed), new), rtol=1e-4, atol=1e-3)
        assert all(_stores(cache))
