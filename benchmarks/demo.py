"""What eviction keeps and what it loses, on a long document: ``python -m benchmarks.demo``.

A small decoder reads a long document with facts spread through it and answers questions about them under the full
cache, under uniform budgets (SnapKV) and under adaptive ones (Ada-SnapKV), at equal numbers of entries held.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers.utils import logging as transformers_logging

import adakv_compile
from benchmarks.retriever import corpus, model
from benchmarks.retriever import vocabulary as vocab

__all__ = ["Outcome", "Scene", "build_scene", "main", "run"]

_VALUE_WORDS: Final = 3
_WINDOW: Final = 8
#: Two words of a question and four of an answer must fit behind the document.
_TAIL: Final = 8
#: Two budgets keep the compilations under three minutes: one that barely holds a fact, one of a quarter.
_BUDGET_SHARES: Final = (1 / 64, 1 / 4)
_FULL: Final = "full"
_METHODS: Final = {"snapkv": "SnapKV", "ada-snapkv": "Ada-SnapKV"}


@dataclass(frozen=True, slots=True)
class Scene:
    """A document, questions about it and their answers.

    Attributes:
        document: Token ids `[1, T]`.
        questions: Token ids of the questions `[Q, 2]`.
        answers: The true answers as text.
    """

    document: Tensor
    questions: Tensor
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one kind of cache answered and what it held.

    Attributes:
        label: Kind of cache.
        budget: Entries per KV head on average, None for the full cache.
        aware: Answers with the question in the prompt.
        agnostic: Answers with the document compressed before any question.
        bytes_held: KV-cache bytes of one document.
        bytes_dense: What the full cache would hold.
        head_lengths: Entries of the prompt kept by every head for every question `[Q, layers, Hkv]`.
        seconds: Time, compilation included.
    """

    label: str
    budget: int | None
    aware: tuple[str, ...]
    agnostic: tuple[str, ...]
    bytes_held: int
    bytes_dense: int
    head_lengths: Tensor | None
    seconds: float


def build_scene(length: int, *, facts: int, questions: int, seed: int) -> Scene:
    """Return a document of about ``length`` tokens and questions about it.

    Args:
        length: Longest context, question and answer included.
        facts: Facts spread through the document.
        questions: Questions, at most one per fact.
        seed: Seed of the document.

    Returns:
        The scene; every answer has three words, because the first generated word comes from the prefill, which still
        sees everything.

    Raises:
        ValueError: If there are more questions than facts.
    """
    if questions > facts:
        message = f"{questions} questions about {facts} facts; ask at most one per fact"
        raise ValueError(message)
    task = corpus.RecallTask("demo", facts, (_VALUE_WORDS, _VALUE_WORDS), questions)
    spoken = questions * (_VALUE_WORDS + 3)
    text = corpus.recall_document(np.random.default_rng(seed), length - _TAIL + spoken, task)
    ids = torch.from_numpy(text.ids)
    return Scene(
        document=ids[None, : text.questions[0].start],
        questions=torch.stack([ids[q.start : q.start + 2] for q in text.questions]),
        answers=tuple(vocab.decode(q.answer) for q in text.questions),
    )


def _read_answer(ids: Tensor) -> str:
    """Return generated tokens as text, up to the closing word."""
    words = ids.tolist()
    return vocab.decode(words[: words.index(vocab.END)] if vocab.END in words else words)


def _generate(network: Any, ids: Tensor, count: int, cache: Any = None) -> Any:
    """Decode greedily and return what ``generate`` returns."""
    given = {} if cache is None else {"past_key_values": cache}
    return network.generate(ids, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, **given)


def _ask_aware(network: Any, scene: Scene) -> tuple[tuple[str, ...], list[Any]]:
    """Ask with the question in the prompt: eviction sees what will be needed."""
    answers, caches = [], []
    for question in scene.questions:
        prompt = torch.cat([scene.document, question[None]], dim=1)
        out = _generate(network, prompt, _VALUE_WORDS + 1)
        answers.append(_read_answer(out.sequences[0, prompt.shape[1] :]))
        caches.append(out.past_key_values)
    return tuple(answers), caches


