"""The comparison of methods: figures against cases worked out by hand, and tasks chosen by the full cache alone."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adakv_compile.evaluation import ruler
from benchmarks.quality import earlier, samples
from benchmarks.quality.compare import answered, by_setting, difference, mean, overall, verdict
from benchmarks.quality.models import Trained, folders
from benchmarks.quality.parts import BUDGETS, MAIN, PARTS
from benchmarks.quality.report import markdown, write
from benchmarks.theory.prompts import of_sample

AWARE, AGNOSTIC = MAIN.protocols


def record(method: str, budget: int | None, score: float | None, **changed: Any) -> dict[str, Any]:
    values = {"protocol": AWARE, "seed": 0, "task": "niah_single_2", "index": 0, "kept": 9, "prompt_sha256": "00"}
    return {**values, "method": method, "budget": budget, "score": score, **changed}


def found(*scores: tuple[str, int, int, str, float]) -> list[dict[str, Any]]:
    """Return records of ``(method, seed, index, task, score)`` under a budget of 40."""
    return [record(m, 40, score, seed=seed, index=index, task=task) for m, seed, index, task, score in scores]


def test_a_mean_gives_every_task_the_same_weight_and_every_training_one_value() -> None:
    # Training 0: tasks at 100 and 50, so 75; training 1: 25 and 50, so 37.5. Half of 12.706 * 26.517 / sqrt(2) is wide.
    records = found(
        ("snapkv", 0, 0, "a", 1.0), ("snapkv", 0, 0, "b", 0.0), ("snapkv", 0, 1, "b", 1.0),
        ("snapkv", 1, 0, "a", 0.25), ("snapkv", 1, 0, "b", 0.5),
    )  # fmt: skip
    cell = mean(records)
    assert cell is not None
    assert (cell.mean, cell.half) == (pytest.approx(56.25), pytest.approx(12.706 * 26.5165 / 2**0.5, rel=1e-4))
    assert mean([]) is None


def test_differences_are_over_the_questions_that_both_answered() -> None:
    ours = found(("ada-snapkv", 0, 0, "a", 1.0), ("ada-snapkv", 0, 1, "a", 0.5), ("ada-snapkv", 1, 0, "a", 1.0))
    theirs = found(("snapkv", 0, 0, "a", 0.0), ("snapkv", 0, 1, "a", 0.5), ("snapkv", 2, 0, "a", 0.0))
    told = difference(ours, theirs)
    assert told is not None
    # +100 and 0: mean 50, standard error 70.71 / sqrt(2).
    assert (told.mean, told.error, told.pairs) == (pytest.approx(50), pytest.approx(50), 2)
    assert difference(ours, found(("snapkv", 9, 0, "a", 1.0))) is None


def test_a_question_is_one_observation_over_several_budgets() -> None:
    def at(method: str, *scores: float) -> list[dict[str, Any]]:
        return found(*((method, 0, index, "a", score) for index, score in enumerate(scores)))

    # Question 0: +100 and 0, so 50; question 1: 0 and 0. Four observations would have an error of 25.
    told = overall([(at("ada-snapkv", 1, 0), at("snapkv", 0, 0)), (at("ada-snapkv", 1, 1), at("snapkv", 1, 1))])
    assert told is not None
    assert (told.mean, told.error, told.pairs) == (pytest.approx(25), pytest.approx(50 / 2**0.5 / 2**0.5), 2)
    assert overall([]) is None


def test_a_side_needs_more_than_two_standard_errors() -> None:
    def of(*pairs: tuple[float, float]) -> Any:
        ours = found(*(("ada-snapkv", 0, i, "a", first) for i, (first, _) in enumerate(pairs)))
        return difference(ours, found(*(("snapkv", 0, i, "a", second) for i, (_, second) in enumerate(pairs))))

    sure, against, same, unsure = of((1, 0), (1, 0)), of((0, 1), (0, 1)), of((1, 1), (0, 0)), of((1, 0), (1, 1))
    assert verdict([sure, against, same, unsure, None]) == (1, 1, 2)


def test_answers_without_a_score_count_for_nothing() -> None:
    records = [record("snapkv", 40, None), record("snapkv", 40, 1.0, index=1)]
    assert [len(some) for some in by_setting(records).values()] == [1]


def test_questions_are_those_that_the_full_cache_answers_right() -> None:
    full = [record("full", None, 1.0), record("full", None, 0.75, index=1), record("full", None, None, index=2)]
    full += [record("full", None, 0.0, protocol=AGNOSTIC)]
    asked = [record("snapkv", 40, 0.0, index=index) for index in range(4)]
    asked += [record("snapkv", 40, 1.0, protocol=AGNOSTIC), record("snapkv", 40, 1.0, seed=1)]
    assert answered(asked, full) == asked[:1]


def test_tasks_are_chosen_by_the_full_cache_alone(tmp_path: Path) -> None:
    for seed, (first, second) in enumerate(((1.0, 0.99), (0.96, 0.96))):
        rows = [{"task": "a", "length": 1024, "mean": first}, {"task": "b", "length": 1024, "mean": second}]
        rows += [{"task": "c", "length": 512, "mean": 1.0}]
        (tmp_path / f"{seed}.json").write_text(json.dumps({"scores": rows}))
    files = sorted(tmp_path.iterdir())
    assert samples.learned(files, 1024) == ["a"], "0.98 and 0.975"
    assert samples.learned(files, 1024, 0.9) == ["a", "b"]
    assert samples.learned(files, 512) == ["c"]
    with pytest.raises(ValueError, match="no score at 2048 tokens"):
        samples.learned(files, 2048)


def test_the_parts_have_seven_budgets_and_both_protocols_and_differ_in_one_option() -> None:
    assert len(BUDGETS) == 7
    assert len(MAIN.settings) == 1 + 5 * 7
    assert len(MAIN.protocols) == 2
    for part in PARTS.values():
        assert len(part.options) == (part is not MAIN)
        wanted = {(setting.method, setting.budget) for setting in part.settings}
        assert wanted <= {(setting.method, setting.budget) for setting in MAIN.settings}, (
            "there is a default to compare"
        )


def test_the_page_has_every_cell_and_says_who_wins(tmp_path: Path) -> None:
    main = [record("full", None, 1.0, seed=0, index=i, protocol=p) for i in range(4) for p in MAIN.protocols]
    main += [record("full", None, 0.5, seed=0, index=4, protocol=AWARE)]
    main += [record("snapkv", 40, 1.0, index=4), record("ada-snapkv", 40, 0.0, index=4)]  # left out
    for index in range(4):
        for protocol in MAIN.protocols:
            main.append(record("snapkv", 40, 0.0, index=index, protocol=protocol))
            main.append(record("ada-snapkv", 40, 1.0 if protocol == AWARE else 0.0, index=index, protocol=protocol))
    hard = [record("ada-snapkv", 40, 0.5, index=index) for index in range(4)]
    page = markdown({"trainings": 2}, {"main": main, "safeguard=hard": hard})
    assert "| question-aware | niah_single_2 | 90.00 | 5 | 4 |" in page
    assert "Of 2 cells of a task, a budget and a protocol, 1 are for ada-snapkv" in page
    assert "| question-aware | niah_single_2 | +100.00 ± 0.00 | +100.00 ± 0.00 |" in page
    assert "| safeguard=hard | ada-snapkv | -50.00 ± 0.00 | -50.00 ± 0.00 |" in page
    assert "Questions without an answer: 0." in page
    write({}, {"main": main, "safeguard=hard": hard}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"quality.md", "quality.png", "quality.csv.gz"}
    rows = list(csv.DictReader(gzip.decompress((tmp_path / "quality.csv.gz").read_bytes()).decode().splitlines()))
    assert len(rows) == len(main) + len(hard)
    assert rows[-1] | {"score": "0.5", "part": "safeguard=hard"} == rows[-1]


def test_the_page_says_what_every_head_keeps_where_records_do() -> None:
    main = [record("full", None, 1.0, index=index) for index in range(2)]
    main += [record("ada-snapkv", 96, 1.0, index=i, heads=[[90 + i, 102 - i], [i, 192 - i]]) for i in (0, 1)]
    main.append(record("ada-snapkv", 96, 1.0, protocol=AGNOSTIC, heads=[[0, 192], [0, 192]]))
    main.append(record("ada-snapkv", 40, 1.0, heads=[[80, 0], [80, 0]]))
    page = markdown({}, {"main": main})
    assert "| training | layer | head 0 | head 1 |" in page
    assert "| 0 | 0 | 90 | 102 |" in page, "halves are rounded to even"
    assert "| 0 | 1 | 0 | 192 |" in page
    for told in main:
        told.pop("heads", None)
    assert "Entries of every KV head" not in markdown({}, {"main": main})


def test_entering_a_training_puts_its_weights_into_the_decoder() -> None:
    trained = Trained(folders())
    assert len(trained.seeds) >= 3
    assert len(set(trained.fingerprints.values())) == len(trained.seeds), "no two are one"
    name = "model.layers.0.self_attn.q_proj.weight"
    seen = []
    for seed in (*trained.seeds, trained.seeds[0]):
        trained.enter(seed)
        seen.append(trained.network.get_parameter(name).detach().clone())
    assert (seen[0] == seen[-1]).all()
    assert not (seen[0] == seen[1]).all()


def test_a_folder_without_trainings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no weights"):
        folders(tmp_path)


@pytest.mark.parametrize("task", ["niah_multikey_1", "niah_multiquery"])
def test_the_theory_reads_what_the_test_bed_was_taught_to_answer(task: str) -> None:
    tokenizer = Trained(folders()).tokenizer
    [sample] = samples.make(tokenizer, [task], 512, 1, 0)
    prompt = of_sample(sample, tokenizer)
    told = tokenizer.decode(prompt.answer[:-1])
    assert [part.split(" is: ")[1] for part in told.removesuffix(".").split(". ")] == list(sample.answers)
    assert tokenizer.decode(prompt.question).endswith("provided text are" if "query" in task else "provided text is")
    with pytest.raises(ValueError, match="asks for 1 keys and has 4 answers"):
        of_sample(next(ruler.samples("niah_multivalue", tokenizer, 512, 1, 0)), tokenizer)


def test_an_earlier_table_says_what_its_records_said(tmp_path: Path) -> None:
    records = [
        record("full", None, 1.0),
        record("snapkv", 40, 1.0),
        record("snapkv", 40, 0.5, protocol=AGNOSTIC, seed=2, index=3),
        record("snapkv", 40, None, index=4, kept=None),
    ]
    write({}, {"main": records, "gqa=max": records[2:]}, tmp_path)
    assert earlier.read(tmp_path / "quality.csv.gz") == {"main": records, "gqa=max": records[2:]}


def test_an_earlier_run_with_other_questions_is_no_base() -> None:
    base = [record("full", None, 1.0, index=index, prompt_sha256=str(index)) for index in range(3)]
    earlier.check_questions(base, [record("snapkv", 40, 0.0, index=1, prompt_sha256="1")])
    for other in ({"index": 1, "prompt_sha256": "2"}, {"index": 3, "prompt_sha256": "3"}, {"seed": 1}):
        with pytest.raises(ValueError, match="in these words"):
            earlier.check_questions(base, [record("snapkv", 40, 0.0, **{"prompt_sha256": "0", **other})])
