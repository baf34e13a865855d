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
from tests.backend.buffered import (
    BATCH,
    BUDGET,
    KV_HEADS,
    LENGTH,
    OPTIONS,
    SLOTS,
    Attention,
    at,
    attend,
    buffers,
    causal,
    compiled,
    follow,
    leave,
    masked,
    place,
    store_of,
    tokens,
)


def index_copy(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = at(k.shape[2], position)
    kc.index_copy_(2, index, k)
    vc.index_copy_(2, index, v)
    return attend(q, kc, vc, causal(index))


def index_put(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    # As in a model, where both are made of the same tokens; a write by index_put alone may repeat them.
    k, v = torch.stack((k, v)).unbind()
    index = at(k.shape[2], position)
    kc[:, :, index] = k
    vc[:, :, index] = v
    return attend(q, kc, vc, causal(index))


def sliced(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
    end = position + k.shape[2]
    kc[:BATCH, :, position:end] = k
    vc[:BATCH, :, position:end] = v
    index = torch.arange(position, end)
    return attend(q, kc[:BATCH, :, :end], vc[:BATCH, :, :end], torch.arange(end)[None, :] <= index[:, None])


def sliced_read_in_full(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
    end = position + k.shape[2]
    kc[:, :, position:end] = k
    vc[:, :, position:end] = v
    return attend(q, kc, vc, causal(torch.arange(position, end)))


TENSOR_POSITIONS: dict[str, Attention] = {"index_copy": index_copy, "index_put": index_put}
INTEGER_POSITIONS: dict[str, Attention] = {"slices": sliced, "slices, read in full": sliced_read_in_full}
UNDERSTOOD = TENSOR_POSITIONS | INTEGER_POSITIONS


def _place(name: str, position: int) -> Any:
    return place(position, by_tensor=name in TENSOR_POSITIONS)


def late_mask(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = at(k.shape[2], position)
    kc.index_copy_(2, index, k)
    vc.index_copy_(2, index, v)
    return attend(q, kc, vc, causal(index + 1))


def values_elsewhere(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = at(k.shape[2], position)
    kc.index_copy_(2, index, k)
    vc.index_copy_(2, index + 1, v)
    return attend(q, kc, vc, causal(index))


def backwards(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = at(k.shape[2], position)
    kc.index_copy_(2, position + k.shape[2] - 1 - torch.arange(k.shape[2]), k)
    vc.index_copy_(2, position + k.shape[2] - 1 - torch.arange(k.shape[2]), v)
    return attend(q, kc, vc, causal(index))


def every_other(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = position + torch.arange(k.shape[2])
    kc.index_copy_(2, (position + 2 * torch.arange(k.shape[2])) % SLOTS, k)
    vc.index_copy_(2, (position + 2 * torch.arange(k.shape[2])) % SLOTS, v)
    return attend(q, kc, vc, causal(index))


def written_twice(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = at(k.shape[2], position)
    kc.index_copy_(2, index, k)
    vc.index_copy_(2, index, v)
    out = attend(q, kc, vc, causal(index))
    kc.mul_(2)
    return out


def written_before(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    kc.mul_(2)
    index = at(k.shape[2], position)
    kc.index_copy_(2, index, k)
    vc.index_copy_(2, index, v)
    return attend(q, kc, vc, causal(index))


def repeated(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = at(k.shape[2], position)
    kc[:, :, index] = k[:, :1]
    vc[:, :, index] = v[:, :1]
    return attend(q, kc, vc, causal(index))


def read_beyond(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
    end = position + k.shape[2]
    kc[:, :, position:end] = k
    vc[:, :, position:end] = v
    seen = torch.arange(end + 1)[None, :] <= torch.arange(position, end)[:, None] + 1
    return attend(q, kc[:, :, : end + 1], vc[:, :, : end + 1], seen)


def unmasked(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = at(k.shape[2], position)
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


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_attention_reads_what_was_kept_and_the_buffers_stay_dense(name: str) -> None:
    follow(UNDERSTOOD[name], by_tensor=name in TENSOR_POSITIONS)


@pytest.mark.parametrize("name", UNDERSTOOD)
@torch.no_grad()
def test_several_tokens_behind_others_choose_among_all_that_the_buffer_holds(name: str) -> None:
    attention, (kc, vc), (dense_k, dense_v) = UNDERSTOOD[name], buffers(), buffers()
    run = compiled(attention)
    begin = 0
    for count, seed in ((20, 0), (1, 1), (19, 2), (1, 3)):
        q, k, v = tokens(count, seed)
        out = run(kc, vc, q, k, v, _place(name, begin))
        dense = attention(dense_k, dense_v, q, k, v, _place(name, begin))
        begin += count
        if count > 1:
            torch.testing.assert_close(out, dense)
    store = store_of(kc, vc)
    assert store is not None
    assert store.prefix_length == LENGTH
    torch.testing.assert_close(out, masked(store, dense_k, dense_v, q, begin))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_proved_is_refused_and_right(name: str) -> None:
    attention, by_tensor, reason = REFUSED[name]
    leave(attention, reason, by_tensor=by_tensor)


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
    run(kc, vc, *tokens(LENGTH), _place(name, 0))
    meddle(kc, vc)
    dense_k, dense_v = kc.clone(), vc.clone()
    for step in range(2):
        new = tokens(1, seed=step + 1)
        out = run(kc, vc, *new, _place(name, position + step))
        torch.testing.assert_close(out, attention(dense_k, dense_v, *new, _place(name, position + step)))
        assert store_of(kc, vc) is None
    run(kc, vc, *tokens(LENGTH, seed=9), _place(name, 0))
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
    torch.compiler.reset()
    report = adakv_compile.explain(index_copy, *buffers(), *tokens(LENGTH), torch.tensor(0), options=OPTIONS)
    (site,) = report.graphs[0].sites
    assert site.compressed
    assert f"buffer of {SLOTS} slots owned by the caller, stays dense" in site.cache
    assert "memory is not saved" in site.cache


@torch.no_grad()
def test_statistics_tell_what_is_read_from_what_stays() -> None:
    kc, vc = buffers()
    cache = {"k_cache": kc, "v_cache": vc}
    compiled(index_copy)(kc, vc, *tokens(LENGTH), torch.tensor(0))
    store = store_of(kc, vc)
    assert store is not None
    (layer,) = adakv_compile.cache_stats(cache).layers
    assert layer.compressed
    assert layer.head_lengths.sum(-1).tolist() == [KV_HEADS * BUDGET] * BATCH
    assert (layer.logical_length, layer.bytes_beside) == (LENGTH, store.nbytes_held)
    assert layer.bytes_held == kc.nbytes + vc.nbytes + store.nbytes_held
    assert layer.bytes_dense == (kc.nbytes + vc.nbytes) * LENGTH // SLOTS
    assert "which stay" in str(adakv_compile.cache_stats(cache))
    kc.zero_()
    (layer,) = adakv_compile.cache_stats(cache).layers
    assert not layer.compressed
    assert (layer.bytes_beside, layer.bytes_held) == (0, kc.nbytes + vc.nbytes)


def _masks(index: Tensor, window: int) -> tuple[Tensor, Tensor]:
    return causal(index), causal(index) & (torch.arange(SLOTS)[None, :] > index[:, None] - window)


def two_readers(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = at(k.shape[2], position)
    kc.index_copy_(2, index, k)
    vc.index_copy_(2, index, v)
    everything, newest = _masks(index, 20)
    return torch.cat([attend(q, kc, vc, everything), attend(q.flip(1), kc, vc, newest)])


def two_readers_one_late(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = at(k.shape[2], position)
    kc.index_copy_(2, index, k)
    vc.index_copy_(2, index, v)
    return torch.cat([attend(q, kc, vc, causal(index)), attend(q, kc, vc, causal(index + 1))])


@torch.no_grad()
def test_several_attentions_read_what_the_first_keeps_of_their_buffers() -> None:
    (kc, vc), (dense_k, dense_v) = buffers(), buffers()
    run = compiled(two_readers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count, position in ((LENGTH, 0), (1, LENGTH), (1, LENGTH + 1)):
            new = tokens(count, seed=position)
            out = run(kc, vc, *new, torch.tensor(position))
            dense = two_readers(dense_k, dense_v, *new, torch.tensor(position))
            if count > 1:
                torch.testing.assert_close(out, dense)
                continue
            store = store_of(kc, vc)
            assert store is not None
            assert store.length == position + 1
            windowed = masked(store, dense_k, dense_v, new[0].flip(1), position + 1, first=position - 19)
            expected = [masked(store, dense_k, dense_v, new[0], position + 1), windowed]
            torch.testing.assert_close(out, torch.cat(expected))


@torch.no_grad()
def test_an_attention_that_is_not_understood_reads_the_buffers_of_one_that_is() -> None:
    (kc, vc), (dense_k, dense_v) = buffers(), buffers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = compiled(two_readers_one_late)
        for count, position in ((LENGTH, 0), (1, LENGTH)):
            new = tokens(count, seed=position)
            out = run(kc, vc, *new, torch.tensor(position))
            dense = two_readers_one_late(dense_k, dense_v, *new, torch.tensor(position))
            if count > 1:
                torch.testing.assert_close(out, dense)
            else:
                store = store_of(kc, vc)
                assert store is not None
                torch.testing.assert_close(out[:BATCH], masked(store, dense_k, dense_v, new[0], position + 1))
                torch.testing.assert_close(out[BATCH:], dense[BATCH:])
