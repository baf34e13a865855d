"""Masks that must be proved, and what exactly must be proved of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from adakv_compile.passes.masks import MaskKind, MaskProof, MaskProver, prove_mask
from adakv_compile.symbolic.evaluate import evaluate_proof
from tests.passes.builders import (
    LOWEST,
    WINDOW,
    causal,
    chunks,
    columns,
    filled_below,
    inverted_padding,
    llama,
    old_llama,
    padded,
    padded_chunks,
    prefix,
    rows,
    tril_slice,
    with_window,
)
from tests.symbolic.captured import BATCH, MaskFunction, MaskGraph, capture_mask, capture_masks, visible_in


@dataclass(frozen=True)
class Case:
    """A mask and its meaning; ``self_causal`` is expected to equal ``kind`` being one of the causal kinds."""

    make: MaskFunction
    kind: MaskKind
    padding: tuple[str, Any] | None = None
    window: int | None = None
    additive: bool = False


# Symbolic capture is ten times slower, so it is done where sizes matter: slices, triangles, gathers, windows.
SYMBOLIC = frozenset(
    {
        "always-true",
        "causal",
        "gathered-twice",
        "filled-below",
        "inverted-padding",
        "last-rows",
        "llama",
        "old-llama",
        "prefix",
        "tril-diagonal",
        "tril-slice",
        "view",
        "window-padding",
        "window-triu",
    }
)


def case(
    name: str, make: MaskFunction, kind: MaskKind = MaskKind.CAUSAL, *, square: bool = False, **facts: Any
) -> list[Any]:
    """Return a case as a prefill and, unless it is square by nature, with a past; with static and symbolic sizes."""
    shapes = [((5, 5), False)] if square else [((5, 5), False), ((4, 7), False)]
    if name in SYMBOLIC:
        shapes += [(shape, True) for shape, _ in shapes]
    return [
        pytest.param(
            Case(make, kind, **facts), shape, dynamic, id=f"{name}-{shape[0]}x{shape[1]}{'-dynamic' * dynamic}"
        )
        for shape, dynamic in shapes
    ]


REAL = ("ne", 0)
SLIDING = MaskKind.SLIDING_WINDOW

CASES = [
    *case("causal", causal),
    *case("greater-or-equal", lambda x, k, p: rows(x, k) >= columns(k)),
    *case("not-greater", lambda x, k, p: ~(columns(k) > rows(x, k))),
    *case("less-than-next", lambda x, k, p: columns(k) < rows(x, k) + 1),
    *case("difference", lambda x, k, p: rows(x, k) - columns(k) >= 0),
    *case("negative-difference", lambda x, k, p: -(columns(k) - rows(x, k)) > -1),
    *case("twice", lambda x, k, p: causal(x, k, p) & causal(x, k, p)),
    *case("tighter-of-two", lambda x, k, p: causal(x, k, p) & (columns(k) <= rows(x, k) + 2)),
    *case("with-true", lambda x, k, p: causal(x, k, p) & torch.ones((), dtype=torch.bool)),
    *case("with-false", lambda x, k, p: causal(x, k, p) | torch.zeros(1, 1, dtype=torch.bool)),
    *case("always-true", lambda x, k, p: causal(x, k, p) & (columns(k) >= 0) & (rows(x, k) >= 0)),
    *case("double-negation", lambda x, k, p: torch.logical_not(~causal(x, k, p))),
    *case("de-morgan", lambda x, k, p: ~(~causal(x, k, p) | (columns(k) < 0))),
    *case("as-int", lambda x, k, p: causal(x, k, p).long() == 1),
    *case("as-float", lambda x, k, p: causal(x, k, p).to(torch.float16).bool()),
    *case("product", lambda x, k, p: causal(x, k, p) * torch.ones(1, 1, dtype=torch.bool)),
    *case("exclusive-or", lambda x, k, p: (columns(k) > rows(x, k)) ^ torch.ones(1, 1, dtype=torch.bool)),
    *case("four-dimensions", lambda x, k, p: causal(x, k, p)[None, None].expand(BATCH, 3, -1, -1)[:, :1]),
    *case("view", lambda x, k, p: causal(x, k, p).view(1, 1, x.shape[1], k.shape[1])),
    *case("transposed", lambda x, k, p: (columns(k).t() <= rows(x, k).t()).transpose(-1, -2)),
    *case("permuted", lambda x, k, p: (columns(k).t() <= rows(x, k).t())[None].permute(0, 2, 1)),
    *case("index-select", lambda x, k, p: causal(k, k, p).index_select(0, rows(x, k)[:, 0])),
    *case("gathered", lambda x, k, p: causal(k, k, p)[rows(x, k)[:, 0]]),
    *case("gathered-twice", lambda x, k, p: torch.ones(64, 64, dtype=torch.bool).tril()[rows(x, k), columns(k)]),
    *case("last-rows", lambda x, k, p: causal(k, k, p)[-x.shape[1] :], square=True),
    *case("tril", lambda x, k, p: torch.ones_like(k[0].expand(x.shape[1], -1)).tril().bool(), square=True),
    *case("tril-diagonal", lambda x, k, p: torch.ones(x.shape[1], k.shape[1]).tril(k.shape[1] - x.shape[1]) == 1),
    *case(
        "not-triu",
        lambda x, k, p: ~torch.ones(x.shape[1], k.shape[1], dtype=torch.bool).triu(k.shape[1] - x.shape[1] + 1),
    ),
    *case("tril-slice", tril_slice),
    *case(
        "absolute", lambda x, k, p: (columns(k) - rows(x, k)).abs() <= columns(k) - columns(k) + 0, SLIDING, window=1
    ),
    *case("diagonal", lambda x, k, p: columns(k) == rows(x, k), SLIDING, window=1),
    *case("window", with_window, SLIDING, window=WINDOW),
    *case(
        "window-difference",
        lambda x, k, p: causal(x, k, p) & (rows(x, k) - columns(k) < WINDOW),
        SLIDING,
        window=WINDOW,
    ),
    *case(
        "window-triu",
        lambda x, k, p: causal(k, k, p).triu(1 - WINDOW)[k.shape[1] - x.shape[1] :],
        SLIDING,
        window=WINDOW,
    ),
    *case(
        "window-of-two", lambda x, k, p: with_window(x, k, p) & (columns(k) > rows(x, k) - 5), SLIDING, window=WINDOW
    ),
    *case(
        "window-padding",
        lambda x, k, p: with_window(x, k, p) & p.bool()[:, None, None],
        SLIDING,
        window=WINDOW,
        padding=REAL,
    ),
    *case(
        "window-additive",
        lambda x, k, p: torch.where(with_window(x, k, p), 0.0, -torch.inf),
        SLIDING,
        window=WINDOW,
        additive=True,
    ),
    *case("llama", llama, padding=REAL),
    *case("bool-padding", lambda x, k, p: padded(x, k, p, p.to(torch.bool)), padding=REAL),
    *case("padding-equal-one", lambda x, k, p: padded(x, k, p, p == 1), padding=("eq", 1)),
    *case("padding-positive", lambda x, k, p: padded(x, k, p, p > 0), padding=("ge", 1)),
    *case("padding-not-zero", lambda x, k, p: padded(x, k, p, ~(p == 0)), padding=REAL),
    *case("padding-twice", lambda x, k, p: padded(x, k, p, p.bool()) & p.bool()[:, None, None], padding=REAL),
    *case(
        "padding-of-half",
        lambda x, k, p: padded(x, k, p, p.to(torch.float16).to(torch.float32) != 0),
        padding=("ne", 0.0),
    ),
    *case(
        "padding-from-the-end",
        lambda x, k, p: padded(x, k, p, p.bool()[:, torch.arange(k.shape[1]) - k.shape[1]]),
        padding=("eq", True),
    ),
    *case(
        "only-padding",
        lambda x, k, p: p.bool()[:, None, None].expand(-1, 1, x.shape[1], -1),
        MaskKind.FULL,
        padding=REAL,
    ),
    *case("only-true", lambda x, k, p: torch.ones(1, 1, 1, 1, dtype=torch.bool), MaskKind.FULL),
    *case("additive-zero", lambda x, k, p: torch.zeros(x.shape[1], k.shape[1]), MaskKind.FULL, additive=True),
    *case("old-llama", old_llama, padding=REAL, additive=True),
    *case("inverted-padding", inverted_padding, padding=REAL, additive=True),
    *case("where-inf", lambda x, k, p: torch.where(causal(x, k, p), 0.0, -torch.inf), additive=True),
    *case(
        "where-tensors",
        lambda x, k, p: torch.where(causal(x, k, p), torch.tensor(0.0), torch.tensor(LOWEST)),
        additive=True,
    ),
    *case(
        "masked-fill",
        lambda x, k, p: torch.zeros(x.shape[1], k.shape[1]).masked_fill(~causal(x, k, p), LOWEST),
        additive=True,
    ),
    *case(
        "half", lambda x, k, p: torch.where(causal(x, k, p), 0.0, torch.finfo(torch.float16).min).half(), additive=True
    ),
    *case("bfloat", lambda x, k, p: torch.where(causal(x, k, p), 0.0, LOWEST).to(torch.bfloat16), additive=True),
    *case(
        "triu-full",
        lambda x, k, p: torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1),
        square=True,
        additive=True,
    ),
    *case("filled-below", filled_below, square=True, additive=True),
    *case("one-minus", lambda x, k, p: (1.0 - causal(x, k, p).float()) * LOWEST, additive=True),
    *case(
        "sum-of-two",
        lambda x, k, p: torch.where(causal(x, k, p), 0.0, LOWEST) + torch.where(with_window(x, k, p), 0.0, LOWEST),
        SLIDING,
        window=WINDOW,
        additive=True,
    ),
    *case(
        "minimum",
        lambda x, k, p: torch.minimum(torch.where(causal(x, k, p), 0.0, LOWEST), torch.zeros(1, 1)),
        additive=True,
    ),
    *case("chunks", chunks, MaskKind.CHUNKED),
    *case("padded-chunks", padded_chunks, MaskKind.CHUNKED),
    *case("prefix", prefix, MaskKind.PREFIX),
    *case("columns", lambda x, k, p: columns(k) < 2, MaskKind.PREFIX),
]


def check_everywhere(proof: MaskProof, graph: MaskGraph, shape: tuple[int, int], dynamic: bool) -> None:
    """Compare the proof with the mask that PyTorch computes."""
    new, total = shape
    sizes = [shape, *(((2, 2), (9, 9)) if new == total else ((2, 3), (3, 11)))] if dynamic else [shape]
    for seed, (queries, keys) in enumerate(sizes):
        run = graph.run(queries, keys, seed)
        proved = evaluate_proof(proof, run.shape, run.values, run.symbols)
        assert torch.equal(proved, visible_in(run.mask, run.shape))


@cache
def captured_cases(shape: tuple[int, int], dynamic: bool) -> dict[Case, MaskGraph]:
    """Capture all cases of a shape in one graph."""
    cases = [case for case, *same in (param.values for param in CASES) if tuple(same) == (shape, dynamic)]
    graphs = capture_masks([case.make for case in cases], queries=shape[0], keys=shape[1], dynamic=dynamic)
    return dict(zip(cases, graphs, strict=True))


@pytest.mark.parametrize(("expected", "shape", "dynamic"), CASES)
def test_is_proved(expected: Case, shape: tuple[int, int], dynamic: bool) -> None:
    graph = captured_cases(shape, dynamic)[expected]
    proof = graph.prove()
    assert proof.kind is expected.kind, proof.reason
    assert proof.window == expected.window
    assert proof.additive is expected.additive
    assert (None if proof.padding is None else (proof.padding.relation, proof.padding.value)) == expected.padding
    causal_kind = expected.kind in (MaskKind.CAUSAL, MaskKind.SLIDING_WINDOW)
    assert proof.is_self_causal(graph.queries, graph.keys) is causal_kind
    assert proof.is_causal_in_chunks(graph.queries, graph.keys) is (expected.kind is MaskKind.CHUNKED)
    assert (proof.why_not_self_causal(graph.queries, graph.keys) is None) is causal_kind
    check_everywhere(proof, graph, shape, dynamic)


@pytest.mark.parametrize("make", [causal, llama, with_window, old_llama, tril_slice, prefix, chunks])
def test_a_single_query(make: MaskFunction) -> None:
    """A decode step: the query's dimension is gone from the expressions, and the meaning must stay."""
    graph = capture_mask(make, queries=1, keys=7)
    proof = graph.prove()
    assert proof.proved, proof.reason
    check_everywhere(proof, graph, (1, 7), dynamic=False)


