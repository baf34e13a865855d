"""Masks that look causal and are not, or whose meaning nobody can know: each is refused, or told for what it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from adakv_compile.passes.masks import MaskKind, prove_mask
from adakv_compile.symbolic.evaluate import evaluate, evaluate_proof
from tests.passes.builders import LOWEST, WINDOW, causal, columns, rows, with_window
from tests.symbolic.captured import BATCH, MaskFunction, MaskGraph, capture_mask, capture_masks, visible_in

QUERIES, KEYS = 5, 5
FULL, CAUSAL, SLIDING = MaskKind.FULL, MaskKind.CAUSAL, MaskKind.SLIDING_WINDOW
PREFIX, CHUNKED, UNPROVEN = MaskKind.PREFIX, MaskKind.CHUNKED, MaskKind.UNPROVEN


@dataclass(frozen=True)
class Refused:
    """A mask, what it is, and a word of the reason why it isn't self-causal."""

    make: MaskFunction
    kind: MaskKind
    reason: str


def real(p: Tensor) -> Tensor:
    return p.bool()[:, None, None]


def float_of(condition: Tensor, hidden: float = LOWEST) -> Tensor:
    return torch.where(condition, 0.0, hidden)


def each_batch(p: Tensor) -> Tensor:
    return torch.arange(p.shape[0])[:, None, None, None]


