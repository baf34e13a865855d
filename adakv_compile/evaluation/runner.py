"""Every sample under every kind of cache and protocol, each recorded as soon as its batch is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import torch

from adakv_compile.backend import adakv
from adakv_compile.evaluation.answer import Answer, Answerer
from adakv_compile.evaluation.errors import EvaluationError
from adakv_compile.evaluation.methods import FULL, Setting
from adakv_compile.evaluation.metrics import METRICS
from adakv_compile.evaluation.prompts import Prompt, build
from adakv_compile.evaluation.records import Record, Records, key_of
from adakv_compile.evaluation.sample import Sample

__all__ = ["Plan", "run"]

# What models, kernels and compilers raise. A mistake of the interpreter's or of the user's is not among them.
_CRASHES: Final = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    EvaluationError,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run.

    Attributes:
        settings: Kinds of cache, each compiled for once.
        protocols: Names in :data:`adakv_compile.evaluation.prompts.PROTOCOLS`.
        samples: The samples of every seed, the same under every setting.
        options: Options of the backend but for method and budget.
        batch: Most samples that are answered together.
    """

    settings: Sequence[Setting]
    protocols: Sequence[str]
    samples: Mapping[int, Sequence[Sample]]
    options: Mapping[str, object]
    batch: int = 1

    @property
    def size(self) -> int:
        """Number of answers in all."""
        return len(self.settings) * len(self.protocols) * sum(map(len, self.samples.values()))


@dataclass(frozen=True, slots=True)
class _Unit:
    """One answer to be had."""

    setting: Setting
    protocol: str
    seed: int
    sample: Sample

    def head(self) -> dict[str, Any]:
        """Return the part of its record that is known before."""
        return {
            "method": self.setting.method,
            "budget": self.setting.budget,
            "protocol": self.protocol,
            "seed": self.seed,
            "task": self.sample.task,
            "length": self.sample.labels.get("length"),
            "index": self.sample.index,
        }


def run(
    plan: Plan,
    model: Any,
    tokenizer: Any,
    device: torch.device,
    records: Records,
    tell: Callable[[str], None],
    enter: Callable[[int], None] = lambda seed: None,
) -> None:
    """Answer what has no record yet.

    A sample that can't be answered gets a record that says why, without a score, and the run goes on.

    Args:
        plan: What to run.
        model: A causal language model of transformers in evaluation mode, compiled again and again.
        tokenizer: Its tokenizer.
        device: Where it is.
        records: Where results go, and what is there already.
        tell: Called with a few words after every answer.
        enter: Called with a seed before its samples, again and again; puts other weights into the model, say.

    Raises:
        EvaluationError: A setting compresses nothing: its results would be the full cache's under another name.
    """
    asker = _Asker(Answerer(model, tokenizer, device), tokenizer)
    for setting in plan.settings:
        units = [
            _Unit(setting, protocol, seed, sample)
            for protocol in plan.protocols
            for seed, samples in plan.samples.items()
            for sample in samples
        ]
        missing = [unit for unit in units if key_of(unit.head()) not in records.done]
        if missing:
            _compile(model, setting, plan.options)
        for together in _batches(missing, plan.batch):
            enter(together[0].seed)
            for record in asker.ask(together):
                records.append(record)
                tell(setting.label)


def _batches(units: Sequence[_Unit], most: int) -> Iterator[Sequence[_Unit]]:
    """Yield units that may be answered together: neighbours under one protocol with answers of the same kind."""
    kinds = groupby(units, key=lambda u: (u.protocol, u.seed, u.sample.task, u.sample.max_new_tokens, u.sample.stop))
    for _, found in kinds:
        rest = list(found)
        while rest:
            yield rest[:most]
            rest = rest[most:]