@pytest.mark.parametrize("make", [causal, llama, with_window])
def test_a_single_query_is_self_causal(make: MaskFunction) -> None:
    graph = capture_mask(make, queries=1, keys=7)
    assert graph.prove().is_self_causal(1, 7)


def test_a_single_token() -> None:
    graph = capture_mask(llama, queries=1, keys=1)
    proof = graph.prove()
    assert proof.is_self_causal(1, 1)
    check_everywhere(proof, graph, (1, 1), dynamic=False)


def test_columns_that_start_later() -> None:
    """A sliding-window cache that dropped its oldest entries: the mask speaks of positions, the proof of columns."""

    def mask(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
        q, kv = (torch.arange(x.shape[1]) + 20)[:, None], (torch.arange(4) + 17)[None, :]
        padding = torch.nn.functional.pad(p, (0, 40)).bool()
        return (kv <= q) & (kv > q - 4) & padding[:, 17:21][:, None, None, :]

    graph = capture_mask(mask, queries=1, keys=4)
    proof = graph.prove()
    assert (proof.kind, proof.offset, proof.window) == (MaskKind.SLIDING_WINDOW, 3, 4)
    assert proof.padding is not None
    assert proof.padding.column_offset == 17
    assert proof.is_self_causal(1, 4)
    check_everywhere(proof, graph, (1, 4), dynamic=False)


def test_padding_is_found_in_the_graph() -> None:
    graph = capture_mask(llama)
    padding = graph.prove().padding
    assert padding is not None
    assert padding.holder is not None
    run = graph.run(4, 7)
    held, source = run.values[padding.holder.name], run.values[padding.node.name]
    assert torch.equal(held.expand(BATCH, 1, 1, 7)[:, 0, 0], source != 0)


def test_a_wider_value_does_not_hold_the_padding() -> None:
    """What is sliced has the same elements at the same places, and more of them."""

    def mask(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
        wide = torch.nn.functional.pad(p, (0, 9)).bool()[:, None, None]
        tall = wide.expand(-1, 1, 5, -1)
        return causal(x, k, p) & tall[:, :, :1, : k.shape[1]]

    graph = capture_mask(mask)
    padding = graph.prove().padding
    assert padding is not None
    assert padding.holder is not None
    assert tuple(padding.holder.meta["val"].shape) == (BATCH, 1, 1, 7)


def test_inverted_padding_says_so() -> None:
    proof = capture_mask(lambda x, k, p: causal(x, k, p) & (p == 0)[:, None, None]).prove()
    assert proof.padding is not None
    assert (proof.padding.relation, proof.padding.value) == ("eq", 0)
    assert proof.padding.is_inverted


def test_no_mask() -> None:
    proof = prove_mask(None, is_causal=False, q_len=4, kv_len=7)
    assert proof.kind is MaskKind.FULL
    assert not proof.is_self_causal(4, 7)
    assert proof.is_self_causal(1, 7)  # the only query sees everything: what a causal mask would show it


@pytest.mark.parametrize(("queries", "keys", "expected"), [(5, 5, True), (4, 7, False), (1, 7, False), (1, 1, True)])
def test_the_operators_own_flag_is_aligned_at_the_first_key(queries: int, keys: int, expected: bool) -> None:
    proof = prove_mask(None, is_causal=True, q_len=queries, kv_len=keys)
    assert (proof.kind, proof.offset) == (MaskKind.CAUSAL, 0)
    assert proof.is_self_causal(queries, keys) is expected
    reference = torch.ones(queries, keys, dtype=torch.bool).tril()  # as PyTorch documents the flag
    assert torch.equal(evaluate_proof(proof, (1, queries, keys))[0, 0], reference)


def test_the_operators_own_flag_with_symbolic_sizes() -> None:
    square = capture_mask(causal, queries=5, keys=5, dynamic=True)
    assert prove_mask(None, is_causal=True, q_len=square.queries, kv_len=square.keys).is_self_causal(
        square.queries, square.keys
    )
    past = capture_mask(causal, queries=4, keys=7, dynamic=True)
    assert not prove_mask(None, is_causal=True, q_len=past.queries, kv_len=past.keys).is_self_causal(
        past.queries, past.keys
    )


def test_an_offset_from_a_tensor_is_kept_as_an_expression() -> None:
    """A static cache counts in a tensor: causal, but nobody knows where from."""

    def mask(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
        seen = p.sum()
        return columns(k) <= (torch.arange(x.shape[1]) + seen)[:, None]

    graph = capture_mask(mask)
    proof = graph.prove()
    assert proof.kind is MaskKind.CAUSAL
    assert not isinstance(proof.offset, sympy.Expr)
    assert not proof.is_self_causal(4, 7)
    assert "read from a tensor" in (proof.why_not_self_causal(4, 7) or "")
    check_everywhere(proof, graph, (4, 7), dynamic=False)


def test_layers_share_one_reading() -> None:
    graph = capture_mask(llama)
    prover = MaskProver(graph.module.graph)
    proofs = [prover.prove(graph.mask, is_causal=False, q_len=4, kv_len=7) for _ in range(2)]
    assert proofs[0] is proofs[1]


def test_a_deep_graph_is_read_without_recursion() -> None:
    graph = capture_mask(causal)
    node, value = graph.mask, graph.mask.meta["val"]
    for _ in range(3000):
        with graph.module.graph.inserting_after(node):
            node = graph.module.graph.call_function(torch.ops.aten.bitwise_not.default, (node,))
        node.meta["val"] = value
    assert prove_mask(node, is_causal=False, q_len=4, kv_len=7).is_self_causal(4, 7)


def test_the_proof_adds_no_guards() -> None:
    graph = capture_mask(with_window, dynamic=True)
    assert isinstance(graph.keys, torch.SymInt)
    guards = len(graph.keys.node.shape_env.guards)
    proof = graph.prove()
    proof.is_self_causal(graph.queries, graph.keys)
    proof.is_self_causal(graph.keys, graph.queries)
    assert len(graph.keys.node.shape_env.guards) == guards


def test_a_proof_prints_as_one_line() -> None:
    graph = capture_mask(lambda x, k, p: with_window(x, k, p) & p.bool()[:, None, None])
    proof = graph.prove()
    assert str(proof).startswith("sliding window, offset 3, window 3, padding ")
    assert any("causal" in step for step in proof.steps)
