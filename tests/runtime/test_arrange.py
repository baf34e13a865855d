"""Changing the layout of compressed views: what a dense tensor of the layout would become, or a refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adakv_compile.runtime.boundary import wrap_grown
from adakv_compile.runtime.compressed import CompressedKV, Kind
from adakv_compile.runtime.errors import CacheMismatchError, UnsupportedCacheOperation
from adakv_compile.runtime.layout import STANDARD, Layout
from tests.runtime.dense import HEADS, KEY_DIM, conversation, random_entries
from tests.runtime.test_layout_views import PAIRS, SINGLE

Change = Callable[[Tensor], Any]
FILL = 7.0


def new_view(layout: Layout, kind: Kind, *, seed: int = 0, batch: int = 2, tail: int = 3) -> CompressedKV:
    """Return a view with kept entries and appended ones."""
    store = conversation(seed, batch=batch).key.store
    if tail:
        store.append(*random_entries(batch, tail, torch.float64, torch.Generator().manual_seed(seed)))
    key, value = wrap_grown(store, store.length, layouts=(layout, layout))
    return value if kind == "value" else key


def agrees(view: Any, dense: Any) -> None:
    """Assert that a result is what dense tensors give, as tensors or lists of them."""
    if isinstance(dense, Tensor):
        assert type(view) is CompressedKV
        assert view.shape == dense.shape
        assert torch.equal(view.dense(FILL)[0], dense)
        return
    assert len(view) == len(dense)
    for one, other in zip(view, dense, strict=True):
        agrees(one, other)


# What always works


def _merges(layout: Layout) -> list[int]:
    """Return the dimensions that can be merged with the next one."""
    return [at for at in range(layout.rank - 1) if "l" not in layout.dims[at : at + 2]]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("layout", SINGLE + PAIRS, ids=str)
def test_any_order_and_any_grouping_of_the_axes(layout: Layout, inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        for kind in ("pair",) if layout.is_pair else ("key", "value"):
            view = new_view(layout, kind)
            dense = view.dense(FILL)[0]
            for first in range(layout.rank):
                for second in range(-layout.rank, layout.rank):
                    agrees(view.transpose(first, second), dense.transpose(first, second))
                agrees(view.unsqueeze(first), dense.unsqueeze(first))
                agrees(view.unsqueeze(-1 - first), dense.unsqueeze(-1 - first))
                agrees(view.unsqueeze(first).squeeze(first), dense)
                agrees(view.movedim(first, 0), dense.movedim(first, 0))
            agrees(view.mT, dense.mT)
            order = torch.randperm(layout.rank).tolist()
            agrees(view.permute(order), dense.permute(order))
            for at in _merges(layout):
                agrees(view.flatten(at, at + 1), dense.flatten(at, at + 1))
                agrees(view.flatten(at, at + 1).unflatten(at, view.shape[at : at + 2]), dense)
            agrees(view.view(view.shape), dense)
            agrees(view.reshape(*view.shape[:-1], -1), dense)


MERGED: dict[str, tuple[Layout, Change]] = {
    "heads out of the rows": (Layout(("bh", "l", "d")), lambda kv: kv.view(-1, HEADS, 20, KEY_DIM)),
    "heads out of the rows, keys": (Layout(("bh", "d", "l")), lambda kv: kv.view(2, HEADS, KEY_DIM, -1)),
    "heads out of the features": (
        Layout(("b", "l", "hd")),
        lambda kv: kv.view(2, -1, HEADS, KEY_DIM).transpose(1, 2),
    ),
    "features of the heads": (STANDARD, lambda kv: kv.transpose(1, 2).reshape(2, -1, HEADS * KEY_DIM)),
    "rows and heads": (STANDARD, lambda kv: kv.reshape(-1, 20, KEY_DIM).transpose(1, 2)),
    "rearranged twice": (
        Layout(("b", "l", "h", "d")),
        lambda kv: kv.permute(0, 2, 3, 1).flatten(0, 1).unflatten(0, (2, -1)).flatten(1, 2),
    ),
    "a matrix": (STANDARD, lambda kv: kv.permute(0, 1, 3, 2).reshape(-1, 20).t()),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", MERGED)
def test_axes_are_merged_and_split_as_models_do(what: str, inference: bool) -> None:
    layout, change = MERGED[what]
    with torch.inference_mode(inference), torch.no_grad():
        view = new_view(layout, "key")
        agrees(change(view), change(view.dense(FILL)[0]))


TAKEN: dict[str, tuple[Layout, Change]] = {
    "select": (Layout(("p", "b", "h", "l", "d")), lambda kv: [kv[0], kv[1], kv[-1], kv.select(0, -2)]),
    "unbind": (Layout(("p", "b", "h", "l", "d")), lambda kv: kv.unbind()),
    "unpacking": (Layout(("p", "b", "h", "l", "d")), lambda kv: [*kv]),
    "inside": (Layout(("b", "l", "p", "h", "d")), lambda kv: [*kv.unbind(2), kv[:, :, 1], kv.select(-3, 0)]),
    "chunk": (Layout(("b", "h", "l", "pd")), lambda kv: kv.chunk(2, dim=-1)),
    "split": (Layout(("b", "h", "l", "pd")), lambda kv: kv.split(KEY_DIM, dim=-1)),
    "split in sizes": (Layout(("b", "h", "l", "pd")), lambda kv: kv.split((KEY_DIM, KEY_DIM), dim=3)),
    "slices": (Layout(("b", "h", "l", "pd")), lambda kv: [kv[..., :KEY_DIM], kv[..., KEY_DIM:]]),
    "narrow": (Layout(("b", "h", "l", "pd")), lambda kv: kv.narrow(-1, KEY_DIM, KEY_DIM)),
    "chunk of features": (Layout(("b", "l", "phd")), lambda kv: kv.chunk(2, dim=-1)),
    "chunk of a dimension of its own": (Layout(("p", "b", "h", "l", "d")), lambda kv: kv.chunk(2)),
    "heads first": (
        Layout(("b", "l", "hpd")),
        lambda kv: kv.view(2, -1, HEADS, 2 * KEY_DIM).transpose(1, 2).split(KEY_DIM, -1),
    ),
    "interleaved": (Layout(("b", "h", "l", "dp")), lambda kv: kv.unflatten(-1, (KEY_DIM, 2)).unbind(-1)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", TAKEN)
def test_keys_and_values_are_taken_out_of_a_pair(what: str, inference: bool) -> None:
    layout, change = TAKEN[what]
    with torch.inference_mode(inference), torch.no_grad():
        view = new_view(layout, "pair")
        found = change(view)
        agrees(found, change(view.dense(FILL)[0]))
        for part in [found] if isinstance(found, Tensor) else found:
            assert part.store is view.store
            assert part.kind in ("key", "value")


PUT: dict[str, tuple[Layout, Change, Layout]] = {
    "stacked": (STANDARD, lambda kv: torch.stack(kv), Layout(("p", "b", "h", "l", "d"))),
    "stacked inside": (Layout(("b", "l", "h", "d")), lambda kv: torch.stack(kv, 2), Layout(("b", "l", "p", "h", "d"))),
    "stacked last": (STANDARD, lambda kv: torch.stack(kv, -1), Layout(("b", "h", "l", "d", "p"))),
    "packed": (STANDARD, lambda kv: torch.cat(kv, -1), Layout(("b", "h", "l", "pd"))),
    "packed features": (Layout(("b", "l", "hd")), lambda kv: torch.cat(kv, 2), Layout(("b", "l", "phd"))),
    "unsqueezed": (STANDARD, lambda kv: torch.cat([t[None] for t in kv]), Layout(("p", "b", "h", "l", "d"))),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", PUT)
def test_keys_and_values_are_put_into_a_pair(what: str, inference: bool) -> None:
    layout, change, expected = PUT[what]
    with torch.inference_mode(inference), torch.no_grad():
        views = new_view(layout, "key"), new_view(layout, "value")
        views = wrap_grown(views[0].store, 20, layouts=(layout, layout))
        dense = [view.dense(FILL)[0] for view in views]
        found = change(views)
        agrees(found, change(dense))
        assert found.axes == expected
        new = [torch.ones_like(t.narrow(layout.sequence_dim, 0, 2)) for t in dense]
        views = [torch.cat([view, n], layout.sequence_dim) for view, n in zip(views, new, strict=True)]
        dense = [torch.cat([d, n], layout.sequence_dim) for d, n in zip(dense, new, strict=True)]
        agrees(change(views), change(dense))


# Sizes of one, where a shape says little


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda kv: kv[0],
        lambda kv: kv.squeeze(0),
        lambda kv: kv.squeeze(),
        lambda kv: kv.squeeze((0, 1)),
        lambda kv: [*kv],
        lambda kv: kv[0][None],
        lambda kv: kv.view(HEADS, 20, KEY_DIM).transpose(0, 1).unsqueeze(1),
        lambda kv: kv.transpose(0, 1),
        lambda kv: kv.transpose(0, 1).squeeze(1).view(1, HEADS, 20, KEY_DIM),
        lambda kv: kv[None].squeeze(1),
        lambda kv: kv.expand(4, -1, -1, -1),
        lambda kv: kv.expand(4, HEADS, 20, KEY_DIM),
        lambda kv: kv.repeat(3, 1, 1, 1),
        lambda kv: kv.repeat_interleave(3, dim=0),
    ],
)
def test_one_row(change: Change, inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        view = new_view(STANDARD, "key", batch=1)
        agrees(change(view), change(view.dense(FILL)[0]))


def test_a_sequence_of_one_token_is_still_a_sequence() -> None:
    talk = conversation(length=1, kept=1.0, shorter_rows=False)
    dense = talk.key.dense()[0]
    for change in (lambda kv: kv.transpose(1, 2).flatten(2), lambda kv: kv.flatten(0, 1), lambda kv: kv.unsqueeze(3)):
        agrees(change(talk.key), change(dense))
    for change in (
        lambda kv: kv.squeeze(2),
        lambda kv: kv.squeeze(),
        lambda kv: kv[:, :, 0],
        lambda kv: kv.flatten(1, 2),
        lambda kv: kv.view(2, 1, HEADS, KEY_DIM),
    ):
        with pytest.raises(UnsupportedCacheOperation):
            change(talk.key)


def test_a_pair_of_one_row_keeps_its_halves_apart() -> None:
    view = new_view(Layout(("p", "b", "h", "l", "d")), "pair", batch=1)
    dense = view.dense(FILL)[0]
    agrees([*view.squeeze(1)], [*dense.squeeze(1)])
    agrees([*view[:, 0]], [*dense[:, 0]])


# Refused


REFUSED: dict[str, tuple[Layout, Kind, Change]] = {
    "split of the sequence": (STANDARD, "key", lambda kv: kv.view(2, HEADS, 4, 5, KEY_DIM)),
    "split of the head dimension": (STANDARD, "key", lambda kv: kv.view(2, HEADS, 20, 2, 4)),
    "sequence and heads": (Layout(("b", "l", "h", "d")), "key", lambda kv: kv.flatten(1, 2)),
    "sequence and features": (STANDARD, "value", lambda kv: kv.flatten(2)),
    "other sizes": (STANDARD, "key", lambda kv: kv.reshape(HEADS, 2, 20, KEY_DIM)),
    "across rows and heads": (Layout(("bh", "l", "d")), "key", lambda kv: kv.view(3, 2, 20, KEY_DIM)),
    "a row": (Layout(("b", "l", "h", "d")), "key", lambda kv: kv[1]),
    "a slot": (Layout(("b", "l", "h", "d")), "key", lambda kv: kv[:, 3]),
    "a head": (Layout(("b", "l", "h", "d")), "key", lambda kv: kv[:, :, 0]),
    "some heads": (Layout(("b", "l", "h", "d")), "key", lambda kv: kv[:, :, :2]),
    "some features": (Layout(("b", "l", "hd")), "key", lambda kv: kv[..., :KEY_DIM]),
    "merged rows by index": (Layout(("bh", "l", "d")), "key", lambda kv: kv.index_select(0, torch.tensor([0, 1]))),
    "merged rows by indexing": (Layout(("bh", "l", "d")), "key", lambda kv: kv[torch.tensor([0, 1, 2])]),
    "merged rows by slice": (Layout(("bh", "d", "l")), "key", lambda kv: kv[:HEADS]),
    "merged rows repeated": (Layout(("bh", "d", "l")), "key", lambda kv: kv.repeat(2, 1, 1)),
    "merged rows repeated, each": (Layout(("bh", "d", "l")), "key", lambda kv: kv.repeat_interleave(2, 0)),
    "merged rows split": (Layout(("bh", "d", "l")), "key", lambda kv: kv.split(HEADS)),
    "heads by index": (Layout(("b", "l", "h", "d")), "key", lambda kv: kv[:, :, torch.tensor([0])]),
    "merged heads repeated": (Layout(("b", "l", "hd")), "key", lambda kv: kv.repeat_interleave(2, 2)),
    "all heads over again": (Layout(("b", "l", "h", "d")), "key", lambda kv: kv.repeat(1, 1, 2, 1)),
    "heads repeated, then appended to": (
        Layout(("b", "l", "h", "d")),
        "key",
        lambda kv: torch.cat([kv.repeat_interleave(2, 2), torch.ones(2, 1, 6, KEY_DIM).double()], 1),
    ),
    "heads repeated, then selected": (
        Layout(("b", "l", "h", "d")),
        "key",
        lambda kv: kv.repeat_interleave(2, 2)[torch.tensor([0])],
    ),
    "heads repeated, other merge": (
        Layout(("b", "l", "h", "d")),
        "key",
        lambda kv: kv[:, :, :, None].expand(-1, -1, -1, 2, -1).reshape(2, 20, HEADS, 2 * KEY_DIM),
    ),
    "ordered while repeated": (
        Layout(("b", "l", "h", "d")),
        "key",
        lambda kv: kv[:, :, :, None].expand(-1, -1, -1, 2, -1).transpose(1, 2),
    ),
    "repeated along the sequence": (Layout(("b", "l", "h", "d")), "key", lambda kv: kv.repeat(1, 2, 1, 1)),
    "expanded in front": (Layout(("b", "l", "h", "d")), "key", lambda kv: kv.expand(4, 2, 20, HEADS, KEY_DIM)),
    "every second slot": (Layout(("b", "l", "h", "d")), "key", lambda kv: kv[:, ::2]),
    "slots by index": (Layout(("b", "l", "h", "d")), "key", lambda kv: kv[:, torch.tensor([0])]),
    "cat of heads": (Layout(("b", "l", "h", "d")), "key", lambda kv: torch.cat([kv, kv], 2)),
    "prepend": (Layout(("b", "l", "h", "d")), "key", lambda kv: torch.cat([kv.dense()[0], kv], 1)),
    "matmul": (Layout(("bh", "d", "l")), "key", lambda kv: torch.ones(6, 1, KEY_DIM).double() @ kv),
    "baddbmm": (
        Layout(("bh", "d", "l")),
        "key",
        lambda kv: torch.zeros(6, 1, 20).double().baddbmm(torch.ones(6, 1, KEY_DIM).double(), kv),
    ),
    "einsum": (Layout(("b", "l", "h", "d")), "key", lambda kv: torch.einsum("blhd->bhd", kv)),
    "arithmetic": (Layout(("b", "h", "l", "pd")), "pair", lambda kv: kv + 1),
    "a part of the keys": (Layout(("b", "h", "l", "pd")), "pair", lambda kv: kv[..., : KEY_DIM // 2]),
    "across keys and values": (Layout(("b", "h", "l", "pd")), "pair", lambda kv: kv[..., 4 : KEY_DIM + 4]),
    "in three": (Layout(("b", "h", "l", "pd")), "pair", lambda kv: kv.split((4, KEY_DIM, 4), -1)),
    "in four": (Layout(("b", "h", "l", "pd")), "pair", lambda kv: kv.chunk(4, -1)),
    "interleaved keys": (Layout(("b", "h", "l", "dp")), "pair", lambda kv: kv.chunk(2, -1)),
    "first half of interleaved features": (Layout(("b", "h", "l", "dp")), "pair", lambda kv: kv[..., :KEY_DIM]),
    "last half of the heads' pairs": (Layout(("b", "l", "hpd")), "pair", lambda kv: kv[..., HEADS * KEY_DIM :]),
    "every second feature": (Layout(("b", "h", "l", "dp")), "pair", lambda kv: kv[..., ::2]),
    "heads with keys": (Layout(("b", "l", "hpd")), "pair", lambda kv: kv.chunk(2, -1)),
    "values by index": (
        Layout(("p", "b", "h", "l", "d")),
        "pair",
        lambda kv: kv.index_select(0, torch.tensor([1])),
    ),
    "exchanged": (Layout(("p", "b", "h", "l", "d")), "pair", lambda kv: kv.flip(0)),
    "pair stacked on itself": (Layout(("b", "h", "l", "pd")), "pair", lambda kv: torch.stack([kv, kv])),
    "values first": (Layout(("p", "b", "h", "l", "d")), "pair", lambda kv: torch.stack([kv[1], kv[0]])),
    "values first, packed": (Layout(("p", "b", "h", "l", "d")), "pair", lambda kv: torch.cat([kv[1], kv[0]], -1)),
    "keys twice": (Layout(("p", "b", "h", "l", "d")), "pair", lambda kv: torch.stack([kv[0], kv[0]])),
    "in two layouts": (
        Layout(("p", "b", "h", "l", "d")),
        "pair",
        lambda kv: torch.cat([kv[0].transpose(0, 2), kv[1].transpose(0, 2).transpose(1, 2)], 3),
    ),
    "keys and a tensor": (Layout(("p", "b", "h", "l", "d")), "pair", lambda kv: torch.stack([kv[0], kv[0].dense()[0]])),
    "three": (Layout(("p", "b", "h", "l", "d")), "pair", lambda kv: torch.stack([kv[0], kv[1], kv[1]])),
    "pairs in a row": (Layout(("p", "b", "h", "l", "d")), "pair", lambda kv: torch.cat([kv, kv], 3)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", REFUSED)
def test_what_only_a_dense_tensor_can_do(what: str, inference: bool) -> None:
    layout, kind, change = REFUSED[what]
    with torch.inference_mode(inference), torch.no_grad():
        view = new_view(layout, kind)
        before = view.dense(FILL)[0]
        with pytest.raises(UnsupportedCacheOperation, match=r"aten\..* CompressedKV\(.*(dense|sdpa)"):
            change(view)
        assert torch.equal(view.dense(FILL)[0], before)


@pytest.mark.parametrize(
    "change",
    [
        lambda kv: kv.transpose(1, 4),
        lambda kv: kv.permute(0, 1, 2, 2),
        lambda kv: kv.permute(0, 1, 2),
        lambda kv: kv.unsqueeze(6),
        lambda kv: kv.select(0, 2),
        lambda kv: kv.view(3, -1, 7),
    ],
)
def test_mistakes_that_a_dense_tensor_refuses_are_refused(change: Change) -> None:
    view = new_view(STANDARD, "key")
    for tensor in (view, view.dense()[0]):
        with pytest.raises((IndexError, RuntimeError)):
            change(tensor)


def test_keys_and_values_of_two_layers_are_no_pair() -> None:
    key, value = new_view(STANDARD, "key"), new_view(STANDARD, "value", seed=1)
    with pytest.raises(CacheMismatchError, match="different layers"):
        torch.stack([key, value])
    with pytest.raises(CacheMismatchError, match="different tokens"):
        torch.stack([key[:, :, 1:], new_view(STANDARD, "value")[:, :, :-1]])


def test_new_entries_in_another_layout() -> None:
    for layout in SINGLE + PAIRS:
        view = new_view(layout, "pair" if layout.is_pair else "key")
        shape = list(view.shape)
        for dim in range(view.dim()):
            wrong = torch.ones([size + (at == dim) for at, size in enumerate(shape)]).double()
            if dim == layout.sequence_dim:
                assert torch.cat([view, wrong], dim).shape[dim] == 2 * shape[dim] + 1
            else:
                with pytest.raises(CacheMismatchError, match="another model"):
                    torch.cat([view, wrong], layout.sequence_dim)
        assert math.prod(shape) == view.numel()


REPEATED: dict[str, tuple[Layout, Change]] = {
    "each": (Layout(("b", "l", "h", "d")), lambda kv: kv.repeat_interleave(2, 2)),
    "expanded": (
        Layout(("b", "l", "h", "d")),
        lambda kv: kv[:, :, :, None, :].expand(2, 20, HEADS, 4, KEY_DIM).reshape(2, 20, HEADS * 4, KEY_DIM),
    ),
    "expanded only": (Layout(("b", "l", "h", "d")), lambda kv: kv[:, :, :, None].expand(-1, -1, -1, 2, -1)),
    "and transposed": (Layout(("b", "l", "h", "d")), lambda kv: kv.repeat_interleave(2, 2).transpose(1, 2)),
    "and permuted": (Layout(("l", "b", "h", "d")), lambda kv: kv.repeat_interleave(3, 2).permute(1, 2, 0, 3)),
    "in front of the rows": (Layout(("h", "b", "l", "d")), lambda kv: kv.repeat_interleave(2, 0)),
    "copied": (Layout(("b", "l", "h", "d")), lambda kv: kv.repeat_interleave(2, 2).clone().detach()),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", REPEATED)
def test_heads_are_repeated_in_any_layout(what: str, inference: bool) -> None:
    layout, change = REPEATED[what]
    with torch.inference_mode(inference), torch.no_grad():
        view = new_view(layout, "key")
        found, expected = change(view), change(view.dense(FILL)[0])
        assert found.shape == expected.shape
        assert torch.equal(found.dense(FILL)[0], expected)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("layout", [Layout(("h", "b", "l", "d")), Layout(("b", "h", "d", "l")), STANDARD], ids=str)
def test_rows_are_repeated_where_heads_are_beside_them(layout: Layout, inference: bool) -> None:
    rows = layout.batch_dim
    assert rows is not None
    with torch.inference_mode(inference), torch.no_grad():
        view = new_view(layout, "key")
        dense = view.dense(FILL)[0]
        agrees(view.repeat_interleave(3, rows), dense.repeat_interleave(3, rows))
        times = [3 if dim == rows else 1 for dim in range(4)]
        agrees(view.repeat(times), dense.repeat(times))
