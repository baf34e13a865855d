"""The four checks that any decoder has to pass, and what is recorded on the way.

All of them compare with the uncompressed decoder in eager mode, which an :class:`Interception` reads, or keeps from
seeing what was evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo import lookup_backend

from adakv_compile import CompressedKV, Options
from adakv_compile.pipeline import compile_or_leave
from adakv_compile.report import GraphReport, SiteReport
from tests.zoo.interception import Interception
from tests.zoo.scores import wrongly_kept
from tests.zoo.subject import Subject, compressed, greedy, grown

__all__ = ["Trial", "count_graphs", "identity", "small_budget"]

BUDGET: Final = 12
WINDOW: Final = 4
STEPS: Final = 4
PADDING: Final = 5

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


@dataclass
class Trial:
    """What happened to a decoder at a small budget.

    Attributes:
        prompt: Reports of the graphs of the prompt.
        steps: Reports of the graphs of the steps.
        stores: Number of layers with a compressed cache after the prompt.
        attentions: Number of attentions that the model computes for a prompt.
        has_cache: Whether the decoder has a state after the prompt.
        problems: What is wrong, a line each; empty where the checks hold.
    """

    prompt: list[GraphReport] = field(default_factory=list[GraphReport])
    steps: list[GraphReport] = field(default_factory=list[GraphReport])
    stores: int = 0
    attentions: int = 0
    has_cache: bool = True
    problems: list[str] = field(default_factory=list[str])

    @property
    def sites(self) -> list[SiteReport]:
        """The attentions of the prompt's graphs, in order."""
        return [site for graph in self.prompt for site in graph.sites]


def inputs(subject: Subject, padded: bool) -> tuple[Tensor, Tensor | None]:
    """Return the ids ``[2, T]`` of two prompts and their padding mask: five tokens on the left of the first one."""
    ids = torch.randint(2, subject.vocab, (2, subject.prompt), generator=torch.Generator().manual_seed(1))
    if not padded:
        return ids, None
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return ids, mask


