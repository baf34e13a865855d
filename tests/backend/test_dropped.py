"""Caches that drop old entries by themselves, under masks that would show them: what is dropped stays so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import adakv_compile
from adakv_compile import CompressedKV, Reason
from tests.backend.decoders import Cache, OneLayer, causal

OPTIONS: dict[str, Any] = {"budget": 12, "window": 4, "inner": "eager", "strict": True}
LENGTH, NEWEST = 40, 20


class Dropping(OneLayer):
    """Keeps the newest entries; its mask is causal over whatever is there."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before, self.hidden = before, None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = causal(q.shape[2], k.shape[2])
        if self.hidden is not None:
            mask = mask & self.hidden
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        q, k, v = self.project(x)
        if cache is not None:
            k, v = self.extend(cache[0], k), self.extend(cache[1], v)
        kept = k[:, :, -NEWEST:], v[:, :, -NEWEST:]
        if self.before:
            return self.attend(q, k, v).transpose(1, 2).flatten(2), kept
        y = self.attend(q, k, v).transpose(1, 2).flatten(2)
        return y, (k[:, :, -NEWEST:], v[:, :, -NEWEST:])

    hidden: Tensor | None


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("method", ["ada-snapkv", "streamingllm"])
def test_steps_see_what_was_kept_of_what_was_not_dropped(before: bool, method: str) -> None:
    model, x = Dropping(before), torch.randn(2, LENGTH + 14, 64)
    compiled = torch.compile(model, backend="adakv", options=OPTIONS | {"method": method}, dynamic=True)
    plain = Dropping(before)
    with torch.no_grad():
        found, cache = compiled(x[:, :LENGTH])
        expected, _ = plain(x[:, :LENGTH])
        torch.testing.assert_close(found, expected)
        for t in range(LENGTH, x.shape[1]):
            keys, values = cache
            assert isinstance(keys, CompressedKV)
            assert isinstance(values, CompressedKV)
            assert keys.shape[2] == NEWEST
            (dense_keys, held), (dense_values, _) = keys.dense(), values.dense()
            plain.hidden = F.pad(held, (0, 1), value=True).repeat_interleave(2, dim=1)[:, :, None]
            expected, _ = plain(x[:, t : t + 1], (dense_keys, dense_values))
            found, cache = compiled(x[:, t : t + 1], cache)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_that_was_dropped() -> None:
    model, x = Dropping(before=False), torch.randn(2, LENGTH, 64)
    with torch.no_grad():
        _, (keys, _) = torch.compile(model, backend="adakv", options=OPTIONS, dynamic=True)(x)
    assert isinstance(keys, CompressedKV)
    for row in range(2):
        for head in range(2):
            assert keys.positions(row, head).min() >= 0
            assert keys.positions(row, head).max() == NEWEST - 1, "positions count in what the caller gets"
    assert keys.dense()[1].sum().item() == 2 * 2 * 12


def test_a_budget_as_large_as_what_the_model_keeps_changes_nothing() -> None:
    report = adakv_compile.explain(Dropping(before=True), torch.randn(2, LENGTH, 64), options=OPTIONS | {"budget": 20})
    assert {site.refusal.reason for graph in report.graphs for site in graph.sites if site.refusal} == {
        Reason.WITHIN_WINDOW
    }
