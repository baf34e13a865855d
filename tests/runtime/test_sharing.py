"""No two live conversations share state, whatever they share in memory; and memory is given back."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adakv_compile.runtime import tail as tail_module
from adakv_compile.runtime.boundary import join, wrap_grown
from adakv_compile.runtime.errors import TailGrowthError
from adakv_compile.runtime.store import LayerStore
from adakv_compile.runtime.tail import FIRST_TAIL_CAPACITY
from tests.runtime.dense import Conversation, attention, check, conversation, random_entries


def _step(talk: Conversation, seed: int, tokens: int = 1) -> Conversation:
    """One compiled decode step: join, append on the store, wrap."""
    key, value = random_entries(talk.batch, tokens, torch.float64, torch.Generator().manual_seed(seed))
    store = join(talk.key, talk.value, tokens)
    store.append(key, value)
    views = wrap_grown(store, talk.key.length + tokens, talk.key.start)
    new = torch.ones(*talk.held.shape[:2], tokens, dtype=torch.bool)
    dense = talk.dense(
        torch.cat([talk.dense_key, key], 2), torch.cat([talk.dense_value, value], 2), torch.cat([talk.held, new], 2)
    )
    return replace(dense, key=views[0], value=views[1])


def _cropped(talk: Conversation, tokens: int) -> Conversation:
    dense = talk.dense(talk.dense_key[:, :, :-tokens], talk.dense_value[:, :, :-tokens], talk.held[:, :, :-tokens])
    return replace(dense, key=talk.key[:, :, :-tokens], value=talk.value[:, :, :-tokens])


def test_decode_appends_in_place() -> None:
    talk = conversation()
    store = talk.key.store
    for seed in range(FIRST_TAIL_CAPACITY + 3):
        talk = _step(talk, seed)
        assert talk.key.store is store
    assert store.capacity == 2 * FIRST_TAIL_CAPACITY
    assert store.cursor[:2].tolist() == [store.tail_length, store.prefix_length] == [FIRST_TAIL_CAPACITY + 3, 17]
    check(talk, torch.randn(2, 3, 1, 8).double())


def test_branches_from_one_older_view() -> None:
    trunk = _step(conversation(), 0)
    left, right = _step(trunk, 1), _step(trunk, 2, tokens=3)
    assert left.key.store is trunk.key.store
    assert right.key.store is not trunk.key.store
    assert right.key.store.keys is trunk.key.store.keys  # the prefix is shared
    left, right, third = _step(left, 3), _step(right, 4), _step(trunk, 5)
    for talk in (trunk, left, right, third):
        check(talk, torch.randn(2, 3, 2, 8).double())


def test_crop_then_continue() -> None:
    talk = _step(_step(conversation(), 0, tokens=4), 1, tokens=2)
    retried = _step(_cropped(talk, 3), 2, tokens=2)
    again = _step(_cropped(talk, 3), 3)
    for each in (talk, retried, again):
        check(each, torch.randn(2, 3, 1, 8).double())


def test_beams_share_one_store_per_layer_and_reorder_once() -> None:
    talk = _step(conversation(), 0)
    index = torch.tensor([1, 1])
    key, value = talk.key.index_select(0, index), talk.value.index_select(0, index)
    assert key.store is value.store
    index.fill_(0)  # the same tensor, written since: other rows
    other = talk.key.index_select(0, index)
    assert other.store is not key.store
    assert torch.equal(other.dense()[0][1], talk.key.dense()[0][0])
    same = talk.value.index_select(0, torch.tensor([0, 0]))
    assert same.store is other.store


def test_rows_selected_twice_branch_like_copies() -> None:
    talk = _step(conversation(), 0)
    index = torch.tensor([1, 0])

    def selected() -> Conversation:
        dense = talk.dense(talk.dense_key[index], talk.dense_value[index], talk.held[index])
        return replace(dense, key=talk.key[index], value=talk.value[index])

    first, second = selected(), selected()
    assert first.key.store is second.key.store
    first, second = _step(first, 1), _step(second, 2)
    third = _step(selected(), 3)
    talk = _step(talk, 4)
    fourth_key, fourth_value = talk.key[index], talk.value[index]
    assert fourth_key.store is fourth_value.store
    for each in (talk, first, second, third):
        check(each, torch.randn(2, 3, 1, 8).double())


def test_a_selection_of_an_older_length_is_not_taken_for_a_newer_one() -> None:
    talk = _step(conversation(), 0)
    index = torch.tensor([1, 0])
    early = talk.key[index], talk.value[index]
    grown = join(*early, 1)
    grown.append(*random_entries(2, 1, torch.float64, torch.Generator().manual_seed(9)))
    talk = _step(talk, 1)
    late = replace(
        talk.dense(talk.dense_key[index], talk.dense_value[index], talk.held[index]),
        key=talk.key[index],
        value=talk.value[index],
    )
    check(late)
    assert late.key.store is not grown


def test_deepcopies_are_independent() -> None:
    talk = _step(conversation(), 0)
    copied = replace(talk, **dict(zip(("key", "value"), copy.deepcopy([talk.key, talk.value]), strict=True)))
    talk, copied = _step(talk, 1), _step(copied, 2)
    check(talk, torch.randn(2, 3, 1, 8).double())
    check(copied, torch.randn(2, 3, 1, 8).double())


def test_eager_branches_before_any_attention() -> None:
    trunk = conversation()
    branches: list[Conversation] = []
    for seed in (1, 2):
        key, value = random_entries(2, 2, torch.float64, torch.Generator().manual_seed(seed))
        new = torch.ones(2, 3, 2, dtype=torch.bool)
        dense = trunk.dense(
            torch.cat([trunk.dense_key, key], 2),
            torch.cat([trunk.dense_value, value], 2),
            torch.cat([trunk.held, new], 2),
        )
        branches.append(replace(dense, key=torch.cat([trunk.key, key], 2), value=torch.cat([trunk.value, value], 2)))
    query = torch.randn(2, 6, 1, 8).double()
    with torch.no_grad():
        for talk in (*branches, *branches[::-1]):
            out = F.scaled_dot_product_attention(query, talk.key, talk.value, enable_gqa=True)
            torch.testing.assert_close(out, attention(query, talk))
    for talk in (trunk, *branches):
        check(talk)


def test_a_crop_of_what_was_just_appended_leaves_the_whole_alone() -> None:
    talk = conversation()
    new = random_entries(2, 4, torch.float64, torch.Generator().manual_seed(0))
    whole = torch.cat([talk.key, new[0]], 2), torch.cat([talk.value, new[1]], 2)
    cropped = tuple(tensor[:, :, :-2] for tensor in whole)
    join(*cropped)
    join(*whole)
    assert torch.equal(whole[0].dense()[0][:, :, -4:], new[0])
    assert torch.equal(cropped[0].dense()[0][:, :, -2:], new[0][:, :, :2])


def test_sliding_window_in_eager_mode_stays_bounded_and_in_place() -> None:
    window, talk = 9, conversation(length=17)
    key, value = talk.key[:, :, -window + 1 :], talk.value[:, :, -window + 1 :]
    dense_key, dense_value = talk.dense_key[:, :, -window + 1 :], talk.dense_value[:, :, -window + 1 :]
    held = talk.held[:, :, -window + 1 :]
    generator = torch.Generator().manual_seed(0)
    stores: set[int] = set()
    alive: list[LayerStore] = []
    for _ in range(400):
        new = random_entries(2, 1, torch.float64, generator)
        key, value = torch.cat([key, new[0]], 2), torch.cat([value, new[1]], 2)
        dense_key, dense_value = torch.cat([dense_key, new[0]], 2), torch.cat([dense_value, new[1]], 2)
        held = torch.cat([held, torch.ones(2, 3, 1, dtype=torch.bool)], 2)
        query = torch.randn(2, 3, 1, 8, generator=generator).double()
        full, cached = (key, value), (key[:, :, -window + 1 :], value[:, :, -window + 1 :])
        with torch.no_grad():
            out = F.scaled_dot_product_attention(query, *full)
        talk = Conversation(*full, dense_key, dense_value, held, 0)
        torch.testing.assert_close(out, attention(query, talk))
        key, value = cached
        dense_key, dense_value, held = (tensor[:, :, -window + 1 :] for tensor in (dense_key, dense_value, held))
        if id(key.store) not in stores:
            stores.add(id(key.store))
            alive.append(key.store)
        assert key.pending is None
        assert key.store.capacity == FIRST_TAIL_CAPACITY
        assert key.head_lengths.sum() <= held.sum()
    assert len(stores) <= 400 // (FIRST_TAIL_CAPACITY - window) + 1  # moved only when the tail was full


def test_a_view_that_starts_earlier_keeps_what_the_window_left_behind() -> None:
    generator = torch.Generator().manual_seed(0)
    talk = conversation()
    for seed in range(FIRST_TAIL_CAPACITY):
        talk = _step(talk, seed)
    key, value = random_entries(2, 1, torch.float64, generator)
    whole = torch.cat([talk.key, key], 2), torch.cat([talk.value, value], 2)
    window = tuple(tensor[:, :, -5:] for tensor in whole)
    moved = join(*window)
    assert moved.prefix_length > 17
    assert moved.capacity == FIRST_TAIL_CAPACITY
    new = torch.ones(2, 3, 1, dtype=torch.bool)
    check(
        replace(
            talk.dense(
                torch.cat([talk.dense_key, key], 2),
                torch.cat([talk.dense_value, value], 2),
                torch.cat([talk.held, new], 2),
            ),
            key=whole[0],
            value=whole[1],
        ),
        torch.randn(2, 3, 1, 8).double(),
    )


def test_dropping_the_views_frees_the_store_without_the_collector() -> None:
    talk = _step(conversation(), 0)
    index = torch.tensor([1, 0])
    selected = talk.key[index], talk.value[index]
    eager = tuple(torch.cat([view, torch.ones(2, 3, 1, 8).double()], 2) for view in selected)
    repeated = eager[0].repeat_interleave(2, 1)
    join(*eager)
    dead = [weakref.ref(talk.key.store), weakref.ref(eager[0].store)]
    gc.disable()
    try:
        del talk, selected, eager, repeated
        assert [ref() for ref in dead] == [None, None]
    finally:
        gc.enable()


def test_a_failed_growth_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = conversation()
    talk = _step(talk, 0, tokens=FIRST_TAIL_CAPACITY)
    with monkeypatch.context() as patch:

        def out_of_memory(*_: object) -> torch.Tensor:
            raise RuntimeError("can't allocate memory")

        patch.setattr(tail_module, "new_tail", out_of_memory)
        with pytest.raises(TailGrowthError, match=r"cpu for the 65 tokens .* as it was .* free"):
            join(talk.key, talk.value, 1)
    assert talk.key.store.capacity == FIRST_TAIL_CAPACITY
    check(_step(talk, 1), torch.randn(2, 3, 1, 8).double())


def test_a_tail_that_cannot_double_grows_by_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = _step(conversation(), 0, tokens=FIRST_TAIL_CAPACITY)
    real = tail_module.new_tail

    def scarce(prefix: torch.Tensor, heads: int, capacity: int) -> torch.Tensor:
        if capacity > 100:
            raise RuntimeError("can't allocate memory")
        return real(prefix, heads, capacity)

    monkeypatch.setattr(tail_module, "new_tail", scarce)
    talk = _step(talk, 1, tokens=2)
    assert talk.key.store.capacity == FIRST_TAIL_CAPACITY + 2
    check(talk)


def test_an_append_that_failed_on_the_way_is_forgotten() -> None:
    talk = _step(conversation(), 0)
    store = join(talk.key, talk.value, 1)
    store.cursor[0] += 1  # what a compiled graph did to this layer before it failed in another
    store.rewind()
    assert store.cursor[:2].tolist() == [1, 17]
    check(_step(talk, 1), torch.randn(2, 3, 1, 8).double())


def test_bytes() -> None:
    talk = conversation()
    store = talk.key.store
    assert talk.key.nbytes_held + talk.value.nbytes_held == store.nbytes_held
    assert talk.key.nbytes_dense == 2 * 3 * 17 * 8 * 8
    store.reserve(1)
    assert store.nbytes_held == 2 * (store.keys.nbytes + 2 * 3 * FIRST_TAIL_CAPACITY * 8 * 8) + store.bookkeeping_bytes
    grown = torch.cat([talk.key, torch.ones(2, 3, 2, 8).double()], 2)
    assert grown.nbytes_held == talk.key.nbytes_held + 2 * 3 * 2 * 8 * 8