def _ask_agnostic(network: Any, scene: Scene) -> tuple[str, ...]:
    """Read and compress the document once, then ask each question on a copy of its cache."""
    cache = _generate(network, scene.document, 1).past_key_values
    answers = []
    for question in scene.questions:
        prompt = torch.cat([scene.document, question[None]], dim=1)
        out = _generate(network, prompt, _VALUE_WORDS + 1, copy.deepcopy(cache))
        answers.append(_read_answer(out.sequences[0, prompt.shape[1] :]))
    return tuple(answers)


def run(scene: Scene, method: str | None, budget: int | None) -> Outcome:
    """Answer all questions under one kind of cache.

    Args:
        scene: Document and questions.
        method: Method of the backend, None for the full cache.
        budget: Entries per KV head on average, None for the full cache.

    Returns:
        The answers and what was held for them.

    Raises:
        RuntimeError: If the backend left a layer uncompressed.
    """
    begin = time.perf_counter()
    # A compiled model keeps its options, so every method gets a fresh one. The copies share their code, and Dynamo
    # gives up on code it has compiled eight times: what it holds for earlier copies has to go.
    torch.compiler.reset()
    network: Any = model.load()
    if method is not None:
        options = {"method": method, "budget": budget, "window": _WINDOW}
        network.compile(backend="adakv", options=options, dynamic=True)
    aware, caches = _ask_aware(network, scene)
    agnostic = _ask_agnostic(network, scene)
    seconds = time.perf_counter() - begin
    if method is None:
        held = sum(t.numel() * t.element_size() for layer in caches[0].layers for t in (layer.keys, layer.values))
        return Outcome(_FULL, None, aware, agnostic, held, held, None, seconds)
    stats = [adakv_compile.cache_stats(cache) for cache in caches]
    if not all(layer.compressed for s in stats for layer in s.layers):
        # Its answers would be those of the full cache.
        message = f"a layer was left uncompressed by {method!r}; run `adakv explain` to see why"
        raise RuntimeError(message)
    # Generated tokens are kept by every head; what the heads differ in is what they kept of the prompt.
    prompt = scene.document.shape[1] + scene.questions.shape[1]
    lengths = torch.stack(
        [torch.stack([layer.head_lengths[0] - (layer.logical_length - prompt) for layer in s.layers]) for s in stats]
    )
    held, dense = stats[0].bytes_held, stats[0].bytes_dense
    return Outcome(_METHODS[method], budget, aware, agnostic, held, dense, lengths, seconds)


def _show_document(console: Console, scene: Scene, facts: int) -> None:
    """Print the first facts with the words around them."""
    ids = scene.document[0].tolist()
    starts = [i for i, word in enumerate(ids) if word == vocab.KEY]
    console.print(f"\nA document of {len(ids):,} words holds {facts} facts. The first three, in place:\n")
    for start in starts[:3]:
        end = ids.index(vocab.END, start) + 1
        line = Text(f"  word {start:>5,}  … {vocab.decode(ids[max(0, start - 6) : start])} ", style="dim")
        line.append(vocab.decode(ids[start:end]), style="bold cyan")
        line.append(f" {vocab.decode(ids[end : end + 6])} …", style="dim")
        console.print(line)
    asked, true = vocab.decode(scene.questions[0].tolist()), scene.answers[0]
    console.print(f"\nA question reads [bold]{asked}[/bold]; its answer is [bold]{true}[/bold].\n")


def _right(answers: Sequence[str], scene: Scene) -> str:
    """Return how many answers are exactly right, as text."""
    right = sum(a == b for a, b in zip(answers, scene.answers, strict=True))
    return f"{right}/{len(scene.answers)}"


