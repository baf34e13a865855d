"""What people do with a cache: sampling, beams, turns, questions, chunks, crops, copies, dtypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import adakv_compile
from tests.models.families import VOCAB, PlainDecoder, build, greedy
from tests.models.reference import kept_mask, masked_decode

OPTIONS: dict[str, Any] = {"budget": 24, "window": 8, "inner": "eager", "strict": True}
EVERYTHING: dict[str, Any] = {**OPTIONS, "budget": 400}


def _compiled(options: dict[str, Any] = OPTIONS, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a compiled model and the same one uncompiled."""
    model = build("llama", **changes)
    plain = copy.deepcopy(model)
    model.compile(backend="adakv", options=options, dynamic=True)
    return model, plain


def _ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def _held(cache: Any) -> list[list[int]]:
    return [layer.keys.head_lengths.sum(dim=1).tolist() for layer in cache.layers]


def _step(model: PreTrainedModel, ids: Tensor, cache: Any) -> Any:
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["greedy", "sampling", "beams", "beam-sampling", "several"],
)
def test_every_way_to_generate_is_the_uncompiled_one_when_nothing_is_evicted(settings: dict[str, Any]) -> None:
    model, plain = _compiled(EVERYTHING)
    ids = _ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    outputs: list[Tensor] = []
    for one in (plain, model):
        torch.manual_seed(3)
        outputs.append(one.generate(ids, attention_mask=mask, max_new_tokens=10, **settings))
    assert torch.equal(outputs[0], outputs[1])


def test_beams_carry_their_own_entries() -> None:
    model, _ = _compiled()
    out = model.generate(_ids(2, 60), max_new_tokens=8, num_beams=3, do_sample=False, return_dict_in_generate=True)
    layers = out.past_key_values.layers
    assert _held(out.past_key_values) == [[2 * 24 + 2 * 7] * 6] * len(layers)


def test_a_row_of_a_padded_batch_is_that_row_alone() -> None:
    model, _ = _compiled()
    rows = [_ids(1, length, seed) for seed, length in enumerate((60, 45, 20))]
    ids, mask = torch.zeros(3, 60, dtype=torch.long), torch.zeros(3, 60, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 60 - row.shape[1] :] = row
        mask[i, 60 - row.shape[1] :] = 1
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    together = model.generate(ids, attention_mask=mask, **settings)
    for i, row in enumerate(rows):
        alone = model.generate(row, attention_mask=torch.ones_like(row), **settings)
        assert torch.equal(alone.sequences[0, row.shape[1] :], together.sequences[i, 60:])
        shift = 60 - row.shape[1]
        for ours, theirs in zip(together.past_key_values.layers, alone.past_key_values.layers, strict=True):
            for head in range(2):
                assert torch.equal(ours.keys.positions(i, head) - shift, theirs.keys.positions(0, head))


def test_the_next_turn_attends_to_what_was_kept_and_is_compressed_again() -> None:
    model, plain = _compiled()
    first, question = _ids(1, 60), _ids(1, 13, seed=5)
    cache = _step(model, first, DynamicCache(config=model.config)).past_key_values
    kept = [kept_mask(layer.keys) for layer in cache.layers]
    dense = _step(plain, first, DynamicCache(config=plain.config)).past_key_values
    out = _step(model, question, cache)
    expected = masked_decode(plain, dense, kept, question, torch.ones(1, 60, dtype=torch.long))
    torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=2e-3)
    assert _held(out.past_key_values) == [[2 * 24]] * 2
    assert out.past_key_values.get_seq_length() == 73
    for layer in out.past_key_values.layers:
        for head in range(2):
            assert layer.keys.positions(0, head)[-8:].tolist() == list(range(65, 73))


def test_turns_change_nothing_when_nothing_is_evicted() -> None:
    model, plain = _compiled(EVERYTHING)
    turns = [_ids(2, length, seed) for seed, length in enumerate((30, 1, 9, 1, 1, 17))]
    cache, dense = DynamicCache(config=model.config), DynamicCache(config=plain.config)
    for ids in turns:
        ours, theirs = _step(model, ids, cache), _step(plain, ids, dense)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-3)


def test_generate_goes_on_with_its_own_cache() -> None:
    model, plain = _compiled(EVERYTHING)
    texts: list[Tensor] = []
    for one in (model, plain):
        text, cache = _ids(1, 30), DynamicCache(config=one.config)
        for seed in (1, 2):
            text = torch.cat([text, _ids(1, 11, seed)], dim=1)
            text = one.generate(text, past_key_values=cache, max_new_tokens=5, do_sample=False)
        texts.append(text)
    assert torch.equal(texts[0], texts[1])


def test_one_context_serves_many_questions() -> None:
    model, _ = _compiled()
    context = _step(model, _ids(1, 60), DynamicCache(config=model.config)).past_key_values
    before = copy.deepcopy([layer.keys.dense()[0] for layer in context.layers])
    answers: dict[int, list[Tensor]] = {0: [], 1: []}
    for seed in (0, 1, 0, 1):
        cache = copy.deepcopy(context)
        logits = _step(model, _ids(1, 5, seed), cache).logits
        logits = torch.cat([logits, _step(model, _ids(1, 1, seed), cache).logits], dim=1)
        answers[seed].append(logits)
    for first, second in answers.values():
        assert torch.equal(first, second)
    assert not torch.equal(answers[0][0], answers[1][0])
    for layer, keys in zip(context.layers, before, strict=True):
        assert torch.equal(layer.keys.dense()[0], keys)


