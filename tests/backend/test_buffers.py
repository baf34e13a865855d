"""Preallocated caches: buffers stay as the model writes them, attention reads what was kept, or what it always read."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import adakv_compile
from adakv_compile import Reason
from adakv_compile.runtime.side import attached
from adakv_compile.runtime.store import LayerStore

BATCH, HEADS, KV_HEADS, SLOTS, DIM = 2, 4, 2, 64, 8
LENGTH, STEPS, BUDGET = 40, 4, 12

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Any], Tensor]
"""``attention(k_cache, v_cache, q, k, v, position)``; caches are written in place."""


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def _at(count: int, position: Tensor) -> Tensor:
    return torch.arange(count) + position


def _causal(index: Tensor) -> Tensor:
    return torch.arange(SLOTS)[None, :] <= index[:, None]


def index_copy(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = _at(k.shape[2], position)
    kc.index_copy_(2, index, k)
    vc.index_copy_(2, index, v)
    return _attend(q, kc, vc, _causal(index))


def index_put(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    # As in a model, where both are made of the same tokens; a write by index_put alone may repeat them.
    k, v = torch.stack((k, v)).unbind()
    index = _at(k.shape[2], position)
    kc[:, :, index] = k
    vc[:, :, index] = v
    return _attend(q, kc, vc, _causal(index))


def sliced(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
    end = position + k.shape[2]
    kc[:BATCH, :, position:end] = k
    vc[:BATCH, :, position:end] = v
    index = torch.arange(position, end)
    return _attend(q, kc[:BATCH, :, :end], vc[:BATCH, :, :end], torch.arange(end)[None, :] <= index[:, None])


def sliced_read_in_full(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
    end = position + k.shape[2]
    kc[:, :, position:end] = k
    vc[:, :, position:end] = v
    return _attend(q, kc, vc, _causal(torch.arange(position, end)))


TENSOR_POSITIONS: dict[str, Attention] = {"index_copy": index_copy, "index_put": index_put}
INTEGER_POSITIONS: dict[str, Attention] = {"slices": sliced, "slices, read in full": sliced_read_in_full}
UNDERSTOOD = TENSOR_POSITIONS | INTEGER_POSITIONS


def late_mask(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = _at(k.shape[2], position)
    kc.index_copy_(2, index, k)
    vc.index_copy_(2, index, v)
    return _attend(q, kc, vc, _causal(index + 1))


def values_elsewhere(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = _at(k.shape[2], position)
    kc.index_copy_(2, index, k)
    vc.index_copy_(2, index + 1, v)
    return _attend(q, kc, vc, _causal(index))


def backwards(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = _at(k.shape[2], position)
    kc.index_copy_(2, position + k.shape[2] - 1 - torch.arange(k.shape[2]), k)
    vc.index_copy_(2, position + k.shape[2] - 1 - torch.arange(k.shape[2]), v)
    return _attend(q, kc, vc, _causal(index))


def every_other(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = position + torch.arange(k.shape[2])
    kc.index_copy_(2, (position + 2 * torch.arange(k.shape[2])) % SLOTS, k)
    vc.index_copy_(2, (position + 2 * torch.arange(k.shape[2])) % SLOTS, v)
    return _attend(q, kc, vc, _causal(index))


def written_twice(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = _at(k.shape[2], position)
    kc.index_copy_(2, index, k)
    vc.index_copy_(2, index, v)
    out = _attend(q, kc, vc, _causal(index))
    kc.mul_(2)
    return out


def written_before(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    kc.mul_(2)
    index = _at(k.shape[2], position)
    kc.index_copy_(2, index, k)
    vc.index_copy_(2, index, v)
    return _attend(q, kc, vc, _causal(index))


def repeated(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = _at(k.shape[2], position)
    kc[:, :, index] = k[:, :1]
    vc[:, :, index] = v[:, :1]
    return _attend(q, kc, vc, _causal(index))


def read_beyond(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
    end = position + k.shape[2]
    kc[:, :, position:end] = k
    vc[:, :, position:end] = v
    seen = torch.arange(end + 1)[None, :] <= torch.arange(position, end)[:, None] + 1
    return _attend(q, kc[:, :, : end + 1], vc[:, :, : end + 1], seen)


def unmasked(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = _at(k.shape[2], position)
    kc.index_copy_(2, index, k)
    vc.index_copy_(2, index, v)
    return F.scaled_dot_product_attention(q, kc, vc, enable_gqa=True)


REFUSED: dict[str, tuple[Attention, bool, Reason]] = {
    "the mask lets see one more": (late_mask, True, Reason.CACHE_FORM),
    "values a slot later": (values_elsewhere, True, Reason.CACHE_FORM),
    "last entry first": (backwards, True, Reason.CACHE_FORM),
    "every other slot": (every_other, True, Reason.CACHE_FORM),
    "changed after the write": (written_twice, True, Reason.CACHE_FORM),
    "changed before the write": (written_before, True, Reason.CACHE_FORM),
    "one head's entries for all": (repeated, True, Reason.CACHE_FORM),
    "a slot behind the last token is read": (read_beyond, False, Reason.CACHE_FORM),
    "no mask at all": (unmasked, True, Reason.MASK_NOT_CAUSAL),
}


def buffers(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, KV_HEADS, SLOTS, DIM), torch.zeros(batch, KV_HEADS, SLOTS, DIM)


def tokens(count: int, seed: int = 0, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = 3 * torch.randn(batch, HEADS, count, DIM, generator=generator)
    k, v = (torch.randn(batch, KV_HEADS, count, DIM, generator=generator) for _ in range(2))
    return q, k, v


def compiled(attention: Attention, budget: int = BUDGET) -> Attention:
    torch.compiler.reset()
    options = {"budget": budget, "window": 4, "inner": "eager"}
    return torch.compile(attention, backend="adakv", options=options)


def place(name_or_tensor: str | bool, position: int) -> Any:
    by_tensor = name_or_tensor if isinstance(name_or_tensor, bool) else name_or_tensor in TENSOR_POSITIONS
    return torch.tensor(position) if by_tensor else position


def store_of(kc: Tensor, vc: Tensor) -> LayerStore | None:
    side = attached(kc, vc)
    return None if side is None else side.store


def masked(store: LayerStore, kc: Tensor, vc: Tensor, q: Tensor, length: int) -> Tensor:
    """Return attention of one query to the dense buffers of which only what a store holds is visible."""
    seen = torch.zeros(q.shape[0], KV_HEADS, SLOTS, dtype=torch.bool)
    for b in range(q.shape[0]):
        for h in range(KV_HEADS):
            begin, end = store.offsets[b, h], store.offsets[b, h + 1]
            seen[b, h, store.positions[b, begin:end].long()] = True
    seen[:, :, store.prefix_length : length] = True
    return _attend(q, kc, vc, seen.repeat_interleave(HEADS // KV_HEADS, 1)[:, :, None])


@pytest.mark.parametrize("name", UNDERSTOOD)
@torch.no_grad()
def test_attention_reads_what_was_kept_and_the_buffers_stay_dense(name: str) -> None:
    attention, (kc, vc), (dense_k, dense_v) = UNDERSTOOD[name], buffers(), buffers()
    run = compiled(attention)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = run(kc, vc, *tokens(LENGTH), place(name, 0))
    expected = attention(dense_k, dense_v, *tokens(LENGTH), place(name, 0))
    torch.testing.assert_close(out, expected)
    for step in range(STEPS):
        q, k, v = tokens(1, seed=step + 1)
        out = run(kc, vc, q, k, v, place(name, LENGTH + step))
        attention(dense_k, dense_v, q, k, v, place(name, LENGTH + step))
        store = store_of(kc, vc)
        assert store is not None
        assert (store.length, store.tail_length) == (LENGTH + step + 1, step + 1)
        assert store.offsets[:, -1].tolist() == [KV_HEADS * BUDGET] * BATCH
        torch.testing.assert_close(out, masked(store, dense_k, dense_v, q, LENGTH + step + 1))
        assert torch.equal(kc, dense_k)
        assert torch.equal(vc, dense_v)


@pytest.mark.parametrize("name", UNDERSTOOD)
@torch.no_grad()
def test_several_tokens_behind_others_choose_among_all_that_the_buffer_holds(name: str) -> None:
    attention, (kc, vc), (dense_k, dense_v) = UNDERSTOOD[name], buffers(), buffers()
    run = compiled(attention)
    begin = 0
    for count, seed in ((20, 0), (1, 1), (19, 2), (1, 3)):
        q, k, v = tokens(count, seed)
        out = run(kc, vc, q, k, v, place(name, begin))
        dense = attention(dense_k, dense_v, q, k, v, place(name, begin))
        begin += count
        if count > 1:
            torch.testing.assert_close(out, dense)
    store = store_of(kc, vc)
    assert store is not None
    assert store.prefix_length == LENGTH
    torch.testing.assert_close(out, masked(store, dense_k, dense_v, q, begin))


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_what_is_not_proved_is_refused_and_right(name: str) -> None:
    attention, by_tensor, reason = REFUSED[name]
    options = {"budget": BUDGET, "window": 4, "inner": "eager"}
    torch.compiler.reset()
    report = adakv_compile.explain(attention, *buffers(), *tokens(LENGTH), place(by_tensor, 0), options=options)
    assert [refusal.reason for graph in report.graphs for refusal in graph.refusals] == [reason]
    (kc, vc), (dense_k, dense_v) = buffers(), buffers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = compiled(attention)
        for count, position in ((LENGTH, 0), (1, LENGTH)):
            new = tokens(count, seed=position)
            out = run(kc, vc, *new, place(by_tensor, position))
            torch.testing.assert_close(out, attention(dense_k, dense_v, *new, place(by_tensor, position)))
            torch.testing.assert_close((kc, vc), (dense_k, dense_v))
    assert store_of(kc, vc) is None


def _zeroed(kc: Tensor, vc: Tensor) -> None:
    kc.zero_()


def _reordered(kc: Tensor, vc: Tensor) -> None:
    vc.copy_(vc.flip(0))


MEDDLED: dict[str, tuple[Callable[[Tensor, Tensor], object], int]] = {
    "keys are zeroed": (_zeroed, LENGTH),
    "values are reordered": (_reordered, LENGTH),
    "the position is an earlier one": (lambda kc, vc: None, LENGTH - 5),
    "the position is a later one": (lambda kc, vc: None, LENGTH + 3),
    "a conversation starts with one token": (lambda kc, vc: None, 0),
}


@pytest.mark.parametrize("name", ["index_copy", "slices"])
@pytest.mark.parametrize("how", MEDDLED)
@torch.no_grad()
def test_what_was_kept_is_not_used_for_another_text(name: str, how: str) -> None:
    attention, (meddle, position) = UNDERSTOOD[name], MEDDLED[how]
    kc, vc = buffers()
    run = compiled(attention)
    run(kc, vc, *tokens(LENGTH), place(name, 0))
    meddle(kc, vc)
    dense_k, dense_v = kc.clone(), vc.clone()
    for step in range(2):
        new = tokens(1, seed=step + 1)
        out = run(kc, vc, *new, place(name, position + step))
        torch.testing.assert_close(out, attention(dense_k, dense_v, *new, place(name, position + step)))
        assert store_of(kc, vc) is None
    run(kc, vc, *tokens(LENGTH, seed=9), place(name, 0))
    assert store_of(kc, vc) is not None


@torch.no_grad()
def test_two_conversations_share_nothing() -> None:
    run = compiled(index_copy)
    first, second = buffers(), buffers(batch=3)
    run(*first, *tokens(LENGTH), torch.tensor(0))
    run(*second, *tokens(30, batch=3), torch.tensor(0))
    one, other = store_of(*first), store_of(*second)
    assert one is not None
    assert other is not None
    run(*second, *tokens(1, batch=3), torch.tensor(30))
    assert (one.length, other.length) == (LENGTH, 31)
    run(*first, *tokens(1), torch.tensor(LENGTH))
    assert (one.length, other.length) == (LENGTH + 1, 31)


@torch.no_grad()
def test_a_copy_of_a_buffer_is_dense() -> None:
    run = compiled(index_copy)
    kc, vc = buffers()
    run(kc, vc, *tokens(LENGTH), torch.tensor(0))
    copies = copy.deepcopy((kc, vc))
    dense = kc.clone(), vc.clone()
    assert store_of(*copies) is None
    new = tokens(1, seed=1)
    out = run(*copies, *new, torch.tensor(LENGTH))
    torch.testing.assert_close(out, index_copy(*dense, *new, torch.tensor(LENGTH)))
    assert store_of(kc, vc) is not None


def test_buffers_of_inference_mode_stay_dense() -> None:
    with torch.inference_mode():
        run = compiled(index_copy)
        (kc, vc), dense = buffers(), buffers()
        for count, position in ((LENGTH, 0), (1, LENGTH)):
            new = tokens(count, seed=position)
            out = run(kc, vc, *new, torch.tensor(position))
            torch.testing.assert_close(out, index_copy(*dense, *new, torch.tensor(position)))


@torch.no_grad()
def test_the_report_says_what_memory_is_not_saved() -> None:
    options = {"budget": BUDGET, "window": 4, "inner": "eager"}
    torch.compiler.reset()
    report = adakv_compile.explain(index_copy, *buffers(), *tokens(LENGTH), torch.tensor(0), options=options)
    (site,) = report.graphs[0].sites
    assert site.compressed
    assert f"buffer of {SLOTS} slots owned by the caller, stays dense" in site.cache