def _summary(outcomes: Sequence[Outcome], scene: Scene) -> Table:
    """Return the table of all outcomes."""
    table = Table(title="Right answers and KV-cache held")
    for name in ("cache", "entries per head", "held", "of full", "question in prompt", "document first", "seconds"):
        first = name == "cache"
        table.add_column(name, justify="left" if first else "right", no_wrap=first)
    for o in outcomes:
        table.add_row(
            o.label,
            "all" if o.budget is None else str(o.budget),
            f"{o.bytes_held / 2**20:.2f} MiB",
            f"{o.bytes_held / o.bytes_dense:.1%}",
            _right(o.aware, scene),
            _right(o.agnostic, scene),
            f"{o.seconds:.0f}",
            end_section=o.budget is None or o.label == _METHODS["ada-snapkv"],
        )
    return table


def _details(outcomes: Sequence[Outcome], scene: Scene, *, budget: int, aware: bool) -> Table:
    """Return every answer at one budget; wrong ones are red."""
    protocol = "the question in the prompt" if aware else "the document compressed first"
    shown = [o for o in outcomes if o.budget in (None, budget)]
    table = Table("question", "truth", *(o.label for o in shown), title=f"Answers at budget {budget}, {protocol}")
    for i, (question, true) in enumerate(zip(scene.questions.tolist(), scene.answers, strict=True)):
        given = [(o.aware if aware else o.agnostic)[i] for o in shown]
        cells = [Text(answer, style="green" if answer == true else "red") for answer in given]
        table.add_row(vocab.decode(question), true, *cells)
    return table


def _draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Save the entries per head of the adaptive outcomes, a row of panels per budget."""
    shown = [o for o in outcomes if o.label == _METHODS["ada-snapkv"] and o.head_lengths is not None]
    lengths = [o.head_lengths.float() for o in shown if o.head_lengths is not None]
    layers, heads = lengths[0].shape[1:]
    figure = Figure(figsize=(2.6 * layers, 2.2 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), layers, sharey="row", squeeze=False)
    for row, outcome, kept in zip(axes, shown, lengths, strict=True):
        mean, low, high = kept.mean(0), kept.amin(0), kept.amax(0)
        for layer, axis in enumerate(row):
            spread = torch.stack([mean[layer] - low[layer], high[layer] - mean[layer]]).numpy()
            axis.bar(range(heads), mean[layer].numpy(), yerr=spread, capsize=3, color="tab:blue")
            axis.axhline(outcome.budget, color="tab:red", linestyle="--", linewidth=1)
            axis.set_title(f"layer {layer}, budget {outcome.budget}", fontsize=9)
            axis.set_xticks(range(heads))
        row[0].set_ylabel("entries kept")
    for axis in axes[-1]:
        axis.set_xlabel("KV head")
    figure.suptitle("Entries per head, Ada-SnapKV: mean and range over the questions; dashed: uniform")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demonstration.

    Args:
        arguments: Command line; the process's own when None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=model.MAX_LENGTH, help="longest context in tokens")
    parser.add_argument("--facts", type=int, default=24)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--budgets", type=int, nargs="+", help="entries per KV head on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/demo-heads.png"))
    parser.add_argument("--threads", type=int, default=1, help="the model is too small to gain from more")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    console = Console()
    budgets = options.budgets or [round(options.length * share) for share in _BUDGET_SHARES]
    scene = build_scene(options.length, facts=options.facts, questions=options.questions, seed=options.seed)
    _show_document(console, scene, options.facts)
    runs: list[tuple[str | None, int | None]] = [(None, None)]
    runs += [(method, budget) for budget in budgets for method in _METHODS]
    outcomes = []
    for method, budget in runs:
        with console.status(f"{method or 'full cache'} {budget or ''}"):
            outcomes.append(run(scene, method, budget))
    console.print(_details(outcomes, scene, budget=budgets[0], aware=True))
    console.print(_details(outcomes, scene, budget=budgets[-1], aware=False))
    console.print(_summary(outcomes, scene))
    console.print("SnapKV gives every head the same budget, Ada-SnapKV divides the same total by need.")
    console.print("Bytes held include bookkeeping and room for new tokens, which weigh most at small budgets.")
    _draw(outcomes, options.out)
    console.print(f"Entries per head: {options.out}")
    console.print("One document is an anecdote: a difference of one or two answers is not evidence for a method.")


if __name__ == "__main__":
    main()
