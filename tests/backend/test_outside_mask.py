"""Masks that a graph is given, as after a graph break: their values decide, at every call."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import adakv_compile
from adakv_compile import CompressedKV
from tests.backend.decoders import Cache, OneLayer, causal

OPTIONS: dict[str, Any] = {"budget": 12, "window": 4, "inner": "eager"}
LENGTH, STEPS, PADDING = 40, 3, 5


class Given(OneLayer):
    """``forward(x, mask, cache)``."""

    def forward(self, x: Tensor, mask: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v = self.project(x)
        if cache is not None:
            k, v = self.extend(cache[0], k), self.extend(cache[1], v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(2), (k, v)


def of_prompt(padding: int = 0) -> Tensor:
    """Return ``[2, 1, LENGTH, LENGTH]``, the first row of the batch padded on the left."""
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :padding] = False
    return causal(LENGTH, LENGTH) & real[:, None, None, :]


def of_step(total: int, padding: int = 0) -> Tensor:
    seen = torch.ones(2, 1, 1, total, dtype=torch.bool)
    seen[0, ..., :padding] = False
    return seen


def run(model: Any, x: Tensor, prompt: Tensor, padding: int = 0) -> tuple[list[Tensor], Cache]:
    found, cache = [], None
    with torch.no_grad():
        for begin, end in ((0, LENGTH), *((i, i + 1) for i in range(LENGTH, LENGTH + STEPS))):
            mask = of_step(end, padding) if cache is not None else prompt
            out, cache = model(x[:, begin:end], mask, cache)
            found.append(out)
    assert cache is not None
    return found, cache


@pytest.mark.parametrize("padding", [0, PADDING])
def test_a_causal_mask_is_seen_to_be_one(padding: int) -> None:
    model, x = Given(), torch.randn(2, LENGTH + STEPS, 64)
    explained = adakv_compile.explain(model, x[:, :LENGTH], of_prompt(padding), options=OPTIONS)
    assert [site.action for site in explained.sites] == ["compress"]
    assert "comes in from outside" in explained.sites[0].mask
    expected, _ = run(model, x, of_prompt(padding), padding)
    large = torch.compile(model, backend="adakv", options=OPTIONS | {"budget": 200}, dynamic=True)
    found, cache = run(large, x, of_prompt(padding), padding)
    assert isinstance(cache[0], CompressedKV)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[:, -1], theirs[:, -1], rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
    small = torch.compile(model, backend="adakv", options=OPTIONS, dynamic=True)
    _, cache = run(small, x, of_prompt(padding), padding)
    assert isinstance(cache[0], CompressedKV)
    for head in range(2):
        assert (cache[0].positions(0, head) >= padding).all(), "padding was kept"
    lengths = cache[0].head_lengths.sum(1).tolist()
    assert lengths == [2 * (12 + STEPS)] * 2


def beyond_the_diagonal() -> Tensor:
    mask = of_prompt().clone()
    mask[1, 0, 7, 8] = True
    return mask


def one_hidden() -> Tensor:
    mask = of_prompt().clone()
    mask[0, 0, 20, 3] = False
    return mask


def padded_on_the_right() -> Tensor:
    mask = of_prompt().clone()
    mask[0, :, :, -PADDING:] = False
    return mask


@pytest.mark.parametrize("make", [beyond_the_diagonal, one_hidden, padded_on_the_right])
def test_another_mask_leaves_the_prompt_as_it_is(make: Any) -> None:
    model, x, mask = Given(), torch.randn(2, LENGTH, 64), make()
    compiled = torch.compile(model, backend="adakv", options=OPTIONS, dynamic=True)
    with warnings.catch_warnings(record=True) as heard, torch.no_grad():
        warnings.simplefilter("always")
        found, cache = compiled(x, mask)
        expected, _ = model(x, mask)
    assert torch.equal(found, expected)
    assert not isinstance(cache[0], CompressedKV)
    assert any("not causal" in str(item.message) for item in heard)
