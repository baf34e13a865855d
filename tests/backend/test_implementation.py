"""Who computes what: options for kernels and attention are followed, or the report and a warning say why not."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import adakv_compile
from adakv_compile.kernels.prefill_attention import BACKENDS
from adakv_compile.options import Options
from adakv_compile.testing import graph_snapshot
from tests.backend.decoders import OneLayer
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


def test_a_proved_mask_is_not_made_when_the_operator_needs_none(x: Tensor) -> None:
    model = OneLayer()
    own = graph_snapshot(model, x, options=OPTIONS)
    without = graph_snapshot(model, x, options=OPTIONS | {"attention": "sdpa"})
    assert "arange" in own
    assert "arange" not in without
    for expected, found in zip(run(model, x), run(model, x, attention="sdpa"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


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


def test_a_padded_prompt_keeps_its_mask() -> None:
    model = build("llama")
    ids, mask = torch.randint(2, VOCAB, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    mask[0, :5] = 0
    options = OPTIONS | {"attention": "sdpa"}
    report = str(adakv_compile.explain(model, ids, attention_mask=mask, options=options))
    assert "attention of the prompt: model (the batch is padded, which takes the model's own mask)" in report
    assert "attention of the prompt: sdpa\n" in str(adakv_compile.explain(model, ids, options=options))


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
    assert "kernels: cpu; attention of the prompt: model" in str(adakv_compile.explain(model, x, options=OPTIONS))


@pytest.mark.parametrize(
    ("options", "hint"), [({"attention": "flash_attn"}, "'flash-attn'"), ({"kernels": "tritton"}, "'triton'")]
)
def test_names_are_checked(options: dict[str, str], hint: str) -> None:
    with pytest.raises(adakv_compile.OptionsError, match=f"did you mean {hint}"):
        Options.parse(None, options)
