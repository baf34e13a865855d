"""A tensor that is brought into an order holds what a direct rearrangement holds, and no call is left behind."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, fx

from adakv_compile.passes.axes import Axes, Dims, Step, climb
from adakv_compile.passes.emit import Emitter
from tests.passes.views import DIM, HEADS, Views, capture_views, random_chain

aten = torch.ops.aten
SIZES = ((3, 7), (2, 5))


def _climbed(views: Views, at: int) -> tuple[Axes, Dims, Step]:
    """Return the axes and dimensions of a result, and what it is a view of."""
    node = views.results[at]
    axes = Axes()
    shape = tuple(node.meta["val"].shape)
    dims = axes.name(shape, [f"a{i}" for i in range(len(shape))])
    *_, top = climb(axes, node, dims)
    return axes, dims, top


def _emitted(views: Views, axes: Axes, top: Step, order: list[tuple[str, ...]]) -> fx.Node:
    with views.module.graph.inserting_before(views.output):
        return Emitter(views.module.graph, views.fake_mode, views.output).arrange(axes, top.node, top.dims, order)


def _direct(value: Tensor, groups: list[list[int]]) -> Tensor:
    """Return a tensor with its dimensions permuted and merged in groups."""
    value = value.permute([dim for group in groups for dim in group])
    shape: list[int] = []
    for group in groups:
        sizes, value_shape = 1, value.shape[sum(map(len, groups[: len(shape)])) :]
        for size in value_shape[: len(group)]:
            sizes *= size
        shape.append(sizes)
    return value.reshape(shape)


def _random_groups(rank: int, pick: random.Random) -> list[list[int]]:
    groups: list[list[int]] = []
    for dim in pick.sample(range(rank), rank):
        if groups and pick.random() < 0.3:
            groups[-1].append(dim)
        else:
            groups.append([dim])
    return groups


def _check(views: Views, arranged: fx.Node, at: int, groups: list[list[int]]) -> None:
    for sizes in SIZES:
        values = views.values(*sizes)
        truth = _direct(values[views.results[at].name], groups)
        found = values[arranged.name]
        assert found.dim() == truth.dim()
        # A dimension of size one stands for entries that are all alike.
        assert torch.equal(found.expand_as(truth), truth)


def _is_split_choice(axes: Axes) -> bool:
    """Whether one element of an axis is used which a view above showed to consist of several axes."""
    return any(axis in axes.parts for axis in axes.picked)


def test_any_view_is_made_again_in_any_order() -> None:
    views = capture_views([random_chain(seed) for seed in range(60)])
    done = 0
    for at in range(60):
        axes, dims, top = _climbed(views, at)
        groups = _random_groups(len(dims), random.Random(at))
        order = [tuple(axis for dim in group for axis in dims[dim]) for group in groups]
        try:
            arranged = _emitted(views, axes, top, order)
        except RuntimeError as failure:
            # Two merged dimensions of unknown size can't be inferred; a choice can't be made of parts.
            assert "inferred" in str(failure) or _is_split_choice(axes)  # noqa: PT017
            continue
        done += 1
        _check(views, arranged, at, groups)
    assert done >= 45


ORDERS: dict[str, tuple[list[list[int]], int]] = {
    "as it is": ([[0], [1], [2], [3]], 0),
    "transposed": ([[0], [2], [1], [3]], 1),
    "heads with the batch": ([[0, 1], [2], [3]], 1),
    "heads below the tokens": ([[0], [2, 1], [3]], 2),
    "everything of a head": ([[1], [0], [2], [3]], 1),
    "heads and head dimension": ([[0], [2], [1, 3]], 2),
}


@pytest.mark.parametrize("name", ORDERS)
def test_no_more_calls_than_needed(name: str) -> None:
    groups, most = ORDERS[name]
    views = capture_views([lambda x, b, n: x])
    axes, dims, top = _climbed(views, 0)
    before = len(list(views.module.graph.nodes))
    arranged = _emitted(views, axes, top, [tuple(axis for dim in group for axis in dims[dim]) for group in groups])
    _check(views, arranged, 0, groups)
    calls = [node for node in list(views.module.graph.nodes)[before - 1 :] if node.target is not aten.sym_size.int]
    assert len(calls) - 1 <= most


def test_repeated_heads_are_one_dimension_or_repeated_where_they_are_merged() -> None:
    views = capture_views([lambda x, b, n: x[:, :, None].expand(b, HEADS, 3, n, DIM)])
    axes, dims, top = _climbed(views, 0)
    assert top.node is views.x
    batch, heads, group, column, inner = dims
    apart = _emitted(views, axes, top, [batch, heads, group, column, inner])
    merged = _emitted(views, axes, top, [batch, (*heads, *group), column, inner])
    values = views.values()
    assert values[apart.name].shape == (3, HEADS, 1, 7, DIM)
    assert torch.equal(values[merged.name], values[views.x.name].repeat_interleave(3, dim=1))


def test_an_axis_that_nobody_asks_for_is_told() -> None:
    views = capture_views([lambda x, b, n: x])
    axes, dims, top = _climbed(views, 0)
    with pytest.raises(RuntimeError, match="unwanted axis"):
        _emitted(views, axes, top, [dims[0], dims[2], dims[3]])


def test_calls_are_taken_back() -> None:
    views = capture_views([lambda x, b, n: x])
    axes, dims, top = _climbed(views, 0)
    before = [node.name for node in views.module.graph.nodes]
    with views.module.graph.inserting_before(views.output):
        emit = Emitter(views.module.graph, views.fake_mode, views.output)
        emit.arrange(axes, top.node, top.dims, [dims[2], (*dims[0], *dims[1]), dims[3]])
        assert emit.made
        emit.undo()
    assert not emit.made
    assert [node.name for node in views.module.graph.nodes] == before
