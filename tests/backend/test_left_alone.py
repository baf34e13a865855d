"""Attentions that have nothing to compress: left alone in silence, strict or not, with a reason in the report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import adakv_compile
from adakv_compile import CompressedKV, Reason
from tests.backend.decoders import OneLayer
from tests.models.families import VOCAB, build

OPTIONS: dict[str, Any] = {"budget": 12, "window": 4, "strict": True}


class _WithoutCache(OneLayer):
    def forward(self, x: Tensor, cache: Any = None) -> Any:
        y, _ = super().forward(x, cache)
        return y


def _reasons(*args: Any, **kwargs: Any) -> set[Reason | None]:
    report = adakv_compile.explain(*args, **kwargs)
    assert report.sites
    assert not report.refusals, "these reasons are no failures"
    return {None if site.refusal is None else site.refusal.reason for site in report.sites}


def test_without_a_cache() -> None:
    assert _reasons(_WithoutCache(), torch.randn(1, 40, 64), options=OPTIONS) == {Reason.NO_CACHE}


def test_one_token_over_a_dense_cache_and_then_several() -> None:
    model = OneLayer()
    dense = (torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16))
    assert _reasons(model, torch.randn(1, 1, 64), dense, options=OPTIONS) == {Reason.DENSE_CACHE}
    compiled = torch.compile(model, backend="adakv", options={**OPTIONS, "inner": "eager"})
    with torch.no_grad():
        _, (keys, _) = compiled(torch.randn(1, 6, 64), dense)
    assert isinstance(keys, CompressedKV)
    assert keys.head_lengths.sum() == 2 * 12


def test_a_window_within_the_budget() -> None:
    ids = torch.randint(2, VOCAB, (1, 60))
    report = adakv_compile.explain(build("mistral-sliding"), ids, options={"budget": 200, "window": 8})
    assert not report.refusals
    prefill, decode = ([site.refusal for site in graph.sites] for graph in report.graphs)
    assert [refusal.reason for refusal in prefill if refusal] == [Reason.WITHIN_WINDOW] * 2
    # The next step finds what the prompt left: a dense cache, which one token does not compress.
    assert [refusal.reason for refusal in decode if refusal] == [Reason.DENSE_CACHE] * 2
