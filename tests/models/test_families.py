"""Every family: identity with a large budget, exactness and exact budgets with a small one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import adakv_compile
from tests.models.families import FAMILIES, VOCAB, build
from tests.models.reference import kept_mask, masked_decode

BUDGET, WINDOW, PROMPT = 24, 8, 72


def _prompt(batch: int = 2, length: int = PROMPT, padding: int = 5) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, VOCAB, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def _options(**changes: Any) -> dict[str, Any]:
    return {"budget": BUDGET, "window": WINDOW, "inner": "eager", "strict": True, **changes}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_budget_as_long_as_the_text_changes_nothing(name: str) -> None:
    model = build(name)
    ids, mask = _prompt()
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, **settings)
    # strict would not notice a sliding layer, which has nothing to evict here and stays dense.
    model.compile(backend="adakv", options=_options(budget=200), dynamic=True)
    found = model.generate(ids, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.interface])
def test_a_small_budget_is_dense_attention_with_evicted_entries_masked(name: str) -> None:
    model = build(name)
    ids, mask = _prompt()
    reference = copy.deepcopy(model)
    settings: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model.compile(backend="adakv", options=_options(), dynamic=True)
    with torch.no_grad():
        first = model(ids, position_ids=positions, **settings)
        dense = reference(ids, position_ids=positions, **settings)
    torch.testing.assert_close(first.logits[:, -1], dense.logits[:, -1], rtol=1e-4, atol=1e-3)
    layers = first.past_key_values.layers
    kept = [kept_mask(layer.keys) for layer in layers]
    for layer, keep in zip(layers, kept, strict=True):
        assert isinstance(layer.keys, adakv_compile.CompressedKV)
        heads = layer.keys.shape[1]
        assert keep.sum(dim=(1, 2)).tolist() == [heads * BUDGET] * 2
        hidden = max(0, 5 - (PROMPT - keep.shape[2]))
        assert not keep[0, :, :hidden].any(), "padding was kept"
        assert keep[:, :, -WINDOW:].all(), "the observation window was evicted"
    tokens = torch.randint(2, VOCAB, (2, 6))
    expected = masked_decode(reference, dense.past_key_values, kept, tokens, mask)
    cache, attention = first.past_key_values, mask
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            attention = torch.cat([attention, attention.new_ones(2, 1)], dim=1)
            position = attention.sum(-1, keepdim=True) - 1
            out = model(tokens[:, t : t + 1], past_key_values=cache, attention_mask=attention, position_ids=position)
            torch.testing.assert_close(out.logits[:, -1], expected[:, t], rtol=1e-4, atol=2e-3)
