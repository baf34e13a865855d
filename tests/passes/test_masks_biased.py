"""Additive masks that also add other numbers: what they hide is proved, what they add is not, and it is said so."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from adakv_compile.passes.masks import MaskKind
from adakv_compile.symbolic.evaluate import evaluate
from adakv_compile.symbolic.mask import NEGLIGIBLE
from tests.passes.builders import LOWEST, WINDOW, causal, columns, inverted_padding, rows, with_window
from tests.symbolic.captured import BATCH, MaskFunction, MaskGraph, Run, capture_masks

QUERIES, KEYS = 4, 7
HEADS = 3


@dataclass(frozen=True)
class Biased:
    """A mask that is proved self-causal.

    Attributes:
        make: The mask.
        biased: Whether it adds numbers where it shows.
        hidden: The largest number that hides, if there is only that one.
        kind: What is proved.
        padded: Whether padding is part of the proof.
    """

    make: MaskFunction
    biased: bool = True
    hidden: float | None = None
    kind: MaskKind = MaskKind.CAUSAL
    padded: bool = False


def hide(x: Tensor, k: Tensor, p: Tensor, hidden: float = LOWEST) -> Tensor:
    """Return the additive causal mask."""
    return torch.where(causal(x, k, p), 0.0, hidden)


def distance(x: Tensor, k: Tensor) -> Tensor:
    return columns(k) - rows(x, k)


def alibi(x: Tensor, k: Tensor) -> Tensor:
    """Return ALiBi's numbers, ``[1, H, T, L]``."""
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)
    return -distance(x, k).abs()[None, None] * slopes[:, None, None]


def buckets(x: Tensor, k: Tensor) -> Tensor:
    """Return T5's numbers, ``[1, H, T, L]``: looked up by distance."""
    table = torch.tensor([[0.5, -0.25, 1.0], [0.0, 2.0, 0.75], [-1.0, 0.5, 0.25], [1.5, 1.25, -2.0]])
    return table[(-distance(x, k)).clamp(0, 3)].permute(2, 0, 1)[None]


def real(p: Tensor) -> Tensor:
    return p.bool()[:, None, None]


CASES: dict[str, Biased] = {
    "alibi": Biased(lambda x, k, p: alibi(x, k) + hide(x, k, p), hidden=LOWEST),
    "alibi on the right": Biased(lambda x, k, p: hide(x, k, p) + alibi(x, k)),
    "alibi chosen where visible": Biased(lambda x, k, p: torch.where(causal(x, k, p), alibi(x, k), -torch.inf)),
    "alibi filled where hidden": Biased(lambda x, k, p: alibi(x, k).masked_fill(~causal(x, k, p), LOWEST)),
    "alibi and padding": Biased(
        lambda x, k, p: alibi(x, k) + torch.where(causal(x, k, p) & real(p), 0.0, LOWEST), padded=True
    ),
    "alibi in a window": Biased(
        lambda x, k, p: alibi(x, k) + torch.where(with_window(x, k, p), 0.0, LOWEST), kind=MaskKind.SLIDING_WINDOW
    ),
    "buckets": Biased(lambda x, k, p: buckets(x, k) + hide(x, k, p, -1e9), hidden=-1e9),
    "buckets and alibi": Biased(lambda x, k, p: buckets(x, k) + alibi(x, k) + hide(x, k, p)),
    "the distance": Biased(lambda x, k, p: distance(x, k) * 0.125 + hide(x, k, p)),
    "a constant": Biased(lambda x, k, p: torch.where(causal(x, k, p), 0.5, -torch.inf), hidden=-torch.inf),
    "numbers by a padding that may hold any": Biased(
        lambda x, k, p: (1.0 - p[:, None, None].to(torch.float32)) * LOWEST + hide(x, k, p)
    ),
    "alibi in half precision": Biased(lambda x, k, p: (alibi(x, k) + hide(x, k, p, -6e4)).half()),
    "alibi scaled with the mask": Biased(lambda x, k, p: (alibi(x, k) + hide(x, k, p, -8e4)) / 8, hidden=-1e4),
    "alibi scaled twice": Biased(lambda x, k, p: ((alibi(x, k) + hide(x, k, p, -8e4)) / 16) * 2.0, hidden=-1e4),
    "a mask made strong by its factor": Biased(lambda x, k, p: (alibi(x, k) + hide(x, k, p, -200.0)) * 64),
    # Nothing but a mask.
    "a billion": Biased(lambda x, k, p: hide(x, k, p, -1e9), biased=False, hidden=-1e9),
    "the lowest number of half precision": Biased(
        lambda x, k, p: hide(x, k, p, -65504.0), biased=False, hidden=-65504.0
    ),
    "ten thousand": Biased(lambda x, k, p: hide(x, k, p, -1e4), biased=False, hidden=-1e4),
    "a scaled mask": Biased(lambda x, k, p: hide(x, k, p, -1e9) / 8, biased=False, hidden=-1.25e8),
    "a mask with a factor": Biased(lambda x, k, p: hide(x, k, p, -1e9) * 0.5, biased=False, hidden=-5e8),
    "infinity with a factor": Biased(lambda x, k, p: hide(x, k, p, -torch.inf) / 8, biased=False, hidden=-torch.inf),
    "two strengths": Biased(
        lambda x, k, p: hide(x, k, p, -torch.inf) + torch.where(with_window(x, k, p), 0.0, -1e9),
        biased=False,
        hidden=-1e9,
        kind=MaskKind.SLIDING_WINDOW,
    ),
    "inverted padding": Biased(inverted_padding, biased=False, padded=True),
}
SYMBOLIC = ("alibi", "alibi chosen where visible", "buckets", "the distance", "alibi scaled with the mask", "a billion")


