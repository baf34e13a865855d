"""LongBench's prompts, how they are cut, and where its rows come from."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adakv_compile.evaluation import longbench, longbench_rows
from adakv_compile.evaluation.errors import EvaluationError


class Words:
    """A tokenizer of words with one special token at the beginning."""

    def __init__(self) -> None:
        self.known: list[str] = ["<s>"]

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> Any:
        ids: list[int] = [0] if add_special_tokens else []
        for word in re.findall(r"\S+\s*", text):
            if word not in self.known:
                self.known.append(word)
            ids.append(self.known.index(word))
        return SimpleNamespace(input_ids=ids)

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(self.known[i] for i in ids if i)


def row(context: str, asked: str = "why ?", **more: Any) -> dict[str, Any]:
    return {"context": context, "input": asked, "answers": ["yes"], "all_classes": None, "length": 5, **more}


def numbers(count: int) -> str:
    return " ".join(f"w{i}" for i in range(count))


def test_there_are_3750_rows_in_16_data_sets() -> None:
    assert len(longbench.DATASETS) == 16
    assert sum(facts.rows for facts in longbench.DATASETS.values()) == 3750


def test_every_data_set_has_a_prompt_with_one_context_and_a_length() -> None:
    for dataset in longbench.DATASETS:
        assert longbench.template(dataset).count("{context}") == 1
        assert longbench.max_new_tokens(dataset) in (32, 64, 128, 512)
    assert longbench.max_new_tokens("gov_report") == 512
    assert longbench.max_new_tokens("hotpotqa") == 32


def test_chat_templates_are_left_out_where_the_prompt_shows_examples_or_code() -> None:
    without = {dataset for dataset, facts in longbench.DATASETS.items() if not facts.chat}
    assert without == {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}


@pytest.mark.parametrize(
    ("positions", "longest"),
    [(4096, 3500), (8192, 7500), (32768, 31500), (131072, 31500), (None, 31500), (2048, 1500), (1000, 500), (1, 1)],
)
def test_longest_prompt_by_the_positions_of_the_model(positions: int | None, longest: int) -> None:
    assert longbench.longest_prompt(positions) == longest


def test_a_prompt_is_its_template_filled_in() -> None:
    (sample,) = longbench.samples("qmsum", [row("A: hello {input}", "What?")], Words(), 1000)
    wanted = longbench.template("qmsum").replace("{input}", "What?").replace("{context}", "A: hello {input}")
    assert sample.joined == sample.context + sample.question == wanted
    assert sample.question.startswith("\n\nNow, answer the query")
    assert sample.question.endswith("Query: What?\nAnswer:")
    assert (sample.answers, sample.metric, sample.max_new_tokens, sample.chat) == (("yes",), "rouge_l", 512, True)


def test_a_summary_has_only_its_instruction_as_the_question() -> None:
    (sample,) = longbench.samples("gov_report", [row("text", "")], Words(), 1000)
    assert sample.question == "\n\nNow, write a one-page summary of the report.\n\nSummary:"


def test_only_samsum_stops_at_a_line() -> None:
    for dataset in longbench.DATASETS:
        (sample,) = longbench.samples(dataset, [row("text")], Words(), 1000)
        assert sample.stop == (("\n",) if dataset == "samsum" else ())


def test_the_middle_is_cut_out_at_half_the_length_special_tokens_counted() -> None:
    assert longbench.truncated(Words(), numbers(9), 10) == numbers(9)
    # Ten tokens and the special one: five of the first half are it and four words, five of the second half words.
    assert longbench.truncated(Words(), numbers(10), 10) == "w0 w1 w2 w3 w5 w6 w7 w8 w9"
    # An odd length loses one more: half of it is rounded down.
    assert longbench.truncated(Words(), numbers(10), 9) == "w0 w1 w2 w6 w7 w8 w9"


def test_the_context_alone_is_cut_where_the_whole_prompt_is() -> None:
    words = Words()
    (sample,) = longbench.samples("triviaqa", [row(numbers(500), "who was it ?")], words, 60)
    assert sample.joined.endswith(sample.question)
    assert sample.context + sample.question == sample.joined
    assert len(words(sample.context).input_ids) < 60


def test_a_question_longer_than_half_stays_whole_and_leaves_the_beginning_only() -> None:
    (sample,) = longbench.samples("triviaqa", [row(numbers(500), numbers(40))], Words(), 60)
    assert sample.question == "\n\n" + numbers(40)
    assert sample.context.startswith("Answer the question")
    assert "w499" not in sample.context


def write(folder: Path, dataset: str, rows: int) -> None:
    lines = [
        json.dumps(row(f"context {i}") | {"_id": str(i), "dataset": dataset, "language": "en"}) for i in range(rows)
    ]
    folder.mkdir(exist_ok=True)
    (folder / f"{dataset}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_rows_of_a_folder_and_of_the_archive(tmp_path: Path) -> None:
    write(tmp_path / "data", "multifieldqa_en", 150)
    assert longbench_rows.load_rows("multifieldqa_en", tmp_path)[149]["context"] == "context 149"
    apart = tmp_path / "apart"
    apart.mkdir()
    with zipfile.ZipFile(apart / "data.zip", "w") as archive:
        archive.write(tmp_path / "data" / "multifieldqa_en.jsonl", "data/multifieldqa_en.jsonl")
    rows = longbench_rows.collect(["multifieldqa_en"], apart, count=3)
    dataset, found = rows["multifieldqa_en"]
    assert (dataset, [r["answers"] for r in found]) == ("multifieldqa_en", [["yes"]] * 3)


def test_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "qasper", 199)
    with pytest.raises(EvaluationError, match=r"199 rows .* LongBench has 200"):
        longbench_rows.load_rows("qasper", tmp_path)


@pytest.mark.parametrize(
    ("content", "told"), [(b"PK no archive", "is not LongBench's archive"), (None, "is not LongBench's")]
)
def test_a_damaged_archive_is_refused(tmp_path: Path, content: bytes | None, told: str) -> None:
    if content is None:
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            archive.writestr("data/other.jsonl", "{}")
    else:
        (tmp_path / "data.zip").write_bytes(content)
    with pytest.raises(EvaluationError, match="is not LongBench's archive"):
        longbench_rows.load_rows("qasper", tmp_path)


def test_a_file_without_json_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "qasper.jsonl").write_text("<html>", encoding="utf-8")
    with pytest.raises(EvaluationError, match="holds no JSON lines"):
        longbench_rows.load_rows("qasper", tmp_path)


@pytest.mark.parametrize("folder", ["empty", None])
def test_missing_rows_are_told_with_the_command_that_fetches_them(
    tmp_path: Path, folder: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache, and offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(EvaluationError, match=r"hf download THUDM/LongBench data.zip --repo-type dataset"):
        longbench_rows.collect(["qasper"], tmp_path if folder else None, 0)


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="there is no folder"):
        longbench_rows.collect(["qasper"], tmp_path / "none", 0)


MEETING = {
    "general_query_list": [{"query": "Summarize.", "answer": "They met."}],
    "specific_query_list": [{"query": "Who?", "answer": "Two.", "relevant_text_span": [["0", "1"]]}],
    "meeting_transcripts": [{"speaker": "A", "content": "Hello ."}, {"speaker": "B", "content": "Bye ."}],
}


def test_qmsums_own_meetings_get_a_name_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(MEETING) + "\n" + json.dumps(MEETING) + "\n", encoding="utf-8")
    rows = longbench_rows.collect(["qmsum"], tmp_path, 3)
    assert list(rows) == ["qmsum_test"]
    dataset, found = rows["qmsum_test"]
    assert dataset == "qmsum"
    assert [r["input"] for r in found] == ["Summarize.", "Who?", "Summarize."]
    assert found[1]["context"] == "A: Hello .\nB: Bye ."
    assert found[1]["answers"] == ["Two."]


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '{"meeting_transcripts": []}'])
def test_a_file_that_is_not_qmsums_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "test.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(EvaluationError, match="is not QMSum's test split"):
        longbench_rows.qmsum_rows(tmp_path)
