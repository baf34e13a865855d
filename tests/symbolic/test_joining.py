"""Masks that are put together of several tensors: what is read of them is what PyTorch computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adakv_compile.symbolic.evaluate import evaluate
from tests.symbolic.captured import BATCH, MaskFunction, MaskGraph, capture_mask, visible_in


def _causal(queries: int, keys: int, first: int = 0) -> Tensor:
    return torch.arange(keys) <= torch.arange(queries)[:, None] + first


def _ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def after_a_prefix(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    new = x.shape[1]
    return torch.cat([_ones(new, k.shape[1] - new), _causal(new, new)], -1)


def one_column_first(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    return torch.cat([_ones(x.shape[1], 1), _causal(x.shape[1], k.shape[1] - 1)], dim=1)


def rows_under_one_another(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    return torch.cat([_causal(1, k.shape[1]), _causal(x.shape[1] - 1, k.shape[1], 1)], 0)


def three_parts(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    new = x.shape[1]
    return torch.cat([_ones(new, 1), ~_ones(new, 1), _causal(new, k.shape[1] - 2)], -1)


def nothing_and_all(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    return torch.cat([_ones(x.shape[1], 0), _causal(x.shape[1], k.shape[1])], -1)


def stacked_sideways(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    return torch.hstack([_causal(x.shape[1], 3), _causal(x.shape[1], k.shape[1] - 3)])


def stacked_downwards(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    return torch.vstack([_causal(2, k.shape[1]), _causal(x.shape[1] - 2, k.shape[1])])


def of_one_dimension(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    positions = torch.cat([torch.arange(2), torch.arange(k.shape[1] - 2) + 5])
    return positions <= torch.arange(x.shape[1])[:, None] + 4


def stacked_in_one_dimension(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    positions = torch.hstack([torch.arange(k.shape[1] - 1), torch.arange(1)])
    return positions <= torch.arange(x.shape[1])[:, None]


def beside_padding(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    shown = torch.cat([p[:, 1:], p.new_ones(p.shape[0], 1)], -1).bool()
    return shown[:, None, None] & _causal(x.shape[1], k.shape[1])


def rows_of_the_batch(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    causal = _causal(x.shape[1], k.shape[1])[None]
    return torch.cat([causal, ~causal])[:, None]


def numbers(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    shown = torch.zeros(x.shape[1], 2)
    hidden = torch.full((x.shape[1], k.shape[1] - 2), torch.finfo(torch.float32).min)
    return torch.cat([shown, hidden], -1)


READ: list[MaskFunction] = [
    after_a_prefix,
    one_column_first,
    rows_under_one_another,
    three_parts,
    nothing_and_all,
    stacked_sideways,
    stacked_downwards,
    of_one_dimension,
    stacked_in_one_dimension,
    beside_padding,
    rows_of_the_batch,
    numbers,
]


def _check(graph: MaskGraph, queries: int, keys: int, seed: int) -> None:
    run = graph.run(queries, keys, seed)
    shape = (BATCH, 1, queries, keys)
    predicate = graph.prove().predicate
    assert predicate is not None
    read = evaluate(predicate, shape, run.values, run.symbols)
    assert torch.equal(read.expand(shape), visible_in(run.mask, run.shape))


@pytest.mark.parametrize("mask", READ)
def test_what_is_read_is_what_is_put_together(mask: MaskFunction) -> None:
    graph = capture_mask(mask, queries=4, keys=7)
    for seed in range(2):
        _check(graph, 4, 7, seed)


@pytest.mark.parametrize("mask", [after_a_prefix, one_column_first, stacked_sideways, beside_padding])
def test_it_is_so_for_lengths_that_are_not_known(mask: MaskFunction) -> None:
    graph = capture_mask(mask, queries=5, keys=9, dynamic=True)
    for queries, keys in ((5, 9), (3, 8), (2, 4)):
        _check(graph, queries, keys, seed=keys)


def test_a_prefix_and_a_triangle_are_a_causal_mask() -> None:
    for mask, expected in ((after_a_prefix, True), (one_column_first, False), (stacked_sideways, False)):
        graph = capture_mask(mask, queries=4, keys=7)
        assert graph.prove().is_self_causal(graph.queries, graph.keys) is expected


def the_other_way_round(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    new = x.shape[1]
    return torch.cat([_causal(new, new), _ones(new, k.shape[1] - new)], -1)


def a_column_too_few(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    new = x.shape[1]
    return torch.cat([_ones(new, k.shape[1] - new - 1), _causal(new, new + 1)], -1)


def a_column_hidden(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    new = x.shape[1]
    return torch.cat([_ones(new, k.shape[1] - new - 1), ~_ones(new, 1), _causal(new, new)], -1)


def a_triangle_without_its_diagonal(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    new = x.shape[1]
    return torch.cat([_ones(new, k.shape[1] - new), _causal(new, new, -1)], -1)


def a_triangle_that_looks_ahead(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    new = x.shape[1]
    return torch.cat([_ones(new, k.shape[1] - new), _causal(new, new, 1)], -1)


@pytest.mark.parametrize(
    "mask",
    [
        the_other_way_round,
        a_column_too_few,
        a_column_hidden,
        a_triangle_without_its_diagonal,
        a_triangle_that_looks_ahead,
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_other_parts_are_not_a_causal_mask(mask: MaskFunction, dynamic: bool) -> None:
    graph = capture_mask(mask, queries=4, keys=7, dynamic=dynamic)
    assert not graph.prove().is_self_causal(graph.queries, graph.keys)


def of_two_types(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    new = x.shape[1]
    return torch.cat([torch.ones(new, k.shape[1] - new), _causal(new, new).float()], -1).bool()


def of_something_computed(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    new = x.shape[1]
    return torch.cat([(x[0, :, None] + k[:1, new:]).cumsum(-1) >= 0, _causal(new, new)], -1)


def test_what_is_not_understood_stays_unproved() -> None:
    graph = capture_mask(of_something_computed, queries=4, keys=7)
    assert not graph.prove().is_self_causal(graph.queries, graph.keys)
    _check(capture_mask(of_two_types, queries=4, keys=7), 4, 7, 0)
