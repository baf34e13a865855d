"""Random programs: what the reader and the prover say of a mask must be what PyTorch computes."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from adakv_compile.symbolic.evaluate import evaluate, evaluate_proof
from tests.symbolic.captured import BATCH, MaskFunction, MaskGraph, capture_masks, visible_in

LOWEST = torch.finfo(torch.float32).min
PROGRAMS = 40
SHAPES = [(5, 5, False), (4, 7, False), (1, 6, False), (4, 7, True)]


class Programs:
    """Makes random mask functions; each always computes the same thing."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def pick(self, *makers: Callable[[], MaskFunction]) -> MaskFunction:
        return self.random.choice(makers)()

    def position(self) -> MaskFunction:
        """An integer tensor that broadcasts to ``[B, 1, T, L]``."""
        number = self.random.randrange(-3, 4)
        return self.pick(
            lambda: lambda x, k, p: torch.arange(k.shape[1]),
            lambda: lambda x, k, p: torch.arange(k.shape[1]) + number,
            lambda: lambda x, k, p: torch.arange(number, k.shape[1] + number)[None, None, None, :],
            lambda: lambda x, k, p: (torch.arange(x.shape[1]) + (k.shape[1] - x.shape[1]))[:, None],
            lambda: lambda x, k, p: torch.arange(x.shape[1]).view(-1, 1) - number,
            lambda: lambda x, k, p: torch.arange(k.shape[1])[k.shape[1] - x.shape[1] :].unsqueeze(-1),
            lambda: lambda x, k, p: p[:, None, None, :],
            lambda: lambda x, k, p: torch.tensor(number),
        )

    def integer(self) -> MaskFunction:
        first, second, factor = self.position(), self.position(), self.random.randrange(1, 4)
        condition = self.comparison()
        return self.pick(
            lambda: first,
            lambda: lambda x, k, p: first(x, k, p) - second(x, k, p),
            lambda: lambda x, k, p: first(x, k, p) // factor,
            lambda: lambda x, k, p: first(x, k, p) % factor,
            lambda: lambda x, k, p: (first(x, k, p) - second(x, k, p)).abs(),
            lambda: lambda x, k, p: factor * first(x, k, p) + 1,
            lambda: lambda x, k, p: torch.where(condition(x, k, p), first(x, k, p), second(x, k, p)),
            lambda: lambda x, k, p: torch.maximum(first(x, k, p), second(x, k, p)),
            lambda: lambda x, k, p: condition(x, k, p).long() * factor,
        )

    def comparison(self) -> MaskFunction:
        left, right = self.position(), self.position()
        operator = self.random.choice([torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne])
        return lambda x, k, p: operator(left(x, k, p), right(x, k, p))

    def known(self) -> MaskFunction:
        """Forms that are masks in real programs."""
        diagonal = self.random.randrange(-2, 3)
        window = self.random.randrange(1, 5)
        return self.pick(
            lambda: lambda x, k, p: torch.ones(x.shape[1], k.shape[1], dtype=torch.bool).tril(diagonal),
            lambda: lambda x, k, p: ~torch.ones(x.shape[1], k.shape[1], dtype=torch.bool).triu(diagonal),
            lambda: lambda x, k, p: torch.ones(9, 9, dtype=torch.bool).tril(diagonal)[: x.shape[1], : k.shape[1]],
            lambda: lambda x, k, p: torch.arange(k.shape[1]) <= torch.arange(x.shape[1])[:, None] + diagonal,
            lambda: lambda x, k, p: torch.arange(x.shape[1])[:, None] - torch.arange(k.shape[1]) < window,
            lambda: lambda x, k, p: p.bool()[:, None, None],
            lambda: (
                lambda x, k, p: p.bool()[
                    torch.arange(p.shape[0])[:, None, None, None], torch.arange(k.shape[1])[None, None, None]
                ]
            ),
            lambda: lambda x, k, p: torch.ones((), dtype=torch.bool),
        )

    def predicate(self, depth: int) -> MaskFunction:
        if depth == 0:
            left, right = self.integer(), self.integer()
            operator = self.random.choice([torch.le, torch.lt, torch.ge, torch.gt, torch.eq])
            return self.pick(
                self.known, self.known, self.comparison, lambda: lambda x, k, p: operator(left(x, k, p), right(x, k, p))
            )
        first, second, third = (self.predicate(depth - 1) for _ in range(3))
        return self.pick(
            lambda: lambda x, k, p: first(x, k, p) & second(x, k, p),
            lambda: lambda x, k, p: torch.logical_and(first(x, k, p), second(x, k, p)),
            lambda: lambda x, k, p: first(x, k, p) * second(x, k, p),
            lambda: lambda x, k, p: first(x, k, p) | second(x, k, p),
            lambda: lambda x, k, p: first(x, k, p) ^ second(x, k, p),
            lambda: lambda x, k, p: ~first(x, k, p),
            lambda: lambda x, k, p: torch.where(first(x, k, p), second(x, k, p), third(x, k, p)),
            lambda: lambda x, k, p: first(x, k, p).to(torch.float16).bool(),
            lambda: lambda x, k, p: (first(x, k, p).int() + second(x, k, p).long()) == 2,
        )

    def mask(self) -> MaskFunction:
        first, second = (self.predicate(self.random.randrange(3)) for _ in range(2))
        conjunction = self.random.random() < 0.5
        predicate: MaskFunction = (lambda x, k, p: first(x, k, p) & second(x, k, p)) if conjunction else first
        lowest = self.random.choice([LOWEST, -torch.inf])
        made = self.pick(
            lambda: predicate,
            lambda: predicate,
            lambda: lambda x, k, p: torch.where(predicate(x, k, p), 0.0, lowest),
            lambda: (
                lambda x, k, p: torch.zeros(x.shape[1], k.shape[1]).masked_fill(
                    ~_two_dimensional(predicate(x, k, p)), lowest
                )
            ),
            lambda: lambda x, k, p: (1.0 - predicate(x, k, p).float()) * LOWEST,
            lambda: (
                lambda x, k, p: torch.where(first(x, k, p), 0.0, lowest) + torch.where(second(x, k, p), 0.0, LOWEST)
            ),
        )
        return lambda x, k, p: made(x, k, p).expand(BATCH, 1, x.shape[1], k.shape[1])


