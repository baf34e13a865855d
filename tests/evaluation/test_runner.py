"""A whole run on the packaged model: what is measured is what was held, and a bad sample does not end it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adakv_compile.cli.loading import Loaded, load
from adakv_compile.evaluation import runner
from adakv_compile.evaluation.answer import Answerer
from adakv_compile.evaluation.errors import EvaluationError
from adakv_compile.evaluation.fingerprint import fingerprint
from adakv_compile.evaluation.methods import Setting
from adakv_compile.evaluation.prompts import PROTOCOLS, Prompt, build
from adakv_compile.evaluation.records import Records, key_of
from adakv_compile.evaluation.runner import Plan, run
from tests.evaluation.samples import FACT, RETRIEVER, fact

BUDGET, WINDOW = 24, 8
OPTIONS: dict[str, object] = {"inner": "eager", "window": WINDOW, "strict": True}
SAMPLES = (fact(0), fact(1), replace(fact(2), context="the " * 2050), fact(3, context=""))
Found = dict[tuple[Any, ...], Any]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(str(RETRIEVER), "auto", "cpu")


@pytest.fixture(scope="module")
def found(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    """Run everything once: compilation takes most of the time."""
    torch.set_num_threads(1)
    plan = Plan((Setting("full", None), Setting("ada-snapkv", BUDGET)), PROTOCOLS, {0: SAMPLES}, OPTIONS)
    with Records(tmp_path_factory.mktemp("run"), {}) as records:
        run(plan, loaded.model, loaded.tokenizer, loaded.device, records, lambda _: None)
        assert len(records.done) == plan.size == 16
        yield {(r["method"], r["protocol"], r["index"]): r for r in records.done.values()}


def test_the_full_cache_finds_the_facts_under_both_protocols(found: Found) -> None:
    for protocol in PROTOCOLS:
        for index in (0, 1):
            record = found["full", protocol, index]
            assert (record["prediction"], record["score"], record["error"]) == (FACT, 1.0, None)
            assert record["bytes_held"] == record["bytes_dense"]
            assert record["kept"] == record["dense_entries"]


def test_a_compressed_cache_keeps_its_budget_of_what_was_compressed(found: Found, loaded: Loaded) -> None:
    for protocol in PROTOCOLS:
        record = found["ada-snapkv", protocol, 0]
        assert record["kept"] == 4 * 4 * BUDGET
        assert [sum(layer) for layer in record["heads"]] == [4 * BUDGET] * 4
        assert record["dense_entries"] == 16 * len(build(SAMPLES[0], loaded.tokenizer, protocol).compressed)
        assert record["bytes_held"] < record["bytes_dense"]


def test_nothing_is_evicted_after_the_compression(found: Found) -> None:
    # Above all not by the question, which would choose what the context may keep.
    scored = [record for record in found.values() if record["score"] is not None]
    assert len(scored) == 10
    assert {record["evicted_later"] for record in scored} == {0}


def test_prompts_are_the_same_under_every_method(found: Found) -> None:
    for protocol in PROTOCOLS:
        hashes = {found[method, protocol, 0]["prompt_sha256"] for method in ("full", "ada-snapkv")}
        assert len(hashes) == 1


def test_times_leave_compilation_out(found: Found) -> None:
    first, second = (found["ada-snapkv", "question-aware", index] for index in (0, 1))
    assert first["compiling_seconds"] > 0
    assert second["compiling_seconds"] == 0
    assert second["prefill_seconds"] > 0
    assert second["step_seconds"] > 0
    assert second["peak_bytes"] is None, "measured on CUDA devices only"


def test_samples_that_cannot_be_answered_are_recorded_without_a_score(found: Found) -> None:
    for method in ("full", "ada-snapkv"):
        record = found[method, "question-aware", 2]
        assert record["score"] is None
        assert "the model has 2,048 positions" in record["error"]
        # A question alone is a prompt, but nothing of it could be compressed before it.
        assert "the prompt is empty" in found[method, "question-agnostic", 3]["error"]


class Stub:
    """Answers without a model."""

    def __init__(self, *errors: BaseException | None) -> None:
        self.errors = list(errors)
        self.asked = 0

    def answer(self, answerer: Any, prompts: Sequence[Prompt], most: int, stop: Any = ()) -> Any:
        self.asked += 1
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        return [ANSWER] * len(prompts)


ANSWER = runner.Answer((129,), ((1,),), 1, 9, 1, 1, 1, 9, None, True, 0.1, 0.1, 0.0)


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what lets a run get by without compiling and answering."""

    def replaced(*errors: BaseException | None) -> Stub:
        stub = Stub(*errors)
        monkeypatch.setattr(runner, "_compile", lambda *_: None)
        monkeypatch.setattr(Answerer, "check", lambda *_: None)
        monkeypatch.setattr(Answerer, "answer", lambda *args: stub.answer(*args))
        return stub

    return replaced


