"""The GPU benchmark runs from end to end on a CPU, and what of it is no measurement is right."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import checks, child, decode, report
from benchmarks.gpu.__main__ import PARTS, Wanted, measure
from benchmarks.gpu.run import Row, Run, read_rows
from benchmarks.gpu.shapes import LLAMA, Budget, head_lengths
from benchmarks.gpu.targets import TARGETS

ROOT = Path(__file__).parents[2]
TIMED = tuple(part for part in PARTS if part != "checks")


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("mean", [1, 128, 13_107, 26_214])
def test_head_lengths_have_exactly_the_total_and_the_ratio(heads: int, mean: int) -> None:
    for skew in range(1, heads + 1):
        lengths = head_lengths(mean, heads, skew)
        assert len(lengths) == heads
        assert sum(lengths) == heads * mean
        assert max(lengths) == skew * mean
        assert min(lengths) >= 0


def test_a_ratio_that_no_lengths_have_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 4 times the mean, not 5"):
        head_lengths(10, 4, 5)


def test_no_timed_head_holds_more_than_the_context() -> None:
    cases = [case for group in decode.cases(smoke=False) for case in group]
    assert {case.batch for case in cases} == {1, 8, 32}
    assert {case.context for case in cases} == set(LLAMA.contexts)
    assert {1, 2, 4, 8} <= {case.skew for case in cases}
    assert all(case.skew * case.mean <= case.context for case in cases)


@pytest.mark.parametrize(("value", "text", "entries"), [(0.1, "10%", 13_107), (1024, "1024", 1024)])
def test_budgets(value: float, text: str, entries: int) -> None:
    assert (str(Budget(value)), Budget(value).entries(131_072)) == (text, entries)


def test_tables() -> None:
    assert report.table(["a", "b"], [(None, 1.23456), ("x|y", 12345.6)]) == (
        "| a | b |\n| --- | --- |\n| - | 1.23 |\n| x/y | 12346 |"
    )
    assert report.table(["a"], []) == ""


def _decode_row(**values: Any) -> Row:
    times = {name: {"us": us, "low": us, "high": us} for name, us in values.pop("times").items()}
    row = {"part": "decode", "kind": "case", "batch": 1, "context": 131_072, "budget": "10%", "entries": 13_107}
    return {**row, "skew": 8, "floor_us": 10.0, "times": times, **values}


def _end_to_end_row(kind: str, way: str, ms: float, **values: Any) -> Row:
    row = {"part": "end_to_end", "kind": kind, "way": way, "batch": 1, "context": 131_072, "ms": ms, "low": ms}
    return {**row, "high": ms, "floor_ms": 1.0, "first_call_s": 1.0, **values}


def _compression_row(op: str, us: float) -> Row:
    budget = {} if op == "observe" else {"budget": "10%"}
    row = {"part": "compression", "kind": "case", "op": op, "context": 131_072, "floor_us": 1.0, **budget}
    return {**row, "times": {"adakv": {"us": us}}}


def test_targets_are_judged_by_the_worst_case() -> None:
    rows = [
        _decode_row(times={"adakv": 12.0, "varlen heads": 11.0, "varlen rows": 40.0}, share_of_copy=0.85),
        _decode_row(times={"adakv": 12.0, "varlen heads": 30.0}, share_of_copy=0.9, skew=1),
        _decode_row(times={"adakv": 4.0}, budget="128", entries=128, launches=1),
        *(_compression_row(op, us) for op, us in (("observe", 100.0), ("select", 60.0), ("compact", 40.0))),
        _end_to_end_row("prefill", "adakv", 8040.0),
        _end_to_end_row("prefill", "inductor", 8000.0),
        _end_to_end_row("decode", "adakv graphs", 4.0, recordings=3, doublings=3),
        _end_to_end_row("decode", "static graphs", 8.0, recordings=0, doublings=0),
    ]
    assert [(target.figure(rows), target.verdict(rows)) for target in TARGETS] == [
        (0.85, "met"),
        (pytest.approx(11 / 12), "not met"),
        (4.0, "met"),
        (1, "met"),
        (60.0, "not met"),
        (pytest.approx(0.005), "met"),
        (pytest.approx(32 * 0.2 / 8000), "met"),
        (None, "not measured"),
        (None, "not measured"),
        (2.0, "met"),
        (None, "not measured"),
        (0, "met"),
    ]
    text = report.markdown([{"part": "all", "kind": "machine", "gpu": "none"}, *rows])
    for part in ("## Targets", "| not met |", "gpu none", "11 (0.92x)", "+0.50%", "0.08%", "| 2.00x |"):
        assert part in text


def test_every_target_says_where_it_comes_from() -> None:
    assert len({target.name for target in TARGETS}) == len(TARGETS)
    assert all(target.source and target.figure([]) is None for target in TARGETS)


def test_a_part_says_what_it_had_no_time_for(tmp_path: Path) -> None:
    run = Run("decode", tmp_path / "rows.jsonl", time.time() + 10, smoke=True)
    assert run.has_time("something short", 5)
    assert not run.has_time("something long", 60)
    (row,) = read_rows(run.rows)
    assert (row["kind"], row["what"]) == ("skipped", "something long")
    assert "60 s needed" in row["why"]


def test_what_raises_is_a_result_unless_it_spoilt_the_device(tmp_path: Path) -> None:
    run = Run("decode", tmp_path / "rows.jsonl", time.time() + 10, smoke=True)
    with run.attempt("a case"):
        raise RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="illegal"), run.attempt("another case"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    first, second = read_rows(run.rows)
    assert (first["kind"], first["what"], first["why"]) == ("failed", "a case", "RuntimeError: shapes differ")
    assert any("test_gpu_smoke.py" in line for line in first["trace"])
    assert second["what"] == "another case"


def test_what_was_not_captured_is_said(tmp_path: Path) -> None:
    row = _decode_row(times={"adakv": 12.0})
    row["times"]["adakv"]["graph"] = False
    assert "| no graph | adakv, 1 cases | could not be captured" in report.markdown([row])


def test_a_line_that_a_killed_process_left_unfinished_is_dropped(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"kind": "case"}\n{"kind": "ca')
    assert read_rows(rows) == [{"kind": "case"}]


Start = Callable[[str, Path, float, bool, Sequence[str]], str | None]


def _starting(died: str | None = None) -> tuple[list[str], Start]:
    """Return the parts that were started, and a way to start them that only notes it."""
    started: list[str] = []

    def start(part: str, rows: Path, deadline: float, smoke: bool, names: Sequence[str]) -> str | None:
        started.append(part)
        Run(part, rows, deadline, smoke).note(f"{part} was here")
        return "exit status -11; last words: none" if part == died else None

    return started, start


def test_parts_without_time_are_skipped(tmp_path: Path) -> None:
    started, start = _starting()
    assert measure(Wanted(TIMED, tmp_path, 0.0, smoke=True), start) == 0
    assert started == []
    text = (tmp_path / "gpu.jsonl").read_text()
    assert [row["part"] for row in read_rows(tmp_path / "gpu.jsonl") if row["kind"] == "skipped"] == list(TIMED), text


def test_a_part_that_crashes_costs_no_other(tmp_path: Path) -> None:
    started, start = _starting(died="decode")
    assert measure(Wanted(TIMED, tmp_path, 100.0, smoke=True), start) == 1
    assert started == list(TIMED)
    text = (tmp_path / "gpu.md").read_text()
    assert "exit status -11" in text
    assert all(f"{part} was here" in text for part in TIMED)


def test_nothing_is_timed_if_a_check_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "names", lambda: (["compact/good", "compact/bad"], []))
    started: list[str] = []

    def start(part: str, rows: Path, deadline: float, smoke: bool, names: Sequence[str]) -> None:
        started.append(part)
        run = Run(part, rows, deadline, smoke)
        for name in names:
            run.write("started", name=name)
            run.write("check", name=name, passed=name == "compact/good", why="wrong by 3")

    assert measure(Wanted(PARTS, tmp_path, 100.0, smoke=True), start) == 1
    assert started == ["checks"]
    text = (tmp_path / "gpu.md").read_text()
    assert "1 of 2 passed" in text
    assert "| compact/bad | wrong by 3 |" in text


def test_a_check_that_kills_its_process_costs_no_other(tmp_path: Path) -> None:
    def start(rows: Path, names: Sequence[str]) -> str | None:
        run = Run("checks", rows, 0.0, smoke=True)
        for name in names:
            run.write("started", name=name)
            if name == "deadly":
                return "exit status -11"
            run.write("check", name=name, passed=True)
        return None

    rows = checks.run_all(["a", "b", "deadly", "c", "d", "e"], 2, tmp_path, start)
    assert {row["name"]: row["passed"] for row in rows} == dict.fromkeys("abcde", True) | {"deadly": False}


def test_a_process_that_can_not_start_ends_the_checks(tmp_path: Path) -> None:
    rows = checks.run_all(["a", "b"], 1, tmp_path, lambda rows, names: "exit status 1")
    assert [(row["name"], row["why"]) for row in rows] == [("a", "exit status 1")]


def test_a_child_that_raises_says_why(tmp_path: Path) -> None:
    why = child.start("no_such_part", tmp_path / "rows.jsonl", time.time() + 30, smoke=True)
    assert why is not None
    assert "No module named 'benchmarks.gpu.no_such_part'" in why


def test_without_a_gpu_only_smoke_runs() -> None:
    code = "import torch; torch.cuda.is_available = lambda: False; from benchmarks.gpu.__main__ import main; main([])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


def test_smoke(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--minutes", "8", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert rows[0]["smoke"] == report.SMOKE
    assert not [row for row in rows if row["kind"] in ("failed", "crashed")]
    cases = [row for row in rows if row["kind"] == "case"]
    assert {row.get("op", row["part"]) for row in cases} == {"decode", "observe", "select", "compact"}
    assert all("us" in row["times"]["adakv"] for row in cases)
    ways = {(row["kind"], row["way"]) for row in rows if row["part"] == "end_to_end" and "way" in row}
    assert ways == {
        *(("prefill", way) for way in ("adakv", "inductor")),
        *(("decode", way) for way in ("adakv", "adakv graphs", "inductor", "static graphs")),
    }
    text = (tmp_path / "gpu.md").read_text()
    assert report.SMOKE in text
    assert "## Targets" not in text