def _compile(model: Any, setting: Setting, options: Mapping[str, object]) -> None:
    # Dynamo gives up on code that it has compiled eight times: what it holds for other settings has to go.
    torch.compiler.reset()
    if setting.method == FULL:
        model.compile(backend=options.get("inner", "inductor"), dynamic=True)
    else:
        model.compile(backend=adakv, options=setting.options(options), dynamic=True)


@dataclass(frozen=True, slots=True)
class _Asker:
    """Turns units into records."""

    answerer: Answerer
    tokenizer: Any

    def ask(self, units: Sequence[_Unit]) -> list[Record]:
        """Return a record of each unit, in order; one that can't be answered gets no score."""
        heads: list[dict[str, Any]] = [unit.head() | {"meta": unit.sample.labels} for unit in units]
        prompts: dict[int, Prompt] = {}
        for i, unit in enumerate(units):
            prompt, told = self._prompt(unit)
            heads[i] |= told
            if prompt is not None:
                prompts[i] = prompt
        for i, found in self._answers(units, prompts).items():
            heads[i] |= found
        return [*heads]

    def _prompt(self, unit: _Unit) -> tuple[Prompt | None, Record]:
        """Return a unit's prompt, or None if it can't be answered, and what its record says of it."""
        told: dict[str, Any] = {}
        try:
            prompt = build(unit.sample, self.tokenizer, unit.protocol)
            told = {"prompt_tokens": prompt.tokens, "prompt_sha256": prompt.sha256}
            self.answerer.check(prompt, unit.sample.max_new_tokens)
        except _CRASHES as error:
            return None, told | _crash(error)
        return prompt, told

    def _answers(self, units: Sequence[_Unit], prompts: Mapping[int, Prompt]) -> dict[int, Record]:
        """Return what was found for each prompt, by the index of its unit."""
        if not prompts:
            return {}
        sample = units[next(iter(prompts))].sample
        try:
            answers = self.answerer.answer(list(prompts.values()), sample.max_new_tokens, sample.stop)
        except _CRASHES as error:
            if len(prompts) == 1:
                return dict.fromkeys(prompts, _crash(error))
            # Whatever it was, the others of the batch may have had no part in it.
            alone = [self._answers(units, {i: prompt}) for i, prompt in prompts.items()]
            return {i: record for found in alone for i, record in found.items()}
        return {i: self._found(units[i], answer, len(prompts)) for i, answer in zip(prompts, answers, strict=True)}

    def _found(self, unit: _Unit, answer: Answer, batch: int) -> Record:
        """Return what an answer was worth.

        Raises:
            EvaluationError: Nothing was compressed.
        """
        if unit.setting.method != FULL and not answer.compressed:
            raise EvaluationError(
                f"{unit.setting.label} leaves every layer of this model uncompressed: its answers would be the full "
                "cache's; `adakv explain` tells why"
            )
        sample = unit.sample
        try:
            prediction = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
            score = METRICS[sample.metric](prediction, sample.answers, sample.classes)
        except _CRASHES as error:
            return _crash(error)
        told = {"prediction": prediction, "answers": sample.answers, "score": score}
        return _measured(answer) | {"batch": batch} | told


def _crash(error: BaseException) -> dict[str, Any]:
    first = (str(error).strip().splitlines() or [""])[0]
    return {"error": f"{type(error).__name__}: {first}", "score": None}


def _measured(answer: Answer) -> dict[str, Any]:
    return {
        "error": None,
        "generated": len(answer.tokens),
        "kept": answer.kept,
        "dense_entries": answer.dense,
        "heads": answer.heads,
        # Entries that were held at the end against those that were kept and added: 0, or a later eviction.
        "evicted_later": answer.expected - answer.held,
        "bytes_held": answer.bytes_held,
        "bytes_dense": answer.bytes_dense,
        "peak_bytes": answer.peak_bytes,
        "prefill_seconds": round(answer.prefill_seconds, 6),
        "step_seconds": None if answer.step_seconds is None else round(answer.step_seconds, 6),
        "compiling_seconds": round(answer.compiling_seconds, 6),
    }
