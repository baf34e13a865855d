"""Tables, intervals and paired differences against figures computed by hand."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from adakv_compile.evaluation import plots, report, summary
from adakv_compile.evaluation.statistics import interval, paired
from tests.evaluation.samples import record


def test_interval_is_students_with_one_degree_of_freedom_less_than_values() -> None:
    # Standard deviation 1, three values, quantile 4.303.
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.303 / 3**0.5)
    assert str(interval([97.5])) == "97.50"


@pytest.mark.parametrize(("degrees", "quantile"), [(15, 2.131), (16, 2.120), (30, 2.042), (120, 1.980)])
def test_interval_of_many_values(degrees: int, quantile: float) -> None:
    values = [float(i % 2) for i in range(degrees + 1)]
    mean = sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / degrees) ** 0.5
    assert interval(values).half == pytest.approx(quantile * deviation / len(values) ** 0.5, rel=0.01)


def test_paired_difference_has_the_standard_error_of_the_differences() -> None:
    found = paired([(1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0)])
    # Differences 100, 0, 0, 100: deviation 57.735, divided by 2.
    assert (found.mean, found.pairs) == (50.0, 4)
    assert found.error == pytest.approx(28.8675, abs=1e-3)
    assert paired([(0.5, 1.0)]).error is None


def test_data_sets_are_columns_and_the_average_is_of_their_rounded_scores() -> None:
    records = [
        *(record(task="one", index=i, score=s) for i, s in enumerate([1.0, 0.0, 0.0])),
        record(task="two", score=0.5),
        record(method="full", budget=None, task="one"),
    ]
    (table,) = summary.scores(records)
    assert table.title == "question-aware"
    assert table.header == ("method", "budget", "one", "two", "average", "samples", "crashed")
    # A method that lacks a data set has no average: it would be of something else.
    assert table.rows == (
        ("snapkv", "16", "33.33", "50.00", f"{(33.33 + 50) / 2:.2f}", "4", "0"),
        ("full", "all", "100.00", "-", "-", "1", "0"),
    )


def test_rows_that_crashed_are_counted_and_not_scored() -> None:
    (table,) = summary.scores([record(), record(index=1, score=None, error="RuntimeError: x")])
    assert table.rows == (("snapkv", "16", "100.00", "100.00", "2", "1"),)
    (table,) = summary.scores([record(score=None)])
    assert table.rows == (("snapkv", "16", "-", "-", "1", "1"),)


def test_several_seeds_give_an_interval_over_their_scores() -> None:
    records = [
        record(seed=seed, index=i, score=s) for seed, pair in enumerate([(1, 1), (1, 0)]) for i, s in enumerate(pair)
    ]
    (table,) = summary.scores(records)
    # 100 and 50: deviation 35.355, quantile 12.706.
    assert table.rows[0][2] == f"75.00 ± {12.706 * 35.35534 / 2**0.5:.2f}"


def test_protocols_and_lengths_have_tables_of_their_own_but_needles_have_lengths_as_columns() -> None:
    ruler = [record(length=n, protocol=p) for n in (1024, 4096) for p in ("question-aware", "question-agnostic")]
    assert len(summary.scores(ruler)) == 4
    needle = [record(length=n, index=i, task="needle", meta={"depth": 0}) for i, n in enumerate((1024, 4096))]
    (table,) = summary.scores(needle)
    assert table.header[2:4] == ("1,024", "4,096")


def test_differences_are_between_the_same_samples_at_the_same_budget() -> None:
    ours = [record(method="ada-snapkv", index=i, score=s) for i, s in enumerate([1.0, 1.0, 1.0])]
    theirs = [record(index=0, score=0.0), record(index=1, score=1.0), record(index=2, score=None)]
    other = [record(method="ada-snapkv", budget=32), record(method="full", budget=None)]
    (table,) = summary.differences([*ours, *theirs, *other])
    assert table.rows == (("ada-snapkv", "16", "+50.00 ± 50.00", "+50.00 ± 50.00", "2"),)


def test_there_are_no_differences_without_the_baseline() -> None:
    assert summary.differences([record(method="ada-snapkv")]) == []


def test_csv_has_a_line_for_each_cell() -> None:
    lines = list(csv.reader(io.StringIO(summary.as_csv(summary.scores([record()])))))
    assert lines[0] == ["table", "method", "budget", "column", "value"]
    assert ["question-aware", "snapkv", "16", "facts", "100.00"] in lines


def test_markdown_has_as_many_cells_in_every_line() -> None:
    lines = [line for line in summary.as_markdown(summary.scores([record()])).splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1


def test_a_run_leaves_tables_and_pictures(tmp_path: Path) -> None:
    places = [(n, d) for n in (1024, 2048) for d in (0, 50)]
    records = [
        record(method=method, budget=budget, index=i, length=n, meta={"depth": d}, heads=[[9, 3], [4]])
        for method, budget in (("full", None), ("snapkv", 16), ("ada-snapkv", 16), ("ada-snapkv", 0.1))
        for i, (n, d) in enumerate(places)
    ]
    files = report.write(records, tmp_path, "# needle: m")
    names = ["summary.md", "summary.csv", *(f"{n}-question-aware.png" for n in ("scores", "heads", "needle"))]
    assert [file.name for file in files] == names
    assert all(file.stat().st_size > 100 for file in files)
    assert "## Paired differences" in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_nothing_is_drawn_of_samples_without_a_score(tmp_path: Path) -> None:
    assert plots.draw([record(score=None)], tmp_path) == []


def test_the_full_cache_alone_has_no_heads_to_draw(tmp_path: Path) -> None:
    assert [file.name for file in plots.draw([record(method="full", budget=None)], tmp_path)] == [
        "scores-question-aware.png"
    ]
