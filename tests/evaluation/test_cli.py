"""``adakv eval``: whole command lines, and what each kind of bad input is answered with."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adakv_compile.evaluation import needle, runner
from adakv_compile.evaluation.answer import Answerer
from adakv_compile.evaluation.metrics import METRICS
from adakv_compile.evaluation.sample import Sample
from tests.cli.inputs import run
from tests.evaluation.samples import FACT, RETRIEVER, fact

FULL = ("--methods", "full", "--inner", "eager")


def texts(*_: Any, **__: Any) -> Iterator[Sample]:
    return (fact(index) for index in range(3))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the packaged model what it was taught to answer, and compile nothing."""
    monkeypatch.setattr(needle, "samples", texts)
    monkeypatch.setattr(runner, "_compile", lambda *_: None)


def evaluate(benchmark: str, out: Path, *flags: object, model: object = RETRIEVER) -> Any:
    return run("eval", benchmark, "--model", model, "--out", out, *flags)


def assert_refused(result: Any, *messages: str) -> None:
    output = " ".join(result.output.split())
    assert result.exit_code == 2, result.output
    assert "error:" in output
    assert "Traceback" not in output
    for message in messages:
        assert message in output


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("quick")
def test_a_run_leaves_records_tables_and_pictures(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = evaluate("needle", out, *FULL, "--length", 256)
    assert result.exit_code == 0, result.output
    records = lines(out)
    assert [record["prediction"] for record in records] == [FACT] * 3
    for name in ("prompt_sha256", "prompt_tokens", "score", "kept", "bytes_held", "prefill_seconds", "step_seconds"):
        assert all(name in record for record in records)
    assert "| full | all | 100.00 |" in result.stdout
    assert {"config.json", "summary.md", "summary.csv"} <= {file.name for file in out.iterdir()}
    configuration = json.loads((out / "config.json").read_text())
    assert configuration["settings"] == [["full", None]]
    assert len(configuration["weights"]) == 64


@pytest.mark.usefixtures("quick")
def test_ctrl_c_saves_what_there_is_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    answer = Answerer.answer

    def interrupted(*arguments: Any) -> Any:
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(Answerer, "answer", interrupted)
    result = evaluate("needle", tmp_path, *FULL, "--length", 256)
    assert result.exit_code == 130
    assert "Stopped with 2 of 3 answers" in " ".join(result.output.split())
    assert "same command continues" in " ".join(result.output.split())
    assert len(lines(tmp_path)) == 2
    assert evaluate("needle", tmp_path, *FULL, "--length", 256).exit_code == 0
    assert [record["index"] for record in lines(tmp_path)] == [0, 1, 2]
    assert len(asked) == 4


@pytest.mark.usefixtures("quick")
def test_a_row_that_crashes_the_model_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answerer.answer
    crashes = iter((False, True, False))

    def crashing(*arguments: Any) -> Any:
        if next(crashes):
            raise RuntimeError("CUDA error: an illegal memory access")
        return answer(*arguments)

    monkeypatch.setattr(Answerer, "answer", crashing)
    result = evaluate("needle", tmp_path, *FULL, "--length", 256)
    assert result.exit_code == 0, result.output
    assert "1 samples could not be answered" in " ".join(result.output.split())
    assert lines(tmp_path)[1]["error"] == "RuntimeError: CUDA error: an illegal memory access"


@pytest.mark.usefixtures("quick")
def test_another_configuration_is_refused(tmp_path: Path) -> None:
    assert evaluate("needle", tmp_path, *FULL, "--length", 256).exit_code == 0
    other = evaluate("needle", tmp_path, *FULL, "--length", 256, "--seeds", "0,1")
    assert_refused(other, "belongs to another evaluation", "seeds is [0] there and [0, 1] here")


@pytest.mark.usefixtures("quick")
def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert_refused(evaluate("needle", tmp_path, *FULL, "--length", 256), "is not empty", "thesis.tex")


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(RETRIEVER / name, bare)
    assert_refused(evaluate("needle", tmp_path / "out", *FULL, "--length", 256, model=bare), "with a tokenizer")
    assert not (tmp_path / "out").exists()


def test_a_length_beyond_the_model_is_refused(tmp_path: Path) -> None:
    for benchmark in ("needle", "ruler"):
        result = evaluate(benchmark, tmp_path / "out", *FULL, "--length", "1024,4096")
        assert_refused(result, "has 2,048 positions; a length of 4,096 is too long")


@pytest.mark.parametrize("data", [True, False])
def test_a_missing_data_set_is_told_with_the_command_that_fetches_it(
    tmp_path: Path, data: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache, and offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    flags = ("--data", tmp_path) if data else ()
    result = evaluate("longbench", tmp_path / "out", *FULL, "--datasets", "qasper", *flags)
    assert_refused(result, "hf download THUDM/LongBench data.zip --repo-type dataset")


def test_a_missing_package_is_told_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "rouge" else find(name, *rest))
    result = evaluate("longbench", tmp_path / "out", *FULL, "--datasets", "qasper", "--data", tmp_path)
    assert_refused(result, "rouge is not installed", "adakv_compile[eval]")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--methods", "snapvk"), "did you mean 'snapkv'"),
        (("--budgets", "few"), "budget 'few'"),
        (("--budgets", "16"), "observation window of 32"),
        (("--protocol", "aware"), "unknown protocol 'aware'; allowed: question-aware, question-agnostic"),
        (("--seeds", "one"), "--seeds is 'one'"),
        (("--seeds", ","), "--seeds is ','"),
        (("--length", "-5"), "--length is '-5'"),
        (("--option", "budget=3"), "--budgets"),
        (("--option", "kernel_sise=3"), "did you mean 'kernel_size'"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_loaded(tmp_path: Path, flags: tuple[str, ...], told: str) -> None:
    assert_refused(evaluate("needle", tmp_path, *flags, model=tmp_path / "no model"), told)


@pytest.mark.parametrize(
    ("benchmark", "flags", "told"),
    [
        ("ruler", ("--tasks", "niah"), "unknown task 'niah'; allowed: niah_single_1"),
        ("longbench", ("--datasets", "dureader"), "unknown data set 'dureader'; allowed: narrativeqa"),
        ("needle", ("--depths", "deep"), "--depths is 'deep'"),
    ],
)
def test_unknown_tasks_are_told(tmp_path: Path, benchmark: str, flags: tuple[str, ...], told: str) -> None:
    assert_refused(evaluate(benchmark, tmp_path, *flags), told)


def test_help_shows_the_three_benchmarks() -> None:
    output = run("eval", "--help").output
    assert all(name in output for name in ("needle", "ruler", "longbench"))


@pytest.mark.usefixtures("quick")
def test_the_benchmarks_own_texts_go_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(runner, "_compile", lambda *_: None)
    flags = (*FULL, "--length", "400", "--count", 1)
    assert evaluate("needle", tmp_path / "needle", *flags, "--depths", "0,100").exit_code == 0
    assert [record["meta"]["depth"] for record in lines(tmp_path / "needle")] == [0, 100]
    (tmp_path / "needle" / "needle-question-aware.png").stat()
    assert evaluate("ruler", tmp_path / "ruler", *flags, "--tasks", "niah_single_1,vt").exit_code == 0
    assert [record["task"] for record in lines(tmp_path / "ruler")] == ["niah_single_1", "vt"]


def test_qmsum_runs_offline_on_its_own_transcripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rouge")
    monkeypatch.setattr(runner, "_compile", lambda *_: None)
    said = [{"speaker": "the", "content": "remember alice amber canyon velvet ."}] * 20
    meeting = {
        "general_query_list": [{"query": "recall alice", "answer": "amber canyon"}],
        "specific_query_list": [],
        "meeting_transcripts": said,
    }
    (tmp_path / "test.jsonl").write_text(json.dumps(meeting))
    out = tmp_path / "out"
    result = evaluate("longbench", out, *FULL, "--datasets", "qmsum", "--data", tmp_path, "--max-length", 100)
    assert result.exit_code == 0, result.output
    (record,) = lines(out)
    assert record["task"] == "qmsum_test"
    assert record["score"] == METRICS["rouge_l"](record["prediction"], ["amber canyon"], ())
