"""A decoder that really retrieves: the paper's bound on its own attention, and answers that survive eviction."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import adakv_compile
from adakv_compile.policy import Policy, select
from benchmarks.retriever import vocabulary
from benchmarks.retriever.corpus import RecallTask, recall_document

FOLDER = Path(adakv_compile.__file__).parent / "data" / "retriever"


def _load(**settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, **settings).eval()


def _document(length: int, seed: int) -> tuple[Tensor, list[int]]:
    """Return the ids ``[1, T]`` of a document with four facts and a question at its end, and the three-word answer."""
    task = RecallTask("few", facts=4, value_words=(3, 3), questions=1)
    document = recall_document(np.random.default_rng(seed), length, task)
    (question,) = document.questions
    # The question is two words: the word `question` and a name.
    return torch.from_numpy(document.ids[: question.start + 2])[None], list(question.answer)


@torch.no_grad()
def test_the_bound_holds_on_its_attention() -> None:
    """Theorem 3.1 on all layers: loss below the bound; theorem 3.3: the adaptive bound is not above the uniform one."""
    model = _load(attn_implementation="eager")
    ids, _ = _document(400, seed=3)
    with torch.no_grad():
        out = model(ids, output_attentions=True, use_cache=True)
    gains = 0
    for layer, weights in enumerate(out.attentions):
        values = out.past_key_values.layers[layer].values[0].double()
        heads, dim = weights.shape[1], values.shape[-1]
        group = heads // values.shape[0]
        attention = weights[0, :, -1].double()
        # The model's float32 softmax sums to one up to 1e-7, the theorem's exactly.
        attention = attention / attention.sum(-1, keepdim=True)
        output = model.model.layers[layer].self_attn.o_proj.weight.double().T.reshape(heads, dim, -1)
        projected = values.repeat_interleave(group, dim=0) @ output
        constant = projected.abs().sum(-1).max()
        full = torch.einsum("hn,hnd->d", attention, projected)
        bounds: list[float] = []
        for alpha in (0.0, 1.0):
            policy = Policy(budget=24, window=4, kernel_size=1, alpha=alpha)
            scores = attention.unflatten(0, (-1, group)).mean(1)[None].float()
            kept = attention * select(policy, scores)[0].repeat_interleave(group, dim=0)
            evicted = torch.einsum("hn,hnd->d", kept / kept.sum(-1, keepdim=True), projected)
            bounds.append(float(2 * heads * constant - 2 * constant * kept.sum()))
            assert 0 < float((full - evicted).abs().sum()) <= bounds[-1]
        assert bounds[0] <= bounds[1] + 1e-6
        gains += bounds[0] < bounds[1] - 1e-6
    assert gains, "no layer of a real model has heads that differ"


@pytest.mark.parametrize("method", ["ada-snapkv", "snapkv"])
def test_answers_survive_a_small_cache(method: str) -> None:
    model = _load()
    plain = copy.deepcopy(model)
    model.compile(
        backend="adakv", options={"method": method, "budget": 96, "window": 8, "inner": "eager"}, dynamic=True
    )
    right = 0
    for seed in range(6):
        ids, value = _document(700, seed)
        settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
        full = plain.generate(ids, **settings).sequences[0, -3:].tolist()
        out = model.generate(ids, **settings)
        stats = adakv_compile.cache_stats(out.past_key_values)
        assert all(int(layer.head_lengths.sum()) == 4 * (96 + 2) for layer in stats.layers)
        assert full == value, "the full cache itself fails: the test says nothing"
        right += out.sequences[0, -3:].tolist() == value
    assert right == 6


def test_evicting_everything_old_loses_the_answers() -> None:
    """The counterpart: the same questions under a method that keeps only recent tokens."""
    model = _load()
    options = {"method": "streamingllm", "budget": 96, "sinks": 4, "inner": "eager"}
    model.compile(backend="adakv", options=options, dynamic=True)
    wrong = 0
    for seed in range(6):
        ids, value = _document(700, seed)
        out = model.generate(ids, max_new_tokens=3, do_sample=False)
        wrong += out[0, -3:].tolist() != value
    assert wrong >= 5


def test_its_tokenizer_reads_what_the_vocabulary_writes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids, _ = _document(100, seed=0)
    text = vocabulary.decode(ids[0].tolist())
    assert tokenizer(text, add_special_tokens=False).input_ids == ids[0].tolist()
