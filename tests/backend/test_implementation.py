"""Who computes what: options for kernels and attention are followed, or the report and a warning say why not."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import adakv_compile
from adakv_compile.kernels.padded_attention import reference
from adakv_compile.kernels.prefill_attention import BACKENDS
from adakv_compile.options import Options
from adakv_compile.testing import graph_snapshot
from tests.backend.decoders import Mask, OneLayer, causal
from tests.models.families import VOCAB, build

OPTIONS: dict[str, Any] = {"budget": 12, "window": 4, "inner": "eager", "strict": True}


def run(model: OneLayer, x: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return a prompt's output, the output of a step after it, and the kept keys."""
    compiled = torch.compile(model, backend="adakv", options=OPTIONS | options)
    with torch.no_grad():
        first, cache = compiled(x[:, :40])
        kept = cache[0].store.keys
        second, _ = compiled(x[:, 40:], cache)
    return first, second, kept


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 41, 64)


@pytest.mark.parametrize("attention", ["sdpa", "auto"])
def test_a_proved_mask_is_not_made_when_the_operator_needs_none(x: Tensor, attention: str) -> None:
    model = OneLayer()
    own = graph_snapshot(model, x, options=OPTIONS | {"attention": "model"})
    without = graph_snapshot(model, x, options=OPTIONS | {"attention": attention})
    assert "arange" in own
    assert "arange" not in without
    for expected, found in zip(run(model, x, attention="model"), run(model, x, attention=attention), strict=True):
        assert torch.equal(found, expected)


def added(new: int, total: int) -> Tensor:
    """A mask that is added and hides with a finite number."""
    return torch.zeros(new, total).masked_fill(~causal(new, total), -1e4)


def sliding(new: int, total: int) -> Tensor:
    """A window longer than the budget."""
    order = torch.arange(total)
    return causal(new, total) & (order > order[total - new :, None] - 20)


@pytest.mark.parametrize("mask", [added, sliding])
def test_a_mask_that_the_flag_does_not_replace_to_the_last_bit_stays(x: Tensor, mask: Mask) -> None:
    model = OneLayer(mask)
    assert "arange" in graph_snapshot(model, x, options=OPTIONS)
    assert "attention of the prompt: model" in str(adakv_compile.explain(model, x, options=OPTIONS))


