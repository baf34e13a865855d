"""One type through all checks, as a row of plain data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from adakv_compile import Reason
from adakv_compile.report import GraphReport
from tests.zoo.causal_lm import subject
from tests.zoo.checks import STEPS, Trial, count_graphs, identity, inputs, small_budget
from tests.zoo.subject import Subject, greedy, grown

__all__ = ["Row", "examine"]


@dataclass
class Row:
    """What is known of one type.

    Attributes:
        name: The type.
        status: ``"compressed"``, ``"partly compressed"``, ``"refused"``, ``"nothing to compress"``, ``"not run"`` (by
            transformers alone) or ``"crashed"``.
        reasons: Why, a line each, each once.
        problems: What the checks found wrong.
        compressed: Number of attentions on a compressed cache.
        attentions: Number of attentions.
        graphs: Graphs of a prompt and its steps, with the backend.
        graphs_alone: The same without it, counted where there are more than two.
        padded: Whether a batch with left padding was used.
        seconds: Time that all of it took.
    """

    name: str
    status: str = "crashed"
    reasons: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])
    compressed: int = 0
    attentions: int = 0
    graphs: int = 0
    graphs_alone: int = 0
    padded: bool = False
    seconds: float = 0.0

    def json(self) -> str:
        """Return the row as one line of JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse(line: str) -> Row:
        """Return the row that :meth:`json` wrote."""
        return Row(**json.loads(line))


def examine(name: str, quick: bool = False) -> Row:
    """Run every check on a type, or, quickly, those at a small budget with padding alone; never raises."""
    row = Row(name)
    begin = time.monotonic()
    tested = subject(name)
    row.padded = tested.supports_padding
    if _attempt(row, "not run", lambda: _run_alone(tested)) is None:
        row.status = "not run"
    else:
        _check(row, tested, quick)
    row.seconds = round(time.monotonic() - begin, 1)
    return row


def _check(row: Row, tested: Subject, quick: bool) -> None:
    trial = _attempt(row, "(b)", lambda: small_budget(tested, tested.supports_padding))
    if trial is None:
        return
    row.problems += trial.problems
    row.graphs = len(trial.prompt) + len(trial.steps)
    _judge(row, trial)
    if quick:
        return
    row.problems += _attempt(row, "(a)", lambda: identity(tested, tested.supports_padding)) or []
    if trial.stores:
        other = _attempt(row, "(c)", lambda: small_budget(tested, False, "snapkv", steps=False))
        row.problems += [f"snapkv: {line}" for line in other.problems] if other is not None else []
    if row.graphs > 2:
        row.graphs_alone = _attempt(row, "(e)", lambda: count_graphs(tested, tested.supports_padding)) or 0
    if row.graphs > max(row.graphs_alone, 2):
        row.problems.append(f"(e) {row.graphs} graphs, {row.graphs_alone} without the backend")


@torch.no_grad()
def _run_alone(tested: Subject) -> bool:
    """Generate, and take a step, as transformers does it."""
    ids, mask = inputs(tested, tested.supports_padding)
    model = tested.build()
    greedy(tested, model, ids, mask, STEPS)
    _, state = tested.run(model, ids, None, mask)
    if state is not None:
        tested.run(model, ids[:, :1], state, grown(mask))
    return True


def _judge(row: Row, trial: Trial) -> None:
    shared = sum(site.action == "share" for site in trial.sites)
    row.compressed, row.attentions = trial.stores + shared, max(trial.attentions, len(trial.sites))
    row.reasons = list(dict.fromkeys(_reasons(trial.prompt) + _reasons(trial.steps)))
    serious = {site.refusal.reason for site in trial.sites if site.refusal is not None} - {Reason.NO_CACHE}
    if trial.stores:
        row.status = "compressed" if row.compressed == row.attentions else "partly compressed"
    elif not trial.has_cache:
        row.status = "nothing to compress"
    elif serious or any(graph.refusal is not None for graph in trial.prompt):
        row.status = "refused"
    else:
        row.status = "nothing to compress"


def _reasons(graphs: list[GraphReport]) -> list[str]:
    found: list[str] = []
    for graph in graphs:
        refusals = [graph.refusal, *(site.refusal for site in graph.sites)]
        # That the cache of a step is dense follows from what was refused in the prompt.
        found += [
            f"{refusal.reason.name}: {refusal.detail}".rstrip(": ")
            for refusal in refusals
            if refusal is not None and refusal.reason is not Reason.DENSE_CACHE
        ]
    return found


def _attempt(row: Row, what: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:  # noqa: BLE001  (the sweep goes on, and says what happened)
        text = " ".join(str(error).split())
        line = f"{type(error).__name__}: {text[:300]}"
        (row.reasons if what == "not run" else row.problems).append(line if what == "not run" else f"{what} {line}")
        return None