CASES: dict[str, Refused] = {
    # One key too many or too few.
    "strict": Refused(lambda x, k, p: columns(k) < rows(x, k), CAUSAL, "-1"),
    "one-too-many": Refused(lambda x, k, p: columns(k) <= rows(x, k) + 1, CAUSAL, "1"),
    "not-at-least": Refused(lambda x, k, p: ~(columns(k) >= rows(x, k)), CAUSAL, "-1"),
    "less-than-two-more": Refused(lambda x, k, p: columns(k) < rows(x, k) + 2, CAUSAL, "1"),
    "tril-above": Refused(lambda x, k, p: torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(1), CAUSAL, "1"),
    "tril-below": Refused(lambda x, k, p: torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(-1), CAUSAL, "-1"),
    "triu-of-lowest": Refused(lambda x, k, p: torch.full((QUERIES, KEYS), LOWEST).triu(2), CAUSAL, "1"),
    "triu-hides-itself": Refused(lambda x, k, p: torch.full((QUERIES, KEYS), LOWEST).triu(), CAUSAL, "-1"),
    "far-ahead": Refused(lambda x, k, p: columns(k) <= rows(x, k) + 100, CAUSAL, "100"),
    "window-one-too-many": Refused(lambda x, k, p: (rows(x, k) + 1 - columns(k)).abs() <= 1, SLIDING, "2"),
    # Other directions.
    "everything": Refused(lambda x, k, p: torch.ones(QUERIES, KEYS, dtype=torch.bool), FULL, "full"),
    "no-condition": Refused(lambda x, k, p: (columns(k) >= 0) & (rows(x, k) >= 0), FULL, "full"),
    "anti-causal": Refused(lambda x, k, p: columns(k) >= rows(x, k), UNPROVEN, "after"),
    "transposed": Refused(lambda x, k, p: causal(x, k, p).t(), UNPROVEN, "after"),
    "inverted": Refused(lambda x, k, p: ~causal(x, k, p), UNPROVEN, "after"),
    "triu": Refused(lambda x, k, p: torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(), UNPROVEN, "after"),
    "swapped-values": Refused(lambda x, k, p: torch.where(causal(x, k, p), LOWEST, 0.0), UNPROVEN, "after"),
    "window-both-sides": Refused(lambda x, k, p: (columns(k) - rows(x, k)).abs() <= 2, SLIDING, "2"),
    "window-alone": Refused(lambda x, k, p: columns(k) > rows(x, k) - WINDOW, UNPROVEN, "after"),
    "outside-a-window": Refused(lambda x, k, p: (columns(k) - rows(x, k)).abs() >= 2, UNPROVEN, "no known form"),
    "off-diagonal": Refused(lambda x, k, p: causal(x, k, p) & (columns(k) != rows(x, k)), UNPROVEN, "no known form"),
    "anti-diagonal": Refused(lambda x, k, p: columns(k) + rows(x, k) <= 4, UNPROVEN, "no known form"),
    "nothing": Refused(lambda x, k, p: causal(x, k, p) & torch.zeros((), dtype=torch.bool), UNPROVEN, "everything"),
    "empty-window": Refused(lambda x, k, p: causal(x, k, p) & (columns(k) > rows(x, k)), UNPROVEN, "empty"),
    # More than a window.
    "prefix": Refused(lambda x, k, p: causal(x, k, p) | (columns(k) < 2), PREFIX, "prefix 2"),
    "prefix-and-window": Refused(lambda x, k, p: with_window(x, k, p) | (columns(k) < 2), UNPROVEN, "no known form"),
    "first-columns": Refused(lambda x, k, p: columns(k) < 3, PREFIX, "prefix 3"),
    "later-columns": Refused(lambda x, k, p: causal(x, k, p) & (columns(k) >= 1), UNPROVEN, "column alone"),
    "later-rows": Refused(lambda x, k, p: causal(x, k, p) & (rows(x, k) >= 1), UNPROVEN, "no known form"),
    "chunks": Refused(lambda x, k, p: causal(x, k, p) & (columns(k) // 2 == rows(x, k) // 2), CHUNKED, "chunk 2"),
    "shifted-chunks": Refused(
        lambda x, k, p: causal(x, k, p) & (columns(k) // 2 == (rows(x, k) + 1) // 2), UNPROVEN, "different positions"
    ),
    "unequal-chunks": Refused(
        lambda x, k, p: causal(x, k, p) & (columns(k) // 2 == rows(x, k) // 3), UNPROVEN, "no known form"
    ),
    "earlier-chunks": Refused(lambda x, k, p: columns(k) // 2 <= rows(x, k) // 2, UNPROVEN, "no known form"),
    "chunks-alone": Refused(lambda x, k, p: columns(k) // 2 == rows(x, k) // 2, UNPROVEN, "after"),
    "dilated": Refused(lambda x, k, p: causal(x, k, p) & ((rows(x, k) - columns(k)) % 2 == 0), UNPROVEN, "remainder"),
    "strided-columns": Refused(lambda x, k, p: causal(x, k, p) & (columns(k) % 2 == 0), UNPROVEN, "remainder"),
    "scaled-columns": Refused(lambda x, k, p: 2 * columns(k) <= rows(x, k), UNPROVEN, "no known form"),
    "reversed-columns": Refused(lambda x, k, p: causal(x, k, p).flip(-1), UNPROVEN, "flip"),
    "rolled": Refused(lambda x, k, p: causal(x, k, p).roll(1, -1), UNPROVEN, "roll"),
    "by-head": Refused(
        lambda x, k, p: causal(x, k, p)[None, None] & (torch.arange(3)[:, None, None] <= columns(k)),
        UNPROVEN,
        "between heads",
    ),
    "by-row-of-the-batch": Refused(lambda x, k, p: columns(k) <= rows(x, k) - each_batch(p), UNPROVEN, "no known form"),
    # Padding that isn't.
    "padding-of-row-zero": Refused(
        lambda x, k, p: causal(x, k, p) & p.bool()[torch.zeros_like(each_batch(p)), columns(k)],
        UNPROVEN,
        "one row of padding",
    ),
    "padding-of-the-next-row": Refused(
        lambda x, k, p: causal(x, k, p) & torch.cat([p, p]).bool()[each_batch(p) + 1, columns(k)],
        UNPROVEN,
        "comparison of one element",
    ),
    "padding-of-a-larger-batch": Refused(
        lambda x, k, p: causal(x, k, p) & torch.cat([p, p]).bool()[each_batch(p), columns(k)],
        UNPROVEN,
        "comparison of one element",
    ),
    "padding-transposed": Refused(
        lambda x, k, p: causal(x, k, p) & p.bool()[:, :2].t()[each_batch(p), columns(k) * 0],
        UNPROVEN,
        "key's column",
    ),
    "padding-by-a-stride": Refused(
        lambda x, k, p: causal(x, k, p) & torch.cat([p, p], 1).bool()[each_batch(p), columns(k) * 2],
        UNPROVEN,
        "reads",
    ),
    "padding-backwards": Refused(
        lambda x, k, p: causal(x, k, p) & p.bool()[each_batch(p), KEYS - 1 - columns(k)], UNPROVEN, "key's column"
    ),
    "padding-or": Refused(lambda x, k, p: causal(x, k, p) | real(p), UNPROVEN, "reads"),
    "padding-exclusive-or": Refused(lambda x, k, p: causal(x, k, p) ^ real(p), UNPROVEN, "reads"),
    "padding-only-where-causal-fails": Refused(
        lambda x, k, p: torch.where(causal(x, k, p), True, real(p)), UNPROVEN, "reads"
    ),
    "two-paddings": Refused(
        lambda x, k, p: causal(x, k, p) & real(p) & (torch.cumsum(p, -1) > 1)[:, None, None],
        UNPROVEN,
        "two different padding",
    ),
    "padding-against-padding": Refused(
        lambda x, k, p: causal(x, k, p) & (p == torch.cumsum(p, -1))[:, None, None], UNPROVEN, "one element"
    ),
    "one-flag": Refused(lambda x, k, p: causal(x, k, p) & (p.sum() > 3), UNPROVEN, "one condition for all keys"),
    "a-flag-for-a-row": Refused(
        lambda x, k, p: causal(x, k, p) & (p.sum(-1) > 3)[:, None, None, None], UNPROVEN, "key's column"
    ),
    # Values nobody knows.
    "an-input": Refused(
        lambda x, k, p: p.bool()[:, None, None].expand(-1, 1, QUERIES, -1) & (x[0] > 0)[:, None],
        UNPROVEN,
        "depends on the query",
    ),
    "a-constant-tensor": Refused(
        lambda x, k, p: torch.tensor([[True] * KEYS] * QUERIES), UNPROVEN, "depends on the query"
    ),
    "offset-of-each-row": Refused(
        lambda x, k, p: columns(k) <= rows(x, k) - (1 - p).sum(-1)[:, None, None, None], UNPROVEN, "reads"
    ),
    "offset-of-each-query": Refused(
        lambda x, k, p: columns(k) <= (torch.cumsum(p[0], 0) - 1)[:, None], UNPROVEN, "reads"
    ),
    "offset-from-a-tensor": Refused(lambda x, k, p: columns(k) <= rows(x, k) + p.sum() - p.sum(), CAUSAL, "tensor"),
    "prefix-from-a-tensor": Refused(
        lambda x, k, p: causal(x, k, p) | (columns(k) < p.sum()), UNPROVEN, "prefix is read"
    ),
    "unless-fully-masked": Refused(
        lambda x, k, p: (m := causal(x, k, p) & real(p)) | ~m.any(-1, keepdim=True), UNPROVEN, "any"
    ),
    # Numbers that a softmax would see.
    "a-float-bias": Refused(lambda x, k, p: torch.rand(QUERIES, KEYS), UNPROVEN, "rand"),
    "minus-one": Refused(lambda x, k, p: float_of(causal(x, k, p), -1.0), UNPROVEN, "-1"),
    "plus-infinity": Refused(lambda x, k, p: float_of(causal(x, k, p), torch.inf), UNPROVEN, "inf"),
    "not-a-number": Refused(lambda x, k, p: (1 - causal(x, k, p).float()) * -torch.inf, UNPROVEN, "mul"),
    "lowest-minus-lowest": Refused(lambda x, k, p: float_of(causal(x, k, p)) - float_of(causal(x, k, p)), FULL, "full"),
    "a-mask-of-numbers": Refused(lambda x, k, p: causal(x, k, p).float(), UNPROVEN, "adds 1"),
    "a-mask-of-integers": Refused(lambda x, k, p: causal(x, k, p).long(), UNPROVEN, "torch.int64"),
    "a-tiny-number": Refused(
        lambda x, k, p: torch.where(causal(x, k, p), 1.0, 1e-30).half().bool(), UNPROVEN, "_to_copy"
    ),
    "many-absolute-values": Refused(
        lambda x, k, p: sum((columns(k) - i * rows(x, k)).abs() for i in range(2, 14)) <= 90, UNPROVEN, "no known form"
    ),
    "bytes-that-wrap": Refused(
        lambda x, k, p: (columns(k) * 100).to(torch.uint8) <= rows(x, k) * 100, UNPROVEN, "aten.le"
    ),
    # A shape that isn't the attention's.
    "too-many-columns": Refused(lambda x, k, p: torch.ones(QUERIES, KEYS + 1, dtype=torch.bool), UNPROVEN, "shape"),
    "five-dimensions": Refused(lambda x, k, p: causal(x, k, p).expand(2, 2, 2, -1, -1), UNPROVEN, "shape"),
}


@cache
def captured_cases() -> dict[str, MaskGraph]:
    graphs = capture_masks([case.make for case in CASES.values()], queries=QUERIES, keys=KEYS)
    return dict(zip(CASES, graphs, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_is_refused(name: str) -> None:
    case, graph = CASES[name], captured_cases()[name]
    proof = graph.prove()
    assert not proof.is_self_causal(QUERIES, KEYS)
    assert proof.kind is case.kind, proof.reason
    why = proof.why_not_self_causal(QUERIES, KEYS)
    assert case.reason in (why or ""), why
    assert (proof.reason is None) is proof.proved
    if not proof.proved:
        assert proof.node is not None
        assert proof.where is not None


@pytest.mark.parametrize("name", CASES)
def test_what_was_read_is_still_true(name: str) -> None:
    """Of a refused mask, too, everything that was understood must hold."""
    graph = captured_cases()[name]
    proof = graph.prove()
    if proof.predicate is None or name in ("too-many-columns", "five-dimensions"):
        return
    for seed in range(4):
        run = graph.run(QUERIES, KEYS, seed)
        shape = (BATCH, run.mask.shape[-3] if run.mask.dim() > 3 else 1, QUERIES, KEYS)
        visible = run.mask if run.mask.dtype is torch.bool else visible_in(run.mask, run.shape)
        read = evaluate(proof.predicate, shape, run.values, run.symbols)
        assert torch.equal(read.expand(shape), visible.expand(shape))
        if proof.proved:
            assert torch.equal(evaluate_proof(proof, run.shape, run.values).expand(shape), visible.expand(shape))


def test_refusals_outnumber_proofs() -> None:
    from tests.passes import test_masks

    makers: set[Any] = {param.values[0].make for param in test_masks.CASES}
    assert len(CASES) > len(makers)


def test_inverted_padding_is_told_apart() -> None:
    """It is a padding mask, of the other tokens; whoever uses the fact must use its relation."""
    graph = capture_mask(lambda x, k, p: causal(x, k, p) & ~real(p))
    padding = graph.prove().padding
    assert padding is not None
    assert (padding.relation, padding.value) == ("eq", 0)
    assert padding.is_inverted


def test_a_mask_and_the_operators_own_flag() -> None:
    proof = capture_mask(causal).prove(is_causal=True)
    assert proof.kind is UNPROVEN
    assert "is_causal" in (proof.reason or "")


def test_symbolic_sizes_that_are_not_known_to_agree() -> None:
    graph = capture_mask(causal, dynamic=True)
    assert not graph.prove().is_self_causal(graph.keys, graph.keys)
    swapped = prove_mask(graph.mask, is_causal=False, q_len=graph.keys, kv_len=graph.queries)
    assert swapped.kind is UNPROVEN
    assert "shape" in (swapped.reason or "")