class WrittenOut(OneLayer):
    """Attention as products and a softmax."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (entries.repeat_interleave(2, dim=1) for entries in (k, v))
        mask = self.mask(q.shape[2], k.shape[2])
        assert mask is not None
        return (q @ k.mT * 0.25).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def test_an_attention_that_is_written_out_stays_as_it_is(x: Tensor) -> None:
    lines = graph_snapshot(WrittenOut(), x, options=OPTIONS)
    assert "softmax" in lines
    assert "scaled_dot_product" not in lines


def test_a_library_outside_of_the_graph_hands_its_sums_to_the_scores(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def attend(
        query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int | None
    ) -> tuple[Tensor, Tensor]:
        calls.append(query.shape[2])
        group = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(group, 1).mT * scale
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        return logits.softmax(-1) @ value.repeat_interleave(group, 1), logits.logsumexp(-1)

    library = dataclasses.replace(BACKENDS["flash-attn"], why_not=lambda request: None, run=attend)
    monkeypatch.setitem(BACKENDS, "flash-attn", library)
    model = OneLayer()
    lines = graph_snapshot(model, x, options=OPTIONS | {"attention": "flash-attn"}).splitlines()
    (observe,) = [line for line in lines if "observe" in line]
    (lse,) = [line.split()[0] for line in lines if line.endswith("f32[2, 4, 41]")]
    assert lse in observe
    assert not any("scaled_dot_product_attention" in line for line in lines)
    for expected, found in zip(run(model, x), run(model, x, attention="flash-attn"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert 40 in calls


def test_what_the_machine_does_not_have_is_said_and_not_used(x: Tensor) -> None:
    report = adakv_compile.explain(OneLayer(), x, options=OPTIONS | {"attention": "varlen"})
    assert "attention of the prompt: model (the device is cpu, not CUDA)" in str(report)
    assert "not met: option 'attention' is 'varlen': the device is cpu, not CUDA" in str(report)
    with pytest.warns(UserWarning, match="option 'attention' is 'varlen': the device is cpu, not CUDA"):
        found = run(OneLayer(), x, attention="varlen")
    for expected, same in zip(run(OneLayer(), x), found, strict=True):
        assert torch.equal(expected, same)


def padded_prompts() -> dict[str, Tensor]:
    full = torch.ones(2, 40, dtype=torch.long)
    left, right = full.clone(), full.clone()
    left[0, :5], right[1, 33:] = 0, 0
    return {"full": full, "left": left, "right": right}


@pytest.mark.parametrize("padding", ["full", "left", "right"])
@pytest.mark.parametrize("asked", ["auto", "sdpa"])
def test_a_mask_is_made_only_if_a_token_is_padding(padding: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, mask = build("llama"), torch.randint(2, VOCAB, (2, 40)), padded_prompts()[padding]
    attend = reference.attend
    masks: list[Tensor | None] = []

    def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        masks.append(mask)
        return attend(query, key, value, mask, scale)

    monkeypatch.setattr(reference, "attend", attended)
    results: list[Any] = []
    for attention in ("model", asked):
        torch.compiler.reset()
        compiled = torch.compile(model.forward, backend="adakv", options=OPTIONS | {"attention": attention})
        with torch.no_grad():
            results.append(compiled(ids, attention_mask=mask, use_cache=True))
    assert len(masks) == model.config.num_hidden_layers
    assert all((made is None) == (padding == "full") for made in masks)
    assert torch.equal(results[0].logits, results[1].logits)
    for own, ours in zip(*(result.past_key_values.layers for result in results), strict=True):
        assert torch.equal(own.keys.store.keys, ours.keys.store.keys)
        assert torch.equal(own.keys.store.positions, ours.keys.store.positions)


def test_what_becomes_of_a_padded_prompt_is_reported() -> None:
    model, ids, mask = build("llama"), torch.randint(2, VOCAB, (2, 40)), padded_prompts()["left"]

    def page(mask: Tensor | None = mask, **options: str) -> str:
        torch.compiler.reset()
        return str(adakv_compile.explain(model, ids, attention_mask=mask, options=OPTIONS | options))

    for asked in ("auto", "sdpa"):
        assert "attention of the prompt: sdpa, with a mask only if a token is padding\n" in page(attention=asked)
    assert "attention of the prompt: model\n" in page(attention="model")
    assert "attention of the prompt: model (the batch is padded, which takes the model's own mask)" in page(
        attention="varlen"
    )
    assert "attention of the prompt: sdpa\n" in page(None, attention="sdpa")


def test_kernels_by_name(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OneLayer()
    expected = run(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(model, x, kernels="portable")
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    report = adakv_compile.explain(model, x, options=OPTIONS | {"kernels": "triton"})
    why = "Triton runs on a CPU only in its interpreter, TRITON_INTERPRET=1"
    assert f"kernels: portable ({why})" in str(report)
    assert f"not met: option 'kernels' is 'triton': {why}" in str(report)
    assert "kernels: cpu; attention of the prompt: sdpa" in str(adakv_compile.explain(model, x, options=OPTIONS))


@pytest.mark.parametrize(
    ("options", "hint"), [({"attention": "flash_attn"}, "'flash-attn'"), ({"kernels": "tritton"}, "'triton'")]
)
def test_names_are_checked(options: dict[str, str], hint: str) -> None:
    with pytest.raises(adakv_compile.OptionsError, match=f"did you mean {hint}"):
        Options.parse(None, options)