def count_graphs(subject: Subject, padded: bool) -> int:
    """Return how many graphs Dynamo makes of a prompt and the steps after it when they are compiled as they are.

    What is compiled may lay out its results in another way than eager mode does, and a graph behind a break is then
    compiled once more.
    """
    graphs: list[int] = []
    alone = lookup_backend("aot_eager")

    def count(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(len(gm.graph.nodes))
        return alone(gm, example_inputs)

    torch.compiler.reset()
    model = subject.build()
    model.compile(backend=count, dynamic=True)
    ids, mask = inputs(subject, padded)
    with torch.no_grad():
        _, state = subject.run(model, ids, None, mask)
    if state is not None:
        _steps(subject, model, state, mask)
    return len(graphs)


def identity(subject: Subject, padded: bool) -> list[str]:
    """(a) Return what is wrong when the budget is longer than the text: every token must be the uncompressed one."""
    torch.compiler.reset()
    ids, mask = inputs(subject, padded)
    expected = greedy(subject, subject.build(), ids, mask, STEPS)
    model = subject.build()
    model.compile(backend=_backend([], budget=200), dynamic=True)
    found = greedy(subject, model, ids, mask, STEPS)
    if torch.equal(found, expected):
        return []
    return [f"(a) tokens {found.tolist()} instead of {expected.tolist()}"]


@torch.no_grad()
def small_budget(subject: Subject, padded: bool, method: str = "ada-snapkv", *, steps: bool = True) -> Trial:
    """(b) to (d) Decode at a small budget and compare.

    Args:
        subject: The decoder.
        padded: Whether the first row of the batch has padding on its left.
        method: ``"ada-snapkv"`` or ``"snapkv"``.
        steps: Whether to decode after the prompt; without, (b) is left out.
    """
    torch.compiler.reset()
    ids, mask = inputs(subject, padded)
    trial = Trial()
    reports: list[GraphReport] = []
    model = subject.build()
    model.compile(backend=_backend(reports, budget=BUDGET, method=method), dynamic=True)
    logits, state = subject.run(model, ids, None, mask)
    trial.prompt, trial.has_cache = list(reports), state is not None
    kept = [_kept(view) for view in compressed(state)]
    trial.stores = len(kept)

    reference = subject.build()
    prompt = ids.shape[1] + subject.prefix
    with Interception(len(ids), ids.shape[1], {prompt, *subject.windows}, read=True) as reader:
        dense_logits, dense = subject.run(reference, ids, None, mask)
    trial.attentions = reader.count
    trial.problems += _difference(logits[:, -1], dense_logits[:, -1], "prompt")
    owners = _owners(trial)
    if owners is None:
        return trial
    for site, (owner, weights) in enumerate(zip(owners, reader.weights, strict=True)):
        # Of the attentions to one cache, the first decides what is kept.
        if owner is not None and owner not in owners[:site]:
            wrong = wrongly_kept(kept[owner], weights, mask, budget=BUDGET, window=WINDOW, method=method)
            trial.problems += [f"(c) attention {site}, {line}" for line in wrong[:1]]
    if state is None or not steps:
        return trial
    ours = _steps(subject, model, state, mask)
    trial.steps = reports[len(trial.prompt) :]
    tokens = _tokens(subject)
    count = 0
    for t in range(STEPS):
        mask = grown(mask)
        visible = [None if owner is None else F.pad(kept[owner], (0, t + 1), value=True) for owner in owners]
        with Interception(len(ids), 1, {prompt + t + 1, *subject.windows}, kept=visible) as hider:
            expected, dense = subject.run(reference, tokens[:, t : t + 1], dense, mask)
        trial.problems += _difference(ours[t], expected[:, -1], f"step {t}")
        count = hider.count
    trial.problems += _unaccounted_steps(trial, count)
    return trial


def _owners(trial: Trial) -> list[int | None] | None:
    """(d) Return the compressed layer that each attention of the prompt made, None where it was refused."""
    sites = trial.sites
    # A softmax over other lengths may be more in the report; where something is compressed, both must agree.
    accounted = len(sites) == trial.attentions if trial.stores else len(sites) >= trial.attentions
    if not accounted and not _left_alone(trial.prompt):
        trial.problems.append(f"(d) the model computes {trial.attentions} attentions, {len(sites)} are in the report")
    trial.problems += [f"(d) attention {i} is dense without a reason" for i, site in enumerate(sites) if _silent(site)]
    owners: list[int | None] = []
    made = 0
    for site in sites:
        if site.action == "share":
            shared = int(site.cache.removeprefix("that of attention "))
            owners.append(owners[[other.index for other in sites].index(shared)])
        else:
            owners.append(made if site.compressed else None)
            made += site.compressed
    if made != trial.stores:
        trial.problems.append(f"(d) {made} attentions are called compressed, {trial.stores} caches are")
    return owners if made == trial.stores and len(sites) == trial.attentions else None


def _unaccounted_steps(trial: Trial, count: int) -> list[str]:
    """(d) Tell where the graphs of the steps report other attentions than the prompt's, or than a step computes."""
    problems: list[str] = []
    for graph in trial.steps:
        problems += [
            f"(d) attention {site.index} of a step is dense without a reason" for site in graph.sites if _silent(site)
        ]
    before = [site.compressed for site in trial.sites]
    after = [site.compressed for graph in trial.steps for site in graph.sites]
    if len(trial.steps) == len(trial.prompt) and after != before:
        problems.append(f"(d) compressed in the prompt: {before}, in a step: {after}")
    if len(trial.steps) == len(trial.prompt) and len(after) < count and not _left_alone(trial.steps):
        problems.append(f"(d) a step computes {count} attentions, {len(after)} are in the report")
    return problems


def _left_alone(graphs: list[GraphReport]) -> bool:
    return any(graph.refusal is not None for graph in graphs)


def _silent(site: SiteReport) -> bool:
    return not site.compressed and site.refusal is None


def _kept(view: CompressedKV) -> Tensor:
    """Return ``[B, Hkv, L]`` booleans: the logical positions that a ``CompressedKV`` holds."""
    batch, heads = view.store.offsets.shape[0], view.store.offsets.shape[1] - 1
    keep = torch.zeros(batch, heads, view.length, dtype=torch.bool)
    for row in range(batch):
        for head in range(heads):
            keep[row, head, view.positions(row, head)] = True
    return keep


def _backend(reports: list[GraphReport], **options: Any) -> Backend:
    parsed = Options.parse(None, {"window": WINDOW, "inner": "eager", **options})

    def observe(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_or_leave(gm, example_inputs, parsed, reports.append)

    return observe


def _tokens(subject: Subject) -> Tensor:
    return torch.randint(2, subject.vocab, (2, STEPS), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def _steps(subject: Subject, model: nn.Module, state: Any, mask: Tensor | None) -> list[Tensor]:
    """Feed the same tokens as always, one by one; return the logits ``[B, V]`` after each."""
    tokens = _tokens(subject)
    found: list[Tensor] = []
    for t in range(STEPS):
        mask = grown(mask)
        logits, state = subject.run(model, tokens[:, t : t + 1], state, mask)
        found.append(logits[:, -1].clone())
    return found


def _difference(found: Tensor, expected: Tensor, what: str) -> list[str]:
    if torch.allclose(found, expected, rtol=1e-4, atol=2e-3):
        return []
    worst = (found - expected).abs().max().item()
    return [f"(b) {what}: logits differ by {worst:.2g}, the largest is {expected.abs().max().item():.2g}"]
