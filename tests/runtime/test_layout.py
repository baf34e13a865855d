"""Layouts: what shapes they give, what they undo, and which are none."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adakv_compile.runtime.layout import STANDARD, Layout

BATCH, HEADS, LENGTH, DIM = 2, 3, 5, 4

SHAPES: dict[tuple[str, ...], tuple[int, ...]] = {
    ("b", "h", "l", "d"): (2, 3, 5, 4),
    ("b", "l", "h", "d"): (2, 5, 3, 4),
    ("l", "b", "h", "d"): (5, 2, 3, 4),
    ("bh", "l", "d"): (6, 5, 4),
    ("bh", "d", "l"): (6, 4, 5),
    ("b", "l", "hd"): (2, 5, 12),
    ("b", "1", "l", "hd"): (2, 1, 5, 12),
    ("b", "h", "l", "pd"): (2, 3, 5, 8),
    ("b", "l", "phd"): (2, 5, 24),
    ("b", "l", "hpd"): (2, 5, 24),
    ("p", "b", "h", "l", "d"): (2, 2, 3, 5, 4),
    ("b", "l", "p", "h", "d"): (2, 5, 2, 3, 4),
    ("pbh", "l", "d"): (12, 5, 4),
}


@pytest.mark.parametrize("dims", SHAPES)
def test_the_shape_of_a_layout(dims: tuple[str, ...]) -> None:
    layout = Layout(dims)
    shape = SHAPES[dims]
    assert layout.shape(BATCH, HEADS, LENGTH, DIM) == shape
    assert layout.rank == len(shape)
    assert shape[layout.sequence_dim] == LENGTH
    assert layout.batch_dim is None or shape[layout.batch_dim] == BATCH
    assert layout.is_pair == (torch.Size(shape).numel() == 2 * BATCH * HEADS * LENGTH * DIM)


@pytest.mark.parametrize(
    ("dims", "batch_dim"),
    [
        (("l", "b", "h", "d"), 1),
        (("bh", "l", "d"), None),
        (("p", "b", "h", "l", "d"), 1),
        (("pb", "h", "l", "d"), None),
    ],
)
def test_rows_have_a_dimension_or_share_one(dims: tuple[str, ...], batch_dim: int | None) -> None:
    assert Layout(dims).batch_dim == batch_dim


def test_a_layout_is_written_like_a_shape() -> None:
    assert str(Layout(("bh", "d", "l"))) == "[B * H, D, L]"
    assert str(Layout(("b", "1", "l", "hpd"))) == "[B, 1, L, H * 2 * D]"


@st.composite
def layouts(draw: st.DrawFn, pair: bool) -> Layout:
    """Any layout: axes in any order, merged in any way, with dimensions of size one anywhere."""
    order = draw(st.permutations("bhldp" if pair else "bhld"))
    dims: list[str] = []
    for axis in order:
        if dims and "l" not in (axis, dims[-1]) and draw(st.booleans()):
            dims[-1] += axis
        else:
            dims.append(axis)
    for _ in range(draw(st.integers(0, 2))):
        dims.insert(draw(st.integers(0, len(dims))), "1")
    return Layout(tuple(dims))


@settings(max_examples=200, deadline=None)
@given(layouts(pair=False), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3))
def test_a_tensor_comes_back_from_its_layout(layout: Layout, length: int, batch: int, heads: int) -> None:
    entries = torch.randn(batch, heads, length, DIM)
    tensor = layout.from_standard(entries)
    assert tensor.shape == layout.shape(batch, heads, length, DIM)
    back = layout.to_standard(tensor, heads, DIM)
    assert torch.equal(back, entries)
    assert back.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@settings(max_examples=200, deadline=None)
@given(layouts(pair=True), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3))
def test_keys_and_values_come_back_from_their_pair(layout: Layout, length: int, batch: int, heads: int) -> None:
    keys, values = torch.randn(2, batch, heads, length, DIM)
    tensor = layout.join_pair(keys, values)
    assert tensor.shape == layout.shape(batch, heads, length, DIM)
    back = layout.split_pair(tensor, heads, DIM)
    assert torch.equal(back[0], keys)
    assert torch.equal(back[1], values)


def test_packed_and_stacked_pairs_are_what_decoders_write() -> None:
    keys, values = torch.randn(2, BATCH, HEADS, LENGTH, DIM)
    written = {
        ("b", "h", "l", "pd"): torch.cat([keys, values], -1),
        ("p", "b", "h", "l", "d"): torch.stack([keys, values]),
        ("b", "l", "phd"): torch.cat([tensor.transpose(1, 2).flatten(2) for tensor in (keys, values)], -1),
        ("b", "h", "l", "dp"): torch.stack([keys, values], -1).flatten(-2),
        ("b", "ph", "l", "d"): torch.cat([keys, values], 1),
    }
    for dims, tensor in written.items():
        assert torch.equal(Layout(dims).join_pair(keys, values), tensor)
        assert torch.equal(torch.stack(Layout(dims).split_pair(tensor, HEADS, DIM)), torch.stack([keys, values]))


@pytest.mark.parametrize(
    "dims",
    [
        (),
        ("b", "h", "l"),
        ("b", "h", "l", "d", "d"),
        ("b", "h", "l", "l", "d"),
        ("b", "h", "ld"),
        ("bl", "h", "d"),
        ("p", "p", "b", "h", "l", "d"),
        ("b", "h", "l", "d", "x"),
        ("b", "h", "l", "d1"),
        ("b", "h", "l", "d", "11"),
        ("b", "h", "l", "d", ""),
        ("bhld",),
        ("pp", "b", "h", "l", "d"),
    ],
)
def test_what_is_no_layout(dims: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"no layout of a cached tensor: .* in a dimension of its own"):
        Layout(dims)


def test_a_pair_is_not_taken_for_one_tensor_nor_one_for_a_pair() -> None:
    tensor, pair = torch.ones(STANDARD.shape(2, 3, 5, 4)), Layout(("b", "h", "l", "pd"))
    for wrong in (
        lambda: pair.to_standard(torch.ones(2, 3, 5, 8), 3, 4),
        lambda: pair.from_standard(tensor),
        lambda: STANDARD.split_pair(tensor, 3, 4),
        lambda: STANDARD.join_pair(tensor, tensor),
    ):
        with pytest.raises(ValueError, match="keys and values"):
            wrong()


def test_every_order_of_four_dimensions_is_a_layout_and_no_two_are_equal() -> None:
    assert len({Layout(dims) for dims in permutations("bhld")}) == 24
    assert Layout(("b", "h", "l", "d")) == STANDARD
