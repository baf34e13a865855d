"""The harness itself: it reads attention in every spelling, and notices what it is there to notice."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.causal_lm import subject
from tests.zoo.checks import identity, small_budget
from tests.zoo.interception import Interception
from tests.zoo.scores import wrongly_kept

BATCH, HEADS, KV_HEADS, NEW, LENGTH, DIM = 2, 4, 2, 7, 13, 8
Spelling = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _wide(entries: Tensor) -> Tensor:
    return entries.repeat_interleave(HEADS // KV_HEADS, dim=1)


def _operator(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _operator_added_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(q, _wide(k), _wide(v), added)


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    logits = q @ _wide(k).transpose(-1, -2) / DIM**0.5
    return F.softmax(logits.masked_fill(~mask, -torch.inf), dim=-1) @ _wide(v)


def _flattened(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    logits = torch.bmm(q.flatten(0, 1), _wide(k).flatten(0, 1).transpose(1, 2)) / DIM**0.5
    weights = torch.softmax(logits.masked_fill(~mask, torch.finfo(logits.dtype).min), 2)
    return torch.bmm(weights, _wide(v).flatten(0, 1)).view(BATCH, HEADS, NEW, DIM)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    logits = q.unflatten(1, (KV_HEADS, -1)) @ k[:, :, None].transpose(-1, -2) / DIM**0.5
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ v[:, :, None]).flatten(1, 2)


def _keys_by_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    logits = (_wide(k) @ q.transpose(-1, -2) / DIM**0.5).masked_fill(~mask.T, -torch.inf)
    return logits.softmax(-2).transpose(-1, -2) @ _wide(v)


SPELLINGS: dict[str, Spelling] = {
    "operator": _operator,
    "operator, added mask": _operator_added_mask,
    "written out": _written_out,
    "heads flattened into the batch": _flattened,
    "grouped in five dimensions": _grouped,
    "keys by queries": _keys_by_queries,
}


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = torch.randn(BATCH, HEADS, NEW, DIM)
    k, v = torch.randn(2, BATCH, KV_HEADS, LENGTH, DIM)
    return q, k, v, torch.ones(NEW, LENGTH, dtype=torch.bool).tril(LENGTH - NEW)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_weights_are_those_of_the_attention(name: str) -> None:
    q, k, v, mask = _inputs()
    with Interception(BATCH, NEW, {LENGTH}, read=True) as found:
        out = SPELLINGS[name](q, k, v, mask)
    (weights,) = found.weights
    assert weights.shape == (BATCH, HEADS, NEW, LENGTH)
    torch.testing.assert_close(weights @ _wide(v).double(), out.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SPELLINGS)
def test_hidden_entries_are_as_if_they_had_never_been(name: str) -> None:
    q, k, v, mask = _inputs()
    keep = torch.ones(BATCH, KV_HEADS, LENGTH, dtype=torch.bool)
    keep[:, :, [0, 3, 4]] = False
    with Interception(BATCH, NEW, {LENGTH}, kept=[keep]):
        out = SPELLINGS[name](q, k, v, mask)
    left = keep[0, 0]
    expected = _written_out(q, k[:, :, left], v[:, :, left], mask[:, left])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_sink_takes_its_share_and_cannot_be_hidden() -> None:
    q, k, _, mask = _inputs()
    logits = (q @ _wide(k).transpose(-1, -2)).masked_fill(~mask, -torch.inf)
    with_sink = torch.cat([logits, torch.zeros(BATCH, HEADS, NEW, 1)], dim=-1)
    keep = torch.ones(BATCH, KV_HEADS, LENGTH, dtype=torch.bool)
    keep[..., 0] = False
    with Interception(BATCH, NEW, {LENGTH}, kept=[keep], read=True) as found:
        out = with_sink.softmax(-1)
    (weights,) = found.weights
    assert weights.shape[-1] == LENGTH
    assert (out[..., -1] > 0).all()
    torch.testing.assert_close(weights.sum(-1).float() + out[..., -1], torch.ones(BATCH, HEADS, NEW))
    assert not weights[..., 0].any()


@pytest.mark.parametrize(
    "other",
    [
        lambda: torch.randn(BATCH * NEW, 4).softmax(-1),
        lambda: torch.randn(BATCH, HEADS, NEW, LENGTH + 3).softmax(-1),
        lambda: torch.randn(BATCH, HEADS, NEW, LENGTH).softmax(1),
        lambda: torch.randn(BATCH, HEADS, NEW, LENGTH).softmax(-2),
        lambda: torch.randn(BATCH, HEADS, NEW + 1, LENGTH).softmax(-1),
        lambda: F.scaled_dot_product_attention(*torch.randn(3, BATCH, HEADS, NEW, DIM)),
    ],
    ids=["experts", "another length", "another dimension", "over the queries", "other queries", "an encoder"],
)
def test_what_is_no_attention_over_the_prompt_is_left_alone(other: Callable[[], Tensor]) -> None:
    with Interception(BATCH, NEW, {LENGTH}, read=True) as found:
        other()
    assert found.count == 0


@pytest.mark.parametrize("need_weights", [False, True])
def test_the_attention_of_a_module_is_read(need_weights: bool) -> None:
    module = nn.MultiheadAttention(DIM * HEADS, HEADS, batch_first=True).eval()
    x = torch.randn(BATCH, LENGTH, DIM * HEADS)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    with torch.no_grad():
        expected, means = module(x, x, x, attn_mask=causal, need_weights=need_weights)
        with Interception(BATCH, LENGTH, {LENGTH}, read=True) as found:
            out, given = module(x, x, x, attn_mask=causal, need_weights=need_weights)
    torch.testing.assert_close(out, expected)
    assert (given is None) == (means is None)
    (weights,) = found.weights
    assert weights.shape == (BATCH, HEADS, LENGTH, LENGTH)
    assert not weights.triu(1).any()


def test_one_wrong_entry_is_noticed() -> None:
    weights = torch.rand(1, HEADS, NEW, LENGTH, dtype=torch.float64)
    # The peak of the last candidates is the same one, after pooling: any of them may be kept, those far from it not.
    weights[..., :] = torch.linspace(1.0, 2.0, LENGTH, dtype=torch.float64)
    keep = torch.zeros(1, KV_HEADS, LENGTH, dtype=torch.bool)
    keep[..., [6, 7, 8, 9, 10, 11, 12]] = True
    sizes = {"budget": 7, "window": 4, "method": "snapkv"}
    assert wrongly_kept(keep, weights, None, **sizes) == []
    keep[0, 1, 6], keep[0, 1, 2] = False, True
    assert len(wrongly_kept(keep, weights, None, **sizes)) == 1


def test_other_weights_are_noticed() -> None:
    llama = subject("llama")
    seeds = itertools.count()

    def build() -> nn.Module:
        model = llama.build()
        with torch.no_grad():
            next(model.parameters()).add_(0.5 * next(seeds))
        return model

    changing = dataclasses.replace(llama, build=build)
    assert identity(changing, padded=True)
    assert any(line.startswith("(b)") for line in small_budget(changing, padded=True).problems)
