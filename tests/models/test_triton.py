"""Whole models on the Triton kernels, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import adakv_compile
from adakv_compile import CompressedKV
from adakv_compile.kernels._support import interpreting
from tests.kernels.interpreter import repaired_arithmetic
from tests.models.families import FAMILIES, VOCAB, build

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS: dict[str, Any] = {"budget": 24, "window": 8, "strict": True, "inner": "eager"}
# Grouped heads, one KV head, a sliding window, no groups, attention written out.
NAMES = ["llama", "gemma", "mistral-sliding", "gpt2", "llama-eager"]


@pytest.fixture(autouse=True, scope="module")
def _repaired() -> Iterator[None]:
    with repaired_arithmetic() if interpreting() else nullcontext():
        yield


def prompt(length: int = 72, padding: int = 5) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, VOCAB, (2, length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def generate(model: Any, kernels: str, inputs: dict[str, torch.Tensor], count: int = 3, **options: Any) -> Any:
    model = copy.deepcopy(model).to(DEVICE)
    model.compile(backend="adakv", options=OPTIONS | {"kernels": kernels} | options, dynamic=True)
    settings: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, **settings)


def assert_same(found: Any, expected: Any, tolerance: float = 2e-3) -> None:
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert isinstance(ours.keys, CompressedKV)
        assert torch.equal(ours.keys.head_lengths, theirs.keys.head_lengths)
        for row in range(2):
            for head in range(ours.keys.shape[1]):
                assert torch.equal(ours.keys.positions(row, head), theirs.keys.positions(row, head))


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch(name: str) -> None:
    assert name in FAMILIES
    model, inputs = build(name, layers=1), prompt()
    assert_same(generate(model, "triton", inputs), generate(model, "portable", inputs))


@pytest.mark.parametrize("method", ["snapkv", "ada-pyramid", "streamingllm"])
def test_other_methods(method: str) -> None:
    model, inputs = build("llama", layers=1), prompt(padding=0)
    options = {"method": method, "pool": "avg", "gqa": "max"}
    assert_same(generate(model, "triton", inputs, **options), generate(model, "portable", inputs, **options))


def test_through_inductor() -> None:
    model, inputs = build("llama", layers=1), prompt()
    assert_same(generate(model, "triton", inputs, inner="inductor"), generate(model, "portable", inputs))


def test_half_precision() -> None:
    model, inputs = build("llama", layers=1).to(torch.bfloat16), prompt()
    found, expected = (generate(model, kernels, inputs, budget=200) for kernels in ("triton", "portable"))
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.1, atol=0.5)


def test_a_second_turn_compresses_again() -> None:
    model, inputs = build("llama", layers=1), prompt(padding=0)
    question = torch.randint(2, VOCAB, (2, 17)).to(DEVICE)
    results: list[Any] = []
    for kernels in ("triton", "portable"):
        talker = copy.deepcopy(model).to(DEVICE)
        talker.compile(backend="adakv", options=OPTIONS | {"kernels": kernels}, dynamic=True)
        settings: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        first = talker.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **settings)
        ids = torch.cat([first.sequences if not results else results[0][1], question], 1)
        second = talker.generate(
            ids, past_key_values=first.past_key_values, max_new_tokens=4, min_new_tokens=4, **settings
        )
        results.append((second, first.sequences))
    assert_same(results[0][0], results[1][0])
    assert results[0][0].past_key_values.layers[0].keys.head_lengths.sum() == 2 * 2 * (24 + 3)


def test_the_report_says_who_computes() -> None:
    options = OPTIONS | {"kernels": "triton"}
    report = adakv_compile.explain(build("llama").to(DEVICE), **prompt(), options=options)
    assert "kernels: triton" in str(report)
    assert not report.graphs[0].unmet
