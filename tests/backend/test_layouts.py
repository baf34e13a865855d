"""Caches in the layouts that decoders have: compressed as they are, exact, and refused where only the shape fits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import adakv_compile
from adakv_compile import Reason
from tests.backend.cached import HEAD_DIM, KV_HEADS, Form, Laid, follow, grown, is_compressed

OPTIONS: dict[str, Any] = {"budget": 12, "window": 4, "inner": "eager", "strict": True}
LENGTHS = (40, 1, 1, 5, 1)
Cached = tuple[Tensor, ...]


def by_einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend over keys and values ``[B, L, H, D]``, seen as ``[B, H, L, D]`` by the caller."""
    k, v = (tensor.transpose(1, 2).repeat_interleave(2, dim=2) for tensor in (k, v))
    logits = torch.einsum("bhtd,blhd->bhtl", q, k) / 4
    return torch.einsum("bhtl,blhd->bhtd", logits.masked_fill(~mask, -torch.inf).softmax(-1), v)


def by_batches(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend as BLOOM does, with heads merged into the batch."""
    k, v = (tensor.repeat_interleave(2, dim=1).flatten(0, 1) for tensor in (k, v))
    logits = torch.bmm(q.flatten(0, 1), k.transpose(1, 2)).unflatten(0, q.shape[:2]) / 4
    weights = torch.where(mask, logits, -torch.inf).softmax(-1)
    return torch.bmm(weights.flatten(0, 1), v).unflatten(0, q.shape[:2])


def split_heads(tensor: Tensor, heads: int = KV_HEADS) -> Tensor:
    return tensor.view(*tensor.shape[:2], heads, -1).transpose(1, 2)


def by_token(k: Tensor, v: Tensor) -> Cached:
    return k.transpose(1, 2), v.transpose(1, 2)


def from_tokens(kv: Cached, _: int) -> tuple[Tensor, Tensor]:
    return kv[0].transpose(1, 2), kv[1].transpose(1, 2)


def halves(kv: Cached, _: int) -> tuple[Tensor, Tensor]:
    key, value = kv[0].chunk(2, -1)
    return key, value


def packed(k: Tensor, v: Tensor) -> Cached:
    return (torch.cat([k, v], -1),)


def stacked(k: Tensor, v: Tensor) -> Cached:
    return (torch.stack([k, v]),)


def second_dim(cache: Cached, rows: Tensor) -> Cached:
    return tuple(tensor.index_select(1, rows) for tensor in cache)


FORMS: dict[str, Form] = {
    "[B, L, H, D]": grown(by_token, 1, from_tokens),
    "[B, L, H, D] by einsum": grown(by_token, 1, from_tokens, attend=by_einsum),
    "[L, B, H, D]": grown(
        lambda k, v: (k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)),
        0,
        lambda kv, _: (kv[0].permute(1, 2, 0, 3), kv[1].permute(1, 2, 0, 3)),
        reorder=second_dim,
    ),
    "[B, L, H * D]": grown(
        lambda k, v: (k.transpose(1, 2).flatten(2), v.transpose(1, 2).flatten(2)),
        1,
        lambda kv, _: (split_heads(kv[0]), split_heads(kv[1])),
    ),
    "[B * H, D, L]": Form(
        lambda k, v: (k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)),
        lambda old, k, v: (
            torch.cat([old[0], k.flatten(0, 1).transpose(1, 2)], dim=2),
            torch.cat([old[1], v.flatten(0, 1)], dim=1),
        ),
        lambda kv, batch: (
            kv[0].transpose(1, 2).unflatten(0, (batch, KV_HEADS)),
            kv[1].unflatten(0, (batch, KV_HEADS)),
        ),
        by_batches,
        lambda cache, rows: tuple(
            tensor.view(-1, KV_HEADS, *tensor.shape[1:]).index_select(0, rows).flatten(0, 1) for tensor in cache
        ),
    ),
    "[B, H, L, 2 * D]": grown(packed, 2, halves),
    "[2, B, H, L, D]": grown(stacked, 3, lambda kv, _: (kv[0][0], kv[0][1]), reorder=second_dim),
    "[B, D * H, L]": Form(
        lambda k, v: (k.transpose(2, 3).transpose(1, 2).flatten(1, 2), v.transpose(2, 3).transpose(1, 2).flatten(1, 2)),
        lambda old, k, v: tuple(
            torch.cat([before, now.transpose(2, 3).transpose(1, 2).flatten(1, 2)], dim=2)
            for before, now in zip(old, (k, v), strict=True)
        ),
        lambda kv, _: (
            kv[0].unflatten(1, (HEAD_DIM, KV_HEADS)).permute(0, 2, 3, 1),
            kv[1].unflatten(1, (HEAD_DIM, KV_HEADS)).permute(0, 2, 3, 1),
        ),
    ),
    "values before keys": Form(
        lambda k, v: (v, k),
        lambda old, k, v: (torch.cat([old[0], v], 2), torch.cat([old[1], k], 2)),
        lambda kv, _: (kv[1], kv[0]),
    ),
    "[B, L, D]": grown(lambda k, v: (k[:, 0], v[:, 0]), 1, lambda kv, _: (kv[0][:, None], kv[1][:, None]), kv_heads=1),
    "[B, L, 2 * D]": grown(
        lambda k, v: packed(k[:, 0], v[:, 0]),
        1,
        lambda kv, _: (kv[0].split(HEAD_DIM, -1)[0][:, None], kv[0].split(HEAD_DIM, -1)[1][:, None]),
        kv_heads=1,
    ),
    "keys [B, H, D, L], values [B, L, H, D / 2]": Form(
        lambda k, v: (k.transpose(2, 3), v.transpose(1, 2)),
        lambda old, k, v: (torch.cat([old[0], k.transpose(2, 3)], 3), torch.cat([old[1], v.transpose(1, 2)], 1)),
        lambda kv, _: (kv[0].transpose(2, 3), kv[1].transpose(1, 2)),
        value_dim=HEAD_DIM // 2,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_small_budget_is_dense_attention_with_evicted_entries_masked(name: str) -> None:
    compiled = torch.compile(Laid(FORMS[name]), backend="adakv", options=OPTIONS, dynamic=True)
    for batch, rows in ((3, torch.tensor([2, 0, 0])), (1, torch.tensor([0, 0, 0]))):
        x = torch.randn(batch, sum(LENGTHS), 64)
        follow(compiled, Laid(FORMS[name]), x, LENGTHS, budget=12, rows=rows)


@pytest.mark.parametrize("name", FORMS)
def test_a_budget_above_the_length_is_the_uncompressed_model(name: str) -> None:
    model = Laid(FORMS[name])
    x = torch.randn(2, sum(LENGTHS), 64)
    compiled = torch.compile(model, backend="adakv", options={**OPTIONS, "budget": 200}, dynamic=True)
    begin, cache, dense = 0, None, None
    for count in (40, 1, 5):
        tokens = x[:, begin : begin + count]
        begin += count
        with torch.no_grad():
            found, cache = compiled(tokens, cache)
            expected, dense = model(tokens, dense)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert is_compressed(cache)
        for ours, theirs in zip(cache, dense, strict=True):
            assert torch.equal(ours.dense()[0], theirs)


@pytest.mark.parametrize(
    ("name", "dynamic"), [("[B, L, H, D]", False), ("[B, L, H, D]", True), ("[B * H, D, L]", False)]
)
def test_sizes_that_happen_to_be_equal_are_not_taken_for_one_another(name: str, dynamic: bool) -> None:
    # As many rows as heads, as new tokens, as there are halves; then as many tokens as the head dimension.
    compiled = torch.compile(Laid(FORMS[name]), backend="adakv", options={**OPTIONS, "budget": 5}, dynamic=dynamic)
    for lengths in ((2, 2, 1, 2), (HEAD_DIM, 1, 2, 1)):
        follow(compiled, Laid(FORMS[name]), torch.randn(2, sum(lengths), 64), lengths, budget=5)


def mixed(tensor: Tensor) -> Tensor:
    """Return ``[B, L, H, D]`` that is no transposition: heads and tokens are mixed up."""
    return tensor.reshape(tensor.shape[0], tensor.shape[2], tensor.shape[1], tensor.shape[3])


class Returning(Laid):
    """What the caller gets is made of the keys and values by a function."""

    def __init__(self, returned: Callable[[Tensor, Tensor], Cached], value_dim: int = HEAD_DIM) -> None:
        super().__init__(grown(lambda k, v: (k, v), 2, lambda kv, _: (kv[0], kv[1]), value_dim=value_dim))
        self.returned = returned

    def forward(self, x: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        y, (k, v) = super().forward(x, cache)
        return y, self.returned(k, v)


REFUSED: dict[str, Callable[[], Laid]] = {
    "heads and tokens mixed up": lambda: Returning(lambda k, v: (mixed(k), mixed(v))),
    "heads and tokens in one dimension": lambda: Returning(lambda k, v: (k.flatten(1, 2), v.flatten(1, 2))),
    "tokens and heads in one dimension": lambda: Returning(
        lambda k, v: (k.transpose(1, 2).flatten(1, 2), v.transpose(1, 2).flatten(1, 2))
    ),
    "tokens and head dimension in one": lambda: Returning(lambda k, v: (k.flatten(2), v.flatten(2))),
    "one row for all": lambda: Returning(lambda k, v: (k.flatten(), v.flatten())),
    "head dimension split and turned": lambda: Returning(
        lambda k, v: tuple(t.unflatten(-1, (2, 8)).transpose(-1, -2).flatten(-2) for t in (k, v))
    ),
    "heads in the other order": lambda: Returning(lambda k, v: (k.flip(1), v.flip(1))),
    "only one head of two": lambda: Returning(lambda k, v: (k[:, :1], v[:, :1])),
    "half of the head dimension": lambda: Returning(lambda k, v: (k[..., :8], v[..., :8])),
    "values packed before keys": lambda: Returning(lambda k, v: (torch.cat([v, k], -1),)),
    "values stacked before keys": lambda: Returning(lambda k, v: (torch.stack([v, k]),)),
    "keys packed with keys": lambda: Returning(lambda k, v: (torch.cat([k, k], -1),)),
    "packed with something else": lambda: Returning(lambda k, v: (torch.cat([k, v, k], -1),)),
    "packed along the sequence": lambda: Returning(lambda k, v: (torch.cat([k, v], 2),)),
    "packed, halves not equal": lambda: Returning(lambda k, v: (torch.cat([k, v], -1),), HEAD_DIM // 2),
    "two packed tensors": lambda: Returning(lambda k, v: (torch.cat([k, v], -1), torch.cat([k, v], 1))),
    "keys in two layouts": lambda: Returning(lambda k, v: (k, v, k.transpose(1, 2))),
    "keys by token and again changed": lambda: Returning(lambda k, v: (k, v, k * 2)),
    "keys read once more": lambda: Returning(lambda k, v: (k, v, k.amax(2))),
}


SIZES_MATTER = ("heads and tokens mixed up", "heads and tokens in one dimension", "tokens and heads in one dimension")


@pytest.mark.parametrize(
    ("name", "dynamic"), [*((name, True) for name in REFUSED), *((n, False) for n in SIZES_MATTER)]
)
def test_a_cache_of_which_only_the_shape_fits_is_left_alone(name: str, dynamic: bool) -> None:
    model, x = REFUSED[name](), torch.randn(2, 40, 64)
    compiled = torch.compile(model, backend="adakv", options={**OPTIONS, "strict": False}, dynamic=dynamic)
    with warnings.catch_warnings(record=True) as heard, torch.no_grad():
        warnings.simplefilter("always")
        found, cache = compiled(x)
        expected, dense = model(x)
    assert torch.equal(found, expected)
    assert not any(isinstance(tensor, adakv_compile.CompressedKV) for tensor in cache)
    for ours, theirs in zip(cache, dense, strict=True):
        assert torch.equal(ours, theirs)
    said = [str(item.message) for item in heard if "adakv" in str(item.message)]
    assert len(said) == 1, said
    assert any(reason.name in said[0] for reason in Reason)


def test_packed_halves_that_are_read_the_other_way_round_are_refused() -> None:
    swapped = grown(packed, 2, lambda kv, _: halves(kv, 0)[::-1])
    report = adakv_compile.explain(Laid(swapped), torch.randn(1, 40, 64), options=OPTIONS | {"strict": False})
    assert {refusal.reason for refusal in report.refusals} == {Reason.KEY_VALUE_MISMATCH}