@cache
def _captured(dynamic: bool) -> dict[str, MaskGraph]:
    names = SYMBOLIC if dynamic else tuple(CASES)
    graphs = capture_masks([CASES[name].make for name in names], queries=QUERIES, keys=KEYS, dynamic=dynamic)
    return dict(zip(names, graphs, strict=True))


PARAMETERS = [*((name, False) for name in CASES), *((name, True) for name in SYMBOLIC)]


@pytest.mark.parametrize(("name", "dynamic"), PARAMETERS)
def test_what_is_hidden_is_proved_beside_the_numbers(name: str, dynamic: bool) -> None:
    case, graph = CASES[name], _captured(dynamic)[name]
    proof = graph.prove()
    assert proof.is_self_causal(graph.queries, graph.keys), proof.reason
    assert proof.kind is case.kind
    assert proof.window == (WINDOW if case.kind is MaskKind.SLIDING_WINDOW else None)
    assert proof.additive
    assert proof.biased is case.biased
    assert (proof.padding is not None) is case.padded
    if case.hidden is not None:
        assert proof.masked_value == case.hidden
    assert proof.masked_value is not None
    assert proof.masked_value <= NEGLIGIBLE


def _seen(graph: MaskGraph, run: Run) -> Tensor:
    """Return where the predicate of a proof lets keys be seen, ``[B, H or 1, q, kv]``."""
    predicate = graph.prove().predicate
    assert predicate is not None
    heads = run.mask.shape[1] if run.mask.dim() == 4 else 1
    shape = (BATCH, heads, *run.shape[1:])
    return evaluate(predicate, shape, run.values, run.symbols).expand(shape)


@pytest.mark.parametrize(("name", "dynamic"), PARAMETERS)
def test_what_is_said_to_be_hidden_is_hidden(name: str, dynamic: bool) -> None:
    graph = _captured(dynamic)[name]
    for seed, (new, total) in enumerate([(QUERIES, KEYS), (1, 9), (3, 12)] if dynamic else [(QUERIES, KEYS)] * 3):
        run = graph.run(new, total, seed)
        seen = _seen(graph, run)
        added = run.mask.expand(seen.shape)
        assert (added[~seen] <= NEGLIGIBLE).all()
        if not CASES[name].biased:
            assert (added[seen] == 0).all()
            masked = graph.prove().masked_value
            assert masked is not None
            assert (added[~seen] <= masked).all()


