"""Compressed views in the layouts that decoders cache: what they report, what they hold, how steps pass them on."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adakv_compile.call import Boundary, Grown, Made, Passed, Past, Returned, bind
from adakv_compile.runtime.boundary import join, wrap_grown, wrap_prefill
from adakv_compile.runtime.compressed import CompressedKV
from adakv_compile.runtime.errors import CacheMismatchError
from adakv_compile.runtime.layout import STANDARD, Layout
from adakv_compile.runtime.stats import cache_stats
from tests.runtime.dense import HEADS, KEY_DIM, Conversation, conversation, random_entries

SINGLE = [
    STANDARD,
    Layout(("b", "l", "h", "d")),
    Layout(("l", "b", "h", "d")),
    Layout(("bh", "d", "l")),
    Layout(("bh", "l", "d")),
    Layout(("b", "l", "hd")),
    Layout(("b", "1", "l", "hd")),
]
PAIRS = [
    Layout(("b", "h", "l", "pd")),
    Layout(("b", "l", "hpd")),
    Layout(("p", "b", "h", "l", "d")),
    Layout(("b", "l", "p", "h", "d")),
]
LAYOUTS = [*((layout, layout) for layout in SINGLE + PAIRS), (SINGLE[3], SINGLE[4]), (SINGLE[0], SINGLE[1])]


def _views(talk: Conversation, layouts: tuple[Layout, Layout]) -> tuple[CompressedKV, CompressedKV]:
    return wrap_grown(talk.key.store, talk.length, layouts=layouts)


def _expected(layout: Layout, kind: str, keys: Tensor, values: Tensor) -> Tensor:
    if kind == "pair":
        return layout.join_pair(keys, values)
    return layout.from_standard(keys if kind == "key" else values)


def _check(view: CompressedKV, layout: Layout, talk: Conversation) -> None:
    hidden = ~talk.held[..., None]
    keys, values = talk.dense_key.masked_fill(hidden, 7.0), talk.dense_value.masked_fill(hidden, 7.0)
    found, held = view.dense(fill=7.0)
    assert torch.equal(found, _expected(layout, view.kind, keys, values).to(view.dtype))
    assert torch.equal(held, talk.held)
    assert view.shape == found.shape
    assert view.axes == layout
    assert view.length == talk.length
    assert torch.equal(view.head_lengths, talk.held.sum(-1))
    for row in range(talk.batch):
        for head in range(HEADS):
            assert torch.equal(view.positions(row, head), talk.held[row, head].nonzero()[:, 0])


def _grown(talk: Conversation, tokens: int, seed: int) -> tuple[Conversation, Tensor, Tensor]:
    key, value = random_entries(talk.batch, tokens, torch.float64, torch.Generator().manual_seed(seed))
    held = torch.cat([talk.held, torch.ones(talk.batch, HEADS, tokens, dtype=torch.bool)], 2)
    return talk.dense(torch.cat([talk.dense_key, key], 2), torch.cat([talk.dense_value, value], 2), held), key, value


COPIES: dict[str, Callable[[CompressedKV], Any]] = {
    "itself": lambda view: view,
    "detach": torch.Tensor.detach,
    "clone": torch.Tensor.clone,
    "contiguous": torch.Tensor.contiguous,
    "data": lambda view: view.data,
    "to float32": lambda view: view.to(torch.float32),
    "deepcopy": copy.deepcopy,
    "pickle": lambda view: pickle.loads(pickle.dumps(view)),
    "like": lambda view: view.like(view.store.clone(), None),
    "user": lambda view: CompressedKV(view.store, view.kind, view.length, layout=view.axes),
}


@pytest.mark.parametrize("made", COPIES)
@pytest.mark.parametrize("layouts", LAYOUTS, ids=lambda pair: "-".join(str(layout) for layout in pair))
def test_views_and_their_copies_hold_what_the_dense_tensor_holds(layouts: tuple[Layout, Layout], made: str) -> None:
    talk = conversation()
    talk = talk.dense(talk.dense_key.float().double(), talk.dense_value.float().double(), talk.held)
    for view, layout in zip(_views(talk, layouts), layouts, strict=True):
        found = COPIES[made](view)
        assert type(found) is CompressedKV
        assert found.kind == view.kind
        if made == "to float32":
            assert found.dtype == torch.float32
            assert torch.equal(found.dense()[1], talk.held)
            torch.testing.assert_close(found.dense()[0].double(), view.dense()[0])
            assert found.axes == layout
        else:
            _check(found, layout, conversation())


@pytest.mark.parametrize("layouts", LAYOUTS, ids=lambda pair: "-".join(str(layout) for layout in pair))
def test_steps_append_in_place_and_older_views_branch_off(layouts: tuple[Layout, Layout]) -> None:
    talk = conversation()
    views = _views(talk, layouts)
    first, key, value = _grown(talk, 2, 0)
    store = join(*views, 2)
    assert store is talk.key.store
    store.append(key, value)
    longer = wrap_grown(store, first.length, layouts=layouts)
    second, key, value = _grown(talk, 1, 1)
    forked = join(*views, 1)
    assert forked is not store
    forked.append(key, value)
    branch = wrap_grown(forked, second.length, layouts=layouts)
    for at, layout in enumerate(layouts):
        _check(views[at], layout, talk)
        _check(longer[at], layout, first)
        _check(branch[at], layout, second)


def test_a_pair_is_one_view() -> None:
    talk = conversation()
    store = talk.key.store
    for layout in PAIRS:
        key, value = wrap_prefill(store.keys, store.values, store.offsets, store.positions, 17, 0, (layout, layout))
        assert key is value
        assert key.kind == "pair"
        assert key.nbytes_held == key.store.nbytes_held
        assert key.nbytes_dense == talk.key.nbytes_dense + talk.value.nbytes_dense
        assert key.pending is None


def test_the_representation_names_a_layout_that_is_not_the_usual_one() -> None:
    talk = conversation()
    key, value = _views(talk, (Layout(("bh", "d", "l")), Layout(("b", "h", "l", "d"))))
    assert "shape=[6, 8, 17]" in repr(key)
    assert "layout=[B * H, D, L]" in repr(key)
    assert "layout" not in repr(value)
    assert value.axes is STANDARD
    assert pickle.loads(pickle.dumps(value)).axes is STANDARD


PAIR, OTHER = PAIRS[0], PAIRS[2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda talk, key, value, pair: (value, key), "exchanged"),
        (lambda talk, key, value, pair: (key, key), "used twice"),
        (lambda talk, key, value, pair: (pair, value), "with itself only"),
        (lambda talk, key, value, pair: (key, pair), "with itself only"),
        (lambda talk, key, value, pair: (pair, pair.detach()), "with itself only"),
        (lambda talk, key, value, pair: (pair, talk.dense_key), "not compressed"),
        (lambda talk, key, value, pair: (key.clone(), value.to(torch.float32)), "different layers"),
        (lambda talk, key, value, pair: (key, copy.deepcopy(value)), "different layers"),
    ],
)
def test_tensors_that_do_not_belong_together(change: Callable[..., tuple[Tensor, Tensor]], reason: str) -> None:
    talk = conversation()
    key, value = _views(talk, (SINGLE[3], SINGLE[4]))
    pair, _ = _views(talk, (PAIR, PAIR))
    with pytest.raises(CacheMismatchError, match=reason):
        join(*change(talk, key, value, pair))


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("pair", STANDARD), ("pair", SINGLE[3]), ("key", PAIR), ("value", OTHER), ("both", STANDARD), ("both", PAIR)],
)
def test_a_kind_goes_with_its_layouts_only(kind: Any, layout: Layout) -> None:
    with pytest.raises(ValueError, match="is not a view of LayerStore"):
        CompressedKV(conversation().key.store, kind, layout=layout)


def test_keys_and_values_of_different_sizes_are_no_pair() -> None:
    store = conversation().key.store
    keys, _ = wrap_prefill(store.keys, store.values[..., :4], store.offsets, store.positions, 17)
    with pytest.raises(ValueError, match="is not a view of LayerStore"):
        CompressedKV(keys.store, "pair", layout=PAIR)


# Counting


@pytest.mark.parametrize("layouts", LAYOUTS, ids=lambda pair: "-".join(str(layout) for layout in pair))
def test_a_layer_is_counted_whatever_its_layout(layouts: tuple[Layout, Layout]) -> None:
    talk = conversation()
    key, value = _views(talk, layouts)
    (layer,) = cache_stats({"layers": [(key, value), key]}).layers
    assert layer.logical_length == 17
    assert layer.bytes_held == talk.key.store.nbytes_held
    assert layer.bytes_dense == talk.key.nbytes_dense + talk.value.nbytes_dense
    assert torch.equal(layer.head_lengths, talk.held.sum(-1))


def test_a_pair_and_its_own_keys_are_one_layer() -> None:
    talk = conversation()
    pair, _ = _views(talk, (PAIR, PAIR))
    (layer,) = cache_stats([talk.key, pair]).layers
    assert layer.bytes_held == talk.key.store.nbytes_held
    assert layer.bytes_dense == talk.key.nbytes_dense + talk.value.nbytes_dense


# The call boundary

TOKENS = 2


def _kinds(layouts: tuple[Layout, Layout]) -> list[tuple[Any, Layout]]:
    if layouts[0].is_pair:
        return [("pair", layouts[0])]
    return [("key", layouts[0]), ("value", layouts[1])]


@pytest.mark.parametrize("layouts", LAYOUTS, ids=lambda pair: "-".join(str(layout) for layout in pair))
def test_a_step_takes_and_returns_caches_in_their_layout(layouts: tuple[Layout, Layout]) -> None:
    talk, kinds = conversation(), _kinds(layouts)
    views = _views(talk, layouts)[: len(kinds)]
    grown, key, value = _grown(talk, TOKENS, 0)
    boundary = Boundary(
        inputs=(Passed(len(kinds)),),
        pasts=(Past(0, len(kinds) - 1, TOKENS, False),),
        outputs=(Returned(0), *(Grown(0, kind, "all", layout) for kind, layout in kinds)),
    )

    def compiled(new: Tensor) -> tuple[Tensor]:
        store = views[0].store
        store.append(key, value)
        store.advance(-TOKENS)  # the operator advances the device, the boundary the host
        return (new,)

    out, *after = bind(boundary, compiled, pytest.fail)(*views, key)
    assert out is key
    assert len(after) == len(kinds)
    for view, (kind, layout) in zip(after, kinds, strict=True):
        assert view.kind == kind
        assert view.store is talk.key.store
        _check(view, layout, grown)


@pytest.mark.parametrize("layouts", LAYOUTS, ids=lambda pair: "-".join(str(layout) for layout in pair))
def test_a_prompt_returns_caches_in_their_layout(layouts: tuple[Layout, Layout]) -> None:
    talk, kinds = conversation(), _kinds(layouts)
    store = talk.key.store
    boundary = Boundary((), (), tuple(Made(0, kind, 17, None, "all", layout) for kind, layout in kinds))
    parts = (store.keys, store.values, store.offsets, store.positions)
    views = bind(boundary, lambda: parts, pytest.fail)()
    for view, (kind, layout) in zip(views, kinds, strict=True):
        assert view.kind == kind
        assert view.store is views[0].store
        _check(view, layout, talk)


def test_one_tensor_returned_in_several_layouts_shares_its_store() -> None:
    talk = conversation()
    store = talk.key.store
    wanted: list[tuple[Any, Layout]] = [
        ("key", STANDARD),
        ("pair", PAIR),
        ("key", SINGLE[1]),
        ("value", SINGLE[4]),
        ("value", SINGLE[4]),
        ("pair", OTHER),
    ]
    boundary = Boundary((), (), tuple(Made(0, kind, 17, None, "all", layout) for kind, layout in wanted))
    parts = (store.keys, store.values, store.offsets, store.positions)
    views = bind(boundary, lambda: parts, pytest.fail)()
    for view, (kind, layout) in zip(views, wanted, strict=True):
        assert view.kind == kind
        assert view.store is views[0].store
        _check(view, layout, talk)


def test_a_sliding_cache_keeps_its_window_along_its_own_sequence_dimension() -> None:
    talk, layout = conversation(), Layout(("b", "l", "hd"))
    key, value = wrap_grown(talk.key.store, 9, 8, (layout, layout))
    grown, new_key, new_value = _grown(talk, 1, 0)
    boundary = Boundary((), (Past(0, 1, 1, True),), (Grown(0, "key", "as before", layout), Returned(None, 3)))

    def compiled() -> tuple[Tensor, ...]:
        key.store.append(new_key, new_value)
        key.store.advance(-1)
        return ()

    after, three = bind(boundary, compiled, pytest.fail)(key, value)
    assert three == 3
    assert after.shape == (2, 9, HEADS * KEY_DIM)
    assert after.start == 9
    window = grown.dense_key[:, :, 9:].masked_fill(~grown.held[:, :, 9:, None], 0.0)
    assert torch.equal(after.dense()[0], layout.from_standard(window))


def test_a_view_that_is_not_compressed_sends_the_call_back() -> None:
    talk = conversation()
    pair, _ = _views(talk, (PAIR, PAIR))
    boundary = Boundary((), (Past(0, 0, 1, False),), (Grown(0, "pair", "all", PAIR),))
    run = bind(boundary, pytest.fail, lambda *args: ("sent back", *args))
    dense = pair.dense()[0]
    assert run(dense) == ("sent back", dense)


@pytest.mark.parametrize("layout", PAIRS, ids=str)
def test_zeroing_a_pair_drops_keys_and_values(layout: Layout) -> None:
    talk = conversation()
    pair, _ = _views(talk, (layout, layout))
    older = pair.detach()
    pair.zero_()
    assert pair.shape == older.shape
    assert pair.axes == layout
    assert not pair.head_lengths.any()
    assert not join(pair, pair).keys.numel()
    _check(older, layout, talk)
