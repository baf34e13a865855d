"""Dimensions followed through views are those of the top, element by element; what mixes dimensions is not followed."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch

from adakv_compile.passes.axes import Axes, Dims, Step, climb
from tests.passes.views import DIM, HEADS, Chain, Views, agree, capture_views, picks, random_chain

FOLLOWED: dict[str, Chain] = {
    "itself": lambda x, b, n: x,
    "transposed": lambda x, b, n: x.transpose(1, 2),
    "transposed from the end": lambda x, b, n: x.transpose(-1, -3),
    "a transposed matrix": lambda x, b, n: x.mT,
    "permuted": lambda x, b, n: x.permute(2, -1, 0, 1),
    "made contiguous": lambda x, b, n: x.transpose(1, 2).contiguous(),
    "heads merged into the batch": lambda x, b, n: x.reshape(b * HEADS, n, DIM),
    "heads merged and split again": lambda x, b, n: x.reshape(b * HEADS, n, DIM).view(b, HEADS, n, DIM),
    "heads beside the head dimension": lambda x, b, n: x.transpose(1, 2).reshape(b, n, HEADS * DIM),
    "all of a token": lambda x, b, n: x.permute(0, 2, 1, 3).flatten(2),
    "groups of heads": lambda x, b, n: x.view(b, 2, HEADS // 2, n, DIM),
    "groups, turned": lambda x, b, n: x.view(b, 2, HEADS // 2, n, DIM).transpose(1, 2),
    "halves of the head dimension": lambda x, b, n: x.unflatten(-1, (2, DIM // 2)).transpose(-1, -2),
    "a dimension more": lambda x, b, n: x[:, :, None],
    "a dimension more and less": lambda x, b, n: x.unsqueeze(0).squeeze(0),
    "dimensions of size one around": lambda x, b, n: x.view(1, b, HEADS, 1, n, DIM, 1),
    "repeated by expand": lambda x, b, n: x[:, :, None].expand(b, HEADS, 3, n, DIM).reshape(b, 3 * HEADS, n, DIM),
    "repeated in place": lambda x, b, n: x.repeat_interleave(3, dim=1),
    "repeated in place, by token": lambda x, b, n: x.transpose(1, 2).repeat_interleave(3, dim=-2),
    "tiled": lambda x, b, n: x.repeat(1, 3, 1, 1),
    "tiled twice": lambda x, b, n: x.repeat(1, 2, 1, 2),
    "repeated by nothing": lambda x, b, n: x.repeat(1, 1, 1, 1),
    "the first of a pair": lambda x, b, n: x[..., : DIM // 2],
    "the second of a pair": lambda x, b, n: x[..., DIM // 2 :],
    "the last of three": lambda x, b, n: x[..., -2:],
    "a slice from far before the start": lambda x, b, n: x[:, -8:2],
    "one head": lambda x, b, n: x[:, 1],
    "the last head": lambda x, b, n: x[:, -1],
    "split": lambda x, b, n: x.split(2, dim=-1)[2],
    "chunks": lambda x, b, n: x.chunk(2, dim=1)[1],
    "unbound": lambda x, b, n: x.unbind(1)[2],
    "packed by head": lambda x, b, n: x.transpose(1, 2).reshape(b, n, HEADS * DIM)[..., HEADS * DIM // 2 :],
    "a part of a part": lambda x, b, n: x[:, 2:].chunk(2, dim=-1)[1],
    "one of merged groups": lambda x, b, n: x.view(b, 2, 2, n, DIM).flatten(1, 2)[:, 3],
    "everything in a slice": lambda x, b, n: x[:, :, :n],
}


def _dims(views: Views, at: int) -> tuple[Axes, Dims, list[Step]]:
    node = views.results[at]
    axes = Axes()
    shape = tuple(node.meta["val"].shape)
    dims = axes.name(shape, [f"a{i}" for i in range(len(shape))])
    return axes, dims, list(climb(axes, node, dims))


def _check(views: Views, at: int) -> list[Step]:
    """Assert that every step up is true, for the sizes of the capture and for others."""
    axes, dims, steps = _dims(views, at)
    for sizes in ((3, 7), (2, 5), (5, 2)):
        values, symbols = views.values(*sizes), views.sizes(*sizes)
        below = values[views.results[at].name], dims
        for step in steps:
            assert agree(axes, below, (values[step.node.name], step.dims), symbols)
            picked = [axis for dim in axes.resolve(step.dims) for axis in dim if axis in picks(axes, symbols)]
            assert not (picked and step.whole)
    return steps


@cache
def _followed() -> Views:
    return capture_views(list(FOLLOWED.values()))


@pytest.mark.parametrize("name", FOLLOWED)
def test_views_are_followed_to_the_top(name: str) -> None:
    steps = _check(_followed(), list(FOLLOWED).index(name))
    assert steps[-1].node is _followed().x


STOPPED: dict[str, Chain] = {
    "heads and tokens mixed up": lambda x, b, n: x.reshape(b, n, HEADS, DIM),
    "head dimension and heads mixed up": lambda x, b, n: x.reshape(b, DIM, n, HEADS),
    "tokens before heads, read as heads": lambda x, b, n: x.transpose(1, 2).reshape(b, HEADS, n, DIM),
    "all in one row, cut anew": lambda x, b, n: x.flatten().view(n, b, HEADS, DIM),
    "a third of twos": lambda x, b, n: x.reshape(b, 3, 8 * n),
    "turned around": lambda x, b, n: x.flip(1),
    "rolled": lambda x, b, n: x.roll(1, -1),
    "doubled": lambda x, b, n: x * 2,
    "every other": lambda x, b, n: x[..., ::2],
    "a part that is no equal part": lambda x, b, n: x[..., 1:3],
    "parts of different sizes": lambda x, b, n: x.split([2, 4], dim=-1)[0],
    "old tokens": lambda x, b, n: x[:, :, : n - 1],
    "one token": lambda x, b, n: x[:, :, 0],
    "chosen by a list": lambda x, b, n: x[:, [1, 0, 2, 3]],
    "repeated for more dimensions": lambda x, b, n: x.repeat(2, 1, 1, 1, 1),
    "put beside itself": lambda x, b, n: torch.cat([x, x], 1),
}


@cache
def _stopped() -> Views:
    return capture_views(list(STOPPED.values()))


@pytest.mark.parametrize("name", STOPPED)
def test_what_mixes_or_changes_is_not_followed(name: str) -> None:
    steps = _check(_stopped(), list(STOPPED).index(name))
    assert steps[-1].node is not _stopped().x


def test_repeating_and_tiling_are_told_apart() -> None:
    # Both have the shape of heads repeated for groups of queries; only one of them is.
    for name, position in (("repeated in place", 0), ("tiled", 1)):
        axes, dims, steps = _dims(_followed(), list(FOLLOWED).index(name))
        (heads,) = axes.resolve(steps[-1].dims)[1]
        assert axes.resolve(dims)[1][position] == heads
        assert axes.sizes[heads] == HEADS


def test_casts_are_views_only_if_asked_for_and_only_to_wider_types() -> None:
    chains: list[Chain] = [lambda x, b, n: x.double().transpose(1, 2), lambda x, b, n: x.half().transpose(1, 2)]
    views = capture_views(chains)
    for at, (casts, reached) in product(range(2), ((False, False), (True, True))):
        node = views.results[at]
        axes = Axes()
        dims = axes.name(tuple(node.meta["val"].shape), "bnhd")
        *_, top = climb(axes, node, dims, casts=casts)
        assert (top.node is views.x) == (reached and at == 0)


# -- any chain of views ----------------------------------------------------------------------------------------------


def test_of_any_chain_of_views_only_what_is_true_is_said() -> None:
    views = capture_views([random_chain(seed) for seed in range(60)])
    tops = [_check(views, at)[-1].node for at in range(60)]
    # Not by saying nothing.
    assert sum(top is views.x for top in tops) >= 30


# -- numbers ---------------------------------------------------------------------------------------------------------


def _factorings(number: int, count: int) -> list[tuple[int, ...]]:
    if count == 1:
        return [(number,)]
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return [(d, *rest) for d in divisors for rest in _factorings(number // d, count - 1)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_regrouping_of_numbers_is_true_or_refused(count: int) -> None:
    shapes = [shape for length in (1, 2, 3) for shape in _factorings(12, length)]
    followed = 0
    for old, new in product(_factorings(12, count), shapes):
        axes = Axes()
        dims = axes.name(old, [f"a{i}" for i in range(count)])
        found = axes.regroup(dims, new)
        if found is None:
            continue
        followed += 1
        source = torch.arange(12).view(old)
        assert agree(axes, (source, dims), (source.reshape(new), found))
    assert followed >= len(shapes)


def test_axes_are_split_everywhere_at_once() -> None:
    axes = Axes()
    dims = axes.name((3, 8), "ab")
    assert axes.regroup(dims, (3, 2, 4)) == (("a",), ("b.0",), ("b.1",))
    assert axes.resolve((("b", "a"),)) == (("b.0", "b.1", "a"),)
    assert axes.carve(("b.1",), (2, 2)) == (("b.1.0",), ("b.1.1",))
    assert axes.flat(("b",)) == ("b.0", "b.1.0", "b.1.1")
    assert axes.size(("a", "b")) == 24
    assert axes.carve(("a",), (2, 2)) is None
    assert axes.add("a", 5) == "a'"


def test_axes_that_fit_are_identified() -> None:
    axes = Axes()
    known = axes.name((3, 1, 8, 5), "bhld")
    assert axes.identify(axes.name((3, 1, 8, 5), "wxyz"), known)
    assert axes.resolve((("w", "x"), ("y",), ("z",))) == (("b", "h"), ("l",), ("d",))
    # A whole for its parts, and a dimension of size one for nothing.
    assert axes.identify(axes.name((24, 1, 5), "pqr"), (("b", "l"), (), ("d",)))
    assert axes.resolve((("p",), ("q",), ("r",))) == (("b", "l"), (), ("d",))


@pytest.mark.parametrize(
    ("sizes", "known"),
    [
        ((3, 8), (("b",), ("h",), ("l",))),
        ((4, 8), (("b",), ("l",))),
        ((3, 4), (("b",), ("l",))),
        ((24, 5), (("b",), ("l", "d"))),
        ((3, 8), (("b", "l"), ("d",))),
        ((12, 10), (("b", "l"), ("d",))),
    ],
)
def test_axes_that_do_not_fit_are_told(sizes: tuple[int, ...], known: Dims) -> None:
    axes = Axes()
    axes.name((3, 1, 8, 5), "bhld")
    assert not axes.identify(axes.name(sizes, [f"x{i}" for i in range(len(sizes))]), known)
