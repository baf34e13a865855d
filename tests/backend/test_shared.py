"""Several attentions to one cache: compressed together and each as dense attention is, or all of them left alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adakv_compile
from adakv_compile import CompressedKV, Reason
from adakv_compile.testing import assert_compressed
from tests.backend.cached import BY_HEAD, Laid, follow, is_compressed, only_causal

OPTIONS: dict[str, Any] = {"budget": 12, "window": 4, "inner": "eager", "strict": True}
LENGTHS = (40, 1, 1, 5, 1)
WINDOW = 16

Second = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Queries ``[B, 4, T, 16]``, keys, values, and where keys may be seen, to ``[B, H, T, 16]``."""


def distance(new: int, total: int) -> Tensor:
    return torch.arange(total - new, total)[:, None] - torch.arange(total)


def within(q: Tensor, k: Tensor) -> Tensor:
    return distance(q.shape[2], k.shape[2]) < WINDOW


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    k, v = (tensor.repeat_interleave(2, dim=1) for tensor in (k, v))
    return (q @ k.mT / 8).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def two_heads(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attend with as many query heads as there are in the cache."""
    return F.scaled_dot_product_attention(q[:, :2], k, v, attn_mask=seen[:, ::2] if seen.dim() == 4 else seen)


def sliding(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return plain(q, k, v, seen & within(q, k))


def biased(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[None, :, None, None]
    return plain(q, k, v, torch.where(seen, 0.0, -torch.inf) + -slopes * distance(q.shape[2], k.shape[2]))


SECONDS: dict[str, Second] = {
    "other queries": plain,
    "written out, another scale": written_out,
    "without groups": two_heads,
    "a window": sliding,
    "numbers by distance": biased,
}


class Shared(Laid):
    """The cache is read a second time, by other queries."""

    def __init__(self, second: Second, *, first: Second = plain, after: bool = False) -> None:
        super().__init__(BY_HEAD)
        self.first, self.second, self.after = first, second, after
        self.q2 = nn.Linear(64, 64)

    def forward(self, x: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x)
        whole = (k, v) if cache is None else self.form.extend(cache, k, v)
        seen = self.visible(q.shape[2], whole[0].shape[2])
        y = self.first(q, *whole, seen).transpose(1, 2).flatten(2)
        q2 = self.q2(x + y if self.after else x).unflatten(-1, (-1, 16)).transpose(1, 2)
        return torch.cat([y, self.second(q2, *whole, seen).transpose(1, 2).flatten(2)], -1), whole


MODELS: dict[str, Callable[[], Shared]] = {
    **{name: lambda second=second: Shared(second) for name, second in SECONDS.items()},
    "queries that wait for the first": lambda: Shared(plain, after=True),
    "the first has a window": lambda: Shared(plain, first=sliding),
    "the first is written out": lambda: Shared(plain, first=written_out, after=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_is_the_dense_one_with_evicted_entries_masked(name: str) -> None:
    compiled = torch.compile(MODELS[name](), backend="adakv", options=OPTIONS, dynamic=True)
    follow(compiled, MODELS[name](), torch.randn(2, sum(LENGTHS), 64), LENGTHS, budget=12)


def test_both_are_compressed_and_only_the_first_one_decides() -> None:
    report = adakv_compile.explain(Shared(plain), torch.randn(2, 40, 64), options=OPTIONS)
    assert_compressed(report, n_sites=2)
    assert [site.action for site in report.graphs[0].sites] == ["compress", "share"]


def test_what_is_kept_is_what_the_first_one_alone_would_keep() -> None:
    x = torch.randn(2, 40, 64)
    caches: list[Any] = []
    for model in (Shared(biased), Laid(BY_HEAD)):
        with torch.no_grad():
            _, cache = torch.compile(model, backend="adakv", options=OPTIONS)(x)
        caches.append(cache)
    assert torch.equal(caches[0][0].dense()[1], caches[1][0].dense()[1])


class Reader(Laid):
    """Attends to a cache that holds the new tokens already."""

    def forward(self, x: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        q, _, _ = self.project(x)
        k, v = cache
        return plain(q, k, v, self.visible(q.shape[2], k.shape[2])).transpose(1, 2).flatten(2), cache


def test_a_cache_that_another_graph_has_extended_is_read() -> None:
    owner, reader = Laid(BY_HEAD), Reader(BY_HEAD)
    # Nothing in the reader says how many heads there are, so their number must not be made symbolic by `dynamic=True`.
    first, second = (torch.compile(module, backend="adakv", options=OPTIONS) for module in (owner, reader))
    truth, x = Reader(BY_HEAD), torch.randn(2, sum(LENGTHS), 64)
    begin, cache, dense = 0, None, None
    for count in LENGTHS:
        tokens = x[:, begin : begin + count]
        begin += count
        with torch.no_grad():
            _, cache = first(tokens, cache)
            _, dense = owner(tokens, dense)
            # The prompt, too, is read as it is kept.
            truth.visible = only_causal(cache[0].dense()[1], 4)
            before = cache[0].head_lengths.clone()
            found, same = second(tokens, cache)
            expected, _ = truth(tokens, dense)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert is_compressed(same)
        assert torch.equal(cache[0].head_lengths, before)


def squared(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    k, v = (tensor.repeat_interleave(2, dim=1) for tensor in (k, v))
    return (q @ k.mT / 4).masked_fill(~seen, -torch.inf).softmax(-1).square() @ v


def every_other(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return plain(q, k, v, seen & (distance(q.shape[2], k.shape[2]) % 2 == 0))


REFUSED: dict[str, Second] = {
    "squared weights": squared,
    "sees every other token": every_other,
    "sees everything": lambda q, k, v, seen: plain(q, k, v, torch.ones_like(seen)),
    "drops weights": lambda q, k, v, seen: F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, dropout_p=1e-9, enable_gqa=True
    ),
    "keys for values": lambda q, k, v, seen: plain(q, k, k, seen),
    "values for keys": lambda q, k, v, seen: plain(q, v, k, seen),
    "heads in the other order": lambda q, k, v, seen: plain(q, k.flip(1), v.flip(1), seen),
    "heads tiled": lambda q, k, v, seen: plain(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), seen),
    "without the first token": lambda q, k, v, seen: plain(q, k[:, :, 1:], v[:, :, 1:], seen[..., 1:]),
    "no attention": lambda q, k, v, seen: q + v.mean(2, keepdim=True).repeat_interleave(2, dim=1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_that_is_not_understood_leaves_all_of_them_alone(name: str) -> None:
    model, x = Shared(REFUSED[name]), torch.randn(2, 40, 64)
    compiled = torch.compile(model, backend="adakv", options={**OPTIONS, "strict": False}, dynamic=True)
    with warnings.catch_warnings(record=True) as heard, torch.no_grad():
        warnings.simplefilter("always")
        found, cache = compiled(x)
        expected, dense = model(x)
    # The first of all queries without its own key sees nothing there.
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert not any(isinstance(tensor, CompressedKV) for tensor in cache)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(cache, dense, strict=True))
    said = [str(item.message) for item in heard if "adakv" in str(item.message)]
    assert len(said) == 1, said
    assert any(reason.name in said[0] for reason in Reason)