def go(loaded: Loaded, directory: Path, *seeds: int) -> list[Any]:
    plan = Plan((Setting("snapkv", BUDGET),), ("question-aware",), dict.fromkeys(seeds or (0,), SAMPLES), OPTIONS)
    with Records(directory, {}) as records:
        run(plan, loaded.model, loaded.tokenizer, loaded.device, records, lambda _: None)
        return list(records.done.values())


def test_a_batch_is_answered_as_its_rows_are_alone(found: Found, loaded: Loaded, tmp_path: Path) -> None:
    # Four prompts of three lengths, one with a longer question, so that both are padded.
    longer = replace(fact(4, filler=90), question=" the recall alice")
    samples = (*SAMPLES[:2], longer, *SAMPLES[2:])
    plan = Plan((Setting("ada-snapkv", BUDGET), Setting("ada-snapkv", 0.3)), PROTOCOLS, {0: samples}, OPTIONS)
    together: Found = {}
    for batch in (1, 4):
        with Records(tmp_path / str(batch), {}) as records:
            run(replace(plan, batch=batch), loaded.model, loaded.tokenizer, loaded.device, records, lambda _: None)
            told = {key: {**r, "batch": None} for key, r in records.done.items()}
        for record in told.values():
            for name in ("prefill_seconds", "step_seconds", "compiling_seconds", "bytes_held"):
                record.pop(name, None)
        together = together or told
        assert told == together
    assert sum(record["score"] == 1.0 for record in together.values()) >= 6
    assert sum(record["score"] is None for record in together.values()) == 6, "those that can't be answered"
    assert {record["evicted_later"] for record in together.values() if record["score"] is not None} == {0}


def test_a_batch_that_crashes_is_answered_one_by_one(loaded: Loaded, tmp_path: Path, without_model: Any) -> None:
    stub = without_model(torch.OutOfMemoryError("CUDA"), None, None, IndexError("x"), None)
    plan = Plan((Setting("snapkv", BUDGET),), ("question-aware",), {0: SAMPLES}, OPTIONS, batch=4)
    with Records(tmp_path, {}) as records:
        run(plan, loaded.model, loaded.tokenizer, loaded.device, records, lambda _: None)
        found = list(records.done.values())
    assert stub.asked == 5
    assert [record["score"] is None for record in found] == [False, False, True, False]
    assert [record.get("batch") for record in found] == [1, 1, None, 1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), IndexError("x\ny"), AssertionError(), MemoryError()])
def test_a_crash_is_recorded_and_the_run_goes_on(
    loaded: Loaded, tmp_path: Path, without_model: Any, error: Exception
) -> None:
    without_model(None, error)
    records = go(loaded, tmp_path)
    assert len(records) == 4
    assert [record["score"] is None for record in records] == [False, True, False, False]
    assert records[1]["error"].startswith(type(error).__name__)
    assert "\n" not in records[1]["error"]


def test_an_interrupted_run_continues_and_asks_nothing_twice(
    loaded: Loaded, tmp_path: Path, without_model: Any
) -> None:
    stub = without_model(None, None, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        go(loaded, tmp_path, 0, 1)
    assert stub.asked == 3
    stub = without_model()
    records = go(loaded, tmp_path, 0, 1)
    assert stub.asked == 6
    assert len({key_of(record) for record in records}) == len(records) == 8
    assert without_model().asked == 0
    assert go(loaded, tmp_path, 0, 1) == records


def test_a_setting_that_compresses_nothing_ends_the_run_without_a_record(
    loaded: Loaded, tmp_path: Path, without_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_model()
    monkeypatch.setattr(Answerer, "answer", lambda *_: [replace(ANSWER, compressed=False)])
    with pytest.raises(EvaluationError, match="snapkv 24 leaves every layer of this model uncompressed"):
        go(loaded, tmp_path)
    with Records(tmp_path, {}) as records:
        assert records.done == {}


def test_an_answer_ends_at_the_token_of_a_stop_but_has_a_token(loaded: Loaded) -> None:
    answerer = Answerer(loaded.model, loaded.tokenizer, loaded.device)
    torch.compiler.reset()
    loaded.model.compile(backend="eager", dynamic=True)
    prompt = build(fact(), loaded.tokenizer, "question-aware")

    def told(most: int, *stop: str) -> Sequence[int]:
        [answer] = answerer.answer([prompt], most, stop)
        return answer.tokens

    assert loaded.tokenizer.decode(told(8)) == FACT, "the full stop ends it and is no part of it"
    assert loaded.tokenizer.decode(told(8, "canyon")) == "amber"
    assert len(told(2)) == 2
    # "amber" would be the first token.
    first = told(1, "amber")
    assert first
    assert loaded.tokenizer.decode(first) != "amber"


def test_fingerprints_tell_weights_apart(loaded: Loaded) -> None:
    before = fingerprint(loaded.model)
    assert before == fingerprint(load(str(RETRIEVER), "auto", "cpu").model)
    parameter = next(loaded.model.parameters())
    saved = parameter.detach().clone()
    with torch.no_grad():
        parameter.mul_(1.01)
        changed = fingerprint(loaded.model)
        parameter.copy_(saved)
    assert changed != before == fingerprint(loaded.model)
