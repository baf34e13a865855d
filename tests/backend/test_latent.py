"""Caches of what keys and values of all heads are computed from: one decision for all, steps compute what was kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adakv_compile
from adakv_compile import CompressedKV
from tests.backend.decoders import Cache, causal

OPTIONS: dict[str, Any] = {"budget": 12, "window": 4, "inner": "eager"}
LENGTH, STEPS, RANK, TURNED, HEADS = 40, 3, 24, 8, 4


class Latent(nn.Module):
    """Multi-head latent attention: ``[B, 1, L, RANK]`` and a turned key ``[B, 1, L, TURNED]`` serve all heads."""

    def __init__(self, expand: Callable[[Latent, Tensor], Tensor] | None = None, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(64, HEADS * (16 + TURNED))
        self.down = nn.Linear(64, RANK + TURNED)
        self.up = nn.Linear(RANK, HEADS * 32, bias=False)
        self.expand, self.flat = expand, flat

    def forward(
        self, x: Tensor, cache: Cache | None = None, seen: Tensor | None = None, real: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        latent, turned = self.down(x).split([RANK, TURNED], -1)
        if not self.flat:
            latent, turned = latent[:, None], turned[:, None]
        if cache is not None:
            latent, turned = torch.cat([cache[0], latent], -2), torch.cat([cache[1], turned], -2)
        present = latent, turned
        if self.flat:
            latent, turned = latent[:, None], turned[:, None]
        wide = self.up(latent[:, 0]) if self.expand is None else self.expand(self, latent[:, 0])
        keys, values = wide.unflatten(-1, (HEADS, 32)).transpose(1, 2).split([16, 16], -1)
        k = torch.cat([keys, turned.expand(-1, HEADS, -1, -1)], -1)
        mask = causal(q.shape[2], k.shape[2]) if seen is None else seen
        if real is not None:
            mask = mask & real[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, values, attn_mask=mask).transpose(1, 2).flatten(2), present


def turns(model: Any, x: Tensor) -> tuple[list[Tensor], list[Cache]]:
    """Feed a prompt, single tokens, three tokens at once, and one more; return the outputs and the caches."""
    outputs, caches, cache = list[Tensor](), list[Cache](), None
    cuts = (0, *range(LENGTH, LENGTH + STEPS + 1), x.shape[1] - 1, x.shape[1])
    with torch.no_grad():
        for begin, end in itertools.pairwise(cuts):
            out, cache = model(x[:, begin:end], cache)
            outputs.append(out)
            caches.append(cache)
    return outputs, caches


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_budget_as_long_as_the_text_changes_nothing(flat: bool, batch: int) -> None:
    model, x = Latent(flat=flat), torch.randn(batch, LENGTH + STEPS + 4, 64)
    expected, _ = turns(model, x)
    compiled = torch.compile(model, backend="adakv", options=OPTIONS | {"budget": 200, "strict": True}, dynamic=True)
    found, caches = turns(compiled, x)
    assert isinstance(caches[0][0], CompressedKV)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["snapkv", "ada-snapkv", "streamingllm"])
def test_a_small_budget_is_attention_without_the_evicted_entries(method: str) -> None:
    model, x = Latent(), torch.randn(2, LENGTH + STEPS + 4, 64)
    options = OPTIONS | {"strict": True, "method": method}
    found, caches = turns(torch.compile(model, backend="adakv", options=options, dynamic=True), x)
    cuts = (LENGTH, *range(LENGTH + 1, LENGTH + STEPS + 1), x.shape[1] - 1, x.shape[1])
    for step, (begin, end) in enumerate(itertools.pairwise(cuts)):
        latent, turned = caches[step]
        assert isinstance(latent, CompressedKV)
        assert isinstance(turned, CompressedKV)
        (dense, held), (other, same) = latent.dense(), turned.dense()
        assert torch.equal(held, same)
        # Three tokens at once are a second turn, after which the budget holds again.
        count = 12 + begin - LENGTH if begin < x.shape[1] - 1 else 12
        assert held.sum((1, 2)).tolist() == [count] * 2, "one head keeps the budget"
        seen = F.pad(held[:, :, None, :], (0, end - begin), value=True) & causal(end - begin, end)
        with torch.no_grad():
            expected, _ = model(x[:, begin:end], (dense, other), seen)
        torch.testing.assert_close(found[step + 1], expected, rtol=1e-4, atol=1e-5)


def test_what_is_kept_is_what_all_heads_look_at_on_average() -> None:
    model, x = Latent(), torch.randn(1, LENGTH, 64)
    options = OPTIONS | {"method": "snapkv", "kernel_size": 1}
    with torch.no_grad():
        _, (latent, _) = torch.compile(model, backend="adakv", options=options, dynamic=True)(x)
        q = model.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        low, turned = model.down(x).split([RANK, TURNED], -1)
        keys = model.up(low).unflatten(-1, (HEADS, 32)).transpose(1, 2)[..., :16]
        k = torch.cat([keys, turned[:, None].expand(-1, HEADS, -1, -1)], -1)
        logits = (q @ k.mT / 24**0.5).masked_fill(~causal(LENGTH, LENGTH), -torch.inf)
        scores = logits.softmax(-1)[:, :, -4:].mean((1, 2))[0, :-4]
    best = scores.topk(8).indices.sort().values
    assert torch.equal(latent.positions(0, 0)[:8], best)


@pytest.mark.parametrize("padded", [False, True])
def test_a_second_turn_keeps_what_its_own_queries_look_at(padded: bool) -> None:
    model, x = Latent(), torch.randn(2, LENGTH + 6, 64)
    options = OPTIONS | {"strict": True, "method": "snapkv", "kernel_size": 1}
    compiled = torch.compile(model, backend="adakv", options=options, dynamic=True)
    tokens = torch.ones(2, x.shape[1], dtype=torch.bool)
    if padded:
        tokens[0, :5] = False
    with torch.no_grad():
        _, cache = compiled(x[:, :LENGTH], None, None, tokens[:, :LENGTH] if padded else None)
        (dense, held), (turned, _) = (view.dense() for view in cache)
        before = [store.positions(0, 0).tolist() for store in cache]
        _, (latent, _) = compiled(x[:, LENGTH:], cache, None, tokens if padded else None)
        assert [store.positions(0, 0).tolist() for store in cache] == before, "another turn can follow the first cache"
        q = model.q(x[:, LENGTH:]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        low, late = model.down(x[:, LENGTH:]).split([RANK, TURNED], -1)
        low, late = torch.cat([dense[:, 0], low], 1), torch.cat([turned[:, 0], late], 1)
        keys = model.up(low).unflatten(-1, (HEADS, 32)).transpose(1, 2)[..., :16]
        k = torch.cat([keys, late[:, None].expand(-1, HEADS, -1, -1)], -1)
        visible = F.pad(held[:, :, None], (0, 6), value=True) & causal(6, x.shape[1]) & tokens[:, None, None]
        weights = (q @ k.mT / 24**0.5).masked_fill(~visible, -torch.inf).softmax(-1)
        scores = weights[:, :, -4:].mean((1, 2))[:, :-4].masked_fill(~visible[:, 0, -1, :-4], -1)
    for row in range(2):
        assert torch.equal(latent.positions(row, 0)[:8], scores[row].topk(8).indices.sort().values)
        assert latent.positions(row, 0)[8:].tolist() == [LENGTH + i for i in range(2, 6)]


OTHER: dict[str, Callable[[Latent, Tensor], Tensor]] = {
    "normalised over the sequence": lambda m, c: m.up(F.normalize(c, dim=1)),
    "without the mean": lambda m, c: m.up(c - c.mean(1, keepdim=True)),
    "running sums": lambda m, c: m.up(c.cumsum(1)),
    "neighbours": lambda m, c: m.up(c + c.roll(1, 1)),
    "turned by position": lambda m, c: m.up(c * torch.arange(c.shape[1])[:, None].cos()),
}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.filterwarnings("ignore:backend=.adakv. leaves an attention uncompressed")
def test_what_mixes_positions_is_left_alone(name: str) -> None:
    model, x = Latent(OTHER[name]), torch.randn(2, LENGTH + STEPS + 4, 64)
    (site,) = adakv_compile.explain(model, x[:, :LENGTH], options=OPTIONS).sites
    assert site.refusal is not None
    expected, _ = turns(model, x)
    found, caches = turns(torch.compile(model, backend="adakv", options=OPTIONS, dynamic=True), x)
    assert not isinstance(caches[0][0], CompressedKV)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