REFUSED: dict[str, MaskFunction] = {
    # Nothing that is hidden for certain.
    "alibi alone": lambda x, k, p: alibi(x, k),
    "steep numbers": lambda x, k, p: distance(x, k).clamp(min=0) * -1e9,
    "buckets alone": lambda x, k, p: buckets(x, k),
    "numbers of the batch alone": lambda x, k, p: p[:, None, None].to(torch.float32) * LOWEST,
    "padding and alibi": lambda x, k, p: alibi(x, k) + torch.where(real(p), 0.0, LOWEST),
    "a constant alone": lambda x, k, p: torch.full((QUERIES, KEYS), 0.5),
    # Too little to hide.
    "almost ten thousand": lambda x, k, p: hide(x, k, p, -9999.0),
    "alibi and almost ten thousand": lambda x, k, p: alibi(x, k) + hide(x, k, p, -9999.0),
    "a mask made weak by its factor": lambda x, k, p: hide(x, k, p, -4e4) / 8,
    "alibi and a mask made weak": lambda x, k, p: (alibi(x, k) + hide(x, k, p, -7e4)) / 8,
    "alibi and a mask made weak in between": lambda x, k, p: ((alibi(x, k) + hide(x, k, p, -8e4)) / 16) * 1.5,
    "nothing times a mask": lambda x, k, p: (alibi(x, k) + hide(x, k, p)) * 0.0,
    # What is hidden becomes what is seen.
    "infinity where visible": lambda x, k, p: torch.where(causal(x, k, p), torch.inf, LOWEST),
    "infinity beside a mask": lambda x, k, p: hide(x, k, p) + torch.where(causal(x, k, p), 0.0, torch.inf),
    "not a number where visible": lambda x, k, p: torch.where(causal(x, k, p), torch.nan, LOWEST),
    "a negative factor": lambda x, k, p: hide(x, k, p) * -0.5,
    "alibi with a negative factor": lambda x, k, p: (alibi(x, k) + hide(x, k, p)) * -1.0,
    "alibi over a negative number": lambda x, k, p: (alibi(x, k) + hide(x, k, p)) / -8,
    "a mask taken off": lambda x, k, p: alibi(x, k) - hide(x, k, p),
    "a mask added with a negative factor": lambda x, k, p: torch.add(alibi(x, k), hide(x, k, p), alpha=-1),
    "a factor nobody knows": lambda x, k, p: (alibi(x, k) + hide(x, k, p)) * (p.sum() - 3.0),
    "an absolute value": lambda x, k, p: (alibi(x, k) + hide(x, k, p)).abs(),
    "the larger one": lambda x, k, p: torch.maximum(alibi(x, k), hide(x, k, p)),
    # Numbers beside another mask than a self-causal one.
    "alibi, the query itself hidden": lambda x, k, p: alibi(x, k) + torch.where(columns(k) < rows(x, k), 0.0, LOWEST),
    "alibi, one token of the future": lambda x, k, p: (
        alibi(x, k) + torch.where(columns(k) <= rows(x, k) + 1, 0.0, LOWEST)
    ),
    "alibi, the past hidden": lambda x, k, p: alibi(x, k) + torch.where(columns(k) >= rows(x, k), 0.0, LOWEST),
    "alibi, a prefix": lambda x, k, p: (
        alibi(x, k) + torch.where(causal(x, k, p) | (columns(k) < k.shape[1] - 1), 0.0, LOWEST)
    ),
    "alibi for keys where a row differs": lambda x, k, p: torch.where(
        causal(x, k, p) | (p.sum() > 3), alibi(x, k), LOWEST
    ),
}


@cache
def _refused() -> dict[str, MaskGraph]:
    graphs = capture_masks(list(REFUSED.values()), queries=QUERIES, keys=KEYS)
    return dict(zip(REFUSED, graphs, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_without_a_causal_mask_are_refused(name: str) -> None:
    proof = _refused()[name].prove()
    assert not proof.is_self_causal(QUERIES, KEYS)
    assert proof.why_not_self_causal(QUERIES, KEYS)