def test_chunks_of_a_prompt_keep_the_budget() -> None:
    model, _ = _compiled()
    cache = DynamicCache(config=model.config)
    seen = 0
    for i, length in enumerate((16, 16, 30, 9)):
        _step(model, _ids(1, length, i), cache)
        seen += length
        assert cache.get_seq_length() == seen
        assert _held(cache) == [[2 * min(24, seen)]] * 2


def test_two_live_caches_do_not_meet() -> None:
    model, _ = _compiled()
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    mixed: list[list[Tensor]] = [[], []]
    for i in (0, 1):
        mixed[i].append(_step(model, _ids(1, 50, i), caches[i]).logits)
    for t in range(5):
        for i in (1, 0):
            mixed[i].append(_step(model, _ids(1, 1, 10 * t + i), caches[i]).logits)
    for i in (0, 1):
        cache = DynamicCache(config=model.config)
        alone = [_step(model, _ids(1, 50, i), cache).logits]
        alone += [_step(model, _ids(1, 1, 10 * t + i), cache).logits for t in range(5)]
        assert all(torch.equal(a, b) for a, b in zip(alone, mixed[i], strict=True))


def test_recent_tokens_can_be_cropped_and_said_differently() -> None:
    model, _ = _compiled()
    cache = _step(model, _ids(1, 50), DynamicCache(config=model.config)).past_key_values
    for seed in range(4):
        _step(model, _ids(1, 1, seed), cache)
    cache.crop(-3)
    again = [_step(model, _ids(1, 1, seed), cache).logits for seed in (7, 8)]
    fresh = _step(model, _ids(1, 50), DynamicCache(config=model.config)).past_key_values
    _step(model, _ids(1, 1, 0), fresh)
    expected = [_step(model, _ids(1, 1, seed), fresh).logits for seed in (7, 8)]
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    with pytest.raises(Exception, match="eviction"):
        cache.crop(-20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, plain = _compiled(EVERYTHING)
    model, plain = model.to(dtype), plain.to(dtype)
    settings: dict[str, Any] = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    ours = model.generate(_ids(2, 40), do_sample=False, **settings)
    theirs = plain.generate(_ids(2, 40), do_sample=False, **settings)
    assert ours.past_key_values.layers[0].keys.dtype is dtype
    tolerance = 0.35 if dtype is torch.bfloat16 else 0.05
    torch.testing.assert_close(ours.logits[0], theirs.logits[0], rtol=0.02, atol=tolerance)
    small, _ = _compiled()
    out = small.to(dtype).generate(_ids(2, 40), do_sample=False, **settings)
    assert _held(out.past_key_values) == [[2 * 24 + 2 * 3] * 2] * 2


@pytest.mark.parametrize("method", ["ada-snapkv", "snapkv", "ada-pyramid", "pyramidkv", "streamingllm"])
def test_every_method_keeps_its_total(method: str) -> None:
    model, _ = _compiled({**OPTIONS, "method": method}, layers=3)
    out = _step(model, _ids(2, 70), DynamicCache(config=model.config))
    held = torch.tensor(_held(out.past_key_values))
    assert held.sum(dim=0).tolist() == [3 * 2 * 24] * 2
    if "pyramid" in method:
        assert held[0, 0] > held[1, 0] > held[2, 0]
    else:
        assert held.unique().tolist() == [48]
    if method in ("snapkv", "streamingllm"):
        assert out.past_key_values.layers[0].keys.head_lengths.unique().tolist() == [24]


def test_a_share_of_the_prompt() -> None:
    model, _ = _compiled({**OPTIONS, "budget": 0.4})
    for length in (50, 80):
        out = _step(model, _ids(1, length), DynamicCache(config=model.config))
        assert _held(out.past_key_values) == [[2 * (length * 2 // 5)]] * 2


def test_the_order_of_prompts_does_not_matter() -> None:
    model, _ = _compiled({**OPTIONS, "method": "ada-pyramid"})
    prompts = [_ids(1, length, length) for length in (30, 70, 45)]
    runs = [
        {p: _step(model, prompts[p], DynamicCache(config=model.config)) for p in order}
        for order in ((0, 1, 2), (2, 1, 0))
    ]
    for p in range(3):
        first, second = (run[p].past_key_values for run in runs)
        for ours, theirs in zip(first.layers, second.layers, strict=True):
            assert torch.equal(kept_mask(ours.keys), kept_mask(theirs.keys))


def test_a_decoder_from_nobodys_library() -> None:
    torch.manual_seed(0)
    plain = PlainDecoder().eval()
    ids = _ids(2, 50)
    expected = greedy(plain, ids, 8)
    plain.reset()
    same = adakv_compile.compile(copy.deepcopy(plain), **EVERYTHING)
    assert torch.equal(greedy(same, ids, 8), expected)
    small = adakv_compile.compile(copy.deepcopy(plain), **OPTIONS)
    greedy(small, ids, 8)
    assert all(isinstance(cache, adakv_compile.CompressedKV) for cache in small.key_caches)
    stats = adakv_compile.cache_stats(small)
    assert [layer.head_lengths.sum(-1).tolist() for layer in stats.layers] == [[48 + 14] * 2] * 2
    small.reset()
    with pytest.raises(ValueError, match="no KV cache"):
        adakv_compile.cache_stats(small)