def _two_dimensional(predicate: Tensor) -> Tensor:
    return predicate[0, 0] if predicate.dim() == 4 else predicate


@cache
def captured(shape: tuple[int, int, bool]) -> list[MaskGraph]:
    programs = Programs(sum(shape))
    functions = [programs.mask() for _ in range(PROGRAMS // 2 if shape[2] else PROGRAMS)]
    return capture_masks(functions, queries=shape[0], keys=shape[1], dynamic=shape[2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_read_and_proved_is_what_is_computed(shape: tuple[int, int, bool]) -> None:
    queries, keys, dynamic = shape
    sizes = [(queries, keys), (2, 3), (3, 8)] if dynamic else [(queries, keys)] * 3
    proved = 0
    for graph in captured(shape):
        proof = graph.prove()
        proved += proof.proved
        for seed, (new, total) in enumerate(sizes):
            run = graph.run(new, total, seed)
            expected = visible_in(run.mask, run.shape)
            dense = (BATCH, 1, new, total)
            if proof.predicate is not None:
                read = evaluate(proof.predicate, dense, run.values, run.symbols)
                assert torch.equal(read.expand(dense), expected)
            if proof.proved:
                assert torch.equal(evaluate_proof(proof, run.shape, run.values, run.symbols).expand(dense), expected)
    assert proved >= len(captured(shape)) // 12  # else the comparison says little


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_self_causal_is_never_claimed_wrongly(shape: tuple[int, int, bool]) -> None:
    """Whatever is called self-causal shows every query its own key, and nothing newer, but for padding."""
    queries, keys, _ = shape
    for graph in captured(shape):
        proof = graph.prove()
        if proof.is_self_causal(graph.queries, graph.keys):
            run = graph.run(queries, keys, 0)
            visible = visible_in(run.mask, run.shape)[:, 0].any(0)
            later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
            assert not (visible & later).any()
