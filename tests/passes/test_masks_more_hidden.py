"""Masks that are causal and hide more than that, nobody can read what: the causal part is proved, the rest is said."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from adakv_compile.passes.masks import MaskKind
from adakv_compile.symbolic.evaluate import evaluate
from tests.passes.builders import causal, columns, rows
from tests.passes.test_masks_refused import each_batch, real
from tests.symbolic.captured import BATCH, MaskFunction, MaskGraph, capture_mask, capture_masks

QUERIES, KEYS = 5, 5


def first(p: Tensor) -> Tensor:
    """The first token behind the padding of each row."""
    return (p.cumsum(-1) == 0).sum(-1)[:, None, None, None]


CASES: dict[str, MaskFunction] = {
    "padding-by-query": lambda x, k, p: causal(x, k, p) & p.bool()[:, None, :, None],
    "padding-gathered-by-query": lambda x, k, p: causal(x, k, p) & p.bool()[each_batch(p), rows(x, k)],
    "padding-of-both": lambda x, k, p: causal(x, k, p) & real(p) & p.bool()[:, None, :, None],
    "packed-sequences": lambda x, k, p: causal(x, k, p) & (p[:, None, :, None] == p[:, None, None, :]),
    "chunks-from-elsewhere": lambda x, k, p: causal(x, k, p) & ((columns(k) - first(p)) // 2 == rows(x, k) // 2),
    "chunks-of-two-rows": lambda x, k, p: (
        causal(x, k, p) & ((columns(k) - first(p)) // 2 == (rows(x, k) - first(p).flip(0)) // 2)
    ),
    "random": lambda x, k, p: causal(x, k, p) & (torch.rand(QUERIES, KEYS) > 0.5),
    "window-from-a-tensor": lambda x, k, p: causal(x, k, p) & (columns(k) > rows(x, k) - p.sum()),
    "numbers-that-wrap": lambda x, k, p: causal(x, k, p) & (p.flip(-1) << 32).int().bool()[:, None, :, None],
}


@cache
def captured_cases() -> dict[str, MaskGraph]:
    graphs = capture_masks(list(CASES.values()), queries=QUERIES, keys=KEYS)
    return dict(zip(CASES, graphs, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_causal_part_is_proved_and_the_rest_is_said(name: str) -> None:
    proof = captured_cases()[name].prove()
    assert proof.kind is MaskKind.CAUSAL
    assert proof.is_self_causal(QUERIES, KEYS)
    assert proof.biased
    assert (proof.padding is not None) is (name == "padding-of-both")


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_to_be_hidden_is(name: str) -> None:
    graph = captured_cases()[name]
    predicate = graph.prove().predicate
    assert predicate is not None
    for seed in range(4):
        run = graph.run(QUERIES, KEYS, seed)
        shape = (BATCH, 1, QUERIES, KEYS)
        may_be_seen = evaluate(predicate, shape, run.values, run.symbols).expand(shape)
        assert not (run.mask.expand(shape) & ~may_be_seen).any()


def test_nothing_is_proved_of_the_future() -> None:
    graph = capture_mask(lambda x, k, p: p.bool()[:, None, :, None].expand(-1, 1, -1, KEYS))
    assert graph.prove().kind is MaskKind.UNPROVEN
