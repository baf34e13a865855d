"""The CPU benchmark runs from end to end, and what of it is no measurement is right."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cpu import against, caches
from benchmarks.cpu.__main__ import Wanted, main, measure
from benchmarks.cpu.decode_op import Case, sealed
from benchmarks.cpu.decoders import TINY, build
from benchmarks.cpu.memory import bytes_of
from benchmarks.cpu.parts import OPTIONAL, PARTS
from benchmarks.cpu.report import SMOKE, markdown
from benchmarks.cpu.run import Run, at_least, at_most, ratios, spread
from benchmarks.cpu.timing import interleave
from benchmarks.part import Row, read_rows

ROOT = Path(__file__).parents[2]


def test_a_spread() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3, "low": 2, "high": 4, "min": 1, "max": 5, "count": 5}
    assert spread([7.0])["low"] == 7.0


def test_ratios_are_of_rounds() -> None:
    assert ratios([[1, 2, 30], [4]], [[1], [2, 2]]) == [2, 2]


def test_contenders_take_turns_and_none_is_always_first() -> None:
    called: list[str] = []
    contenders = {name: lambda name=name: called.append(name) for name in "ab"}
    times = interleave(contenders, rounds=3, calls=2, warm=1)
    assert "".join(called) == "ab" + "aabb" + "bbaa" + "aabb"
    assert [len(each) for each in times["a"]] == [2, 2, 2]


def test_no_round_begins_behind_the_deadline_but_the_first_two() -> None:
    assert len(interleave({"a": lambda: None}, rounds=9, calls=1, deadline=time.time() - 1)["a"]) == 2


def test_a_target_is_judged_by_the_median(tmp_path: Path) -> None:
    run = Run("step", tmp_path / "rows.jsonl", time.time() + 60, smoke=False)
    run.figure("slow", "x", [1.0, 1.2, 1.3], "plain Inductor", at_most(1.05))
    run.figure("fast", "x", [2.0, 3.0, 9.0], "kvpress", at_least(3.0))
    run.figure("plain", "ms", 4.0)
    rows = read_rows(run.rows)
    assert [row.get("met") for row in rows] == [False, True, None]
    assert {"part", "name", "unit", "median", "min", "max", "against"} <= rows[0].keys()
    text = markdown(rows)
    assert "| step | slow | 1.2 | x | 1.1 to 1.25 | 1 to 1.3 | plain Inductor | <= 1.05 | not met |" in text
    assert "| fast | 3 | x | 2.5 to 6 | 2 to 9 | kvpress | >= 3 | met |" in text
    assert "| plain | 4 | ms | - | - | - | - | - |" in text


def test_a_smoke_run_claims_nothing(tmp_path: Path) -> None:
    run = Run("step", tmp_path / "rows.jsonl", time.time() + 60, smoke=True)
    run.figure("slow", "x", [2.0], "plain Inductor", at_most(1.05))
    (row,) = read_rows(run.rows)
    assert "met" not in row
    assert "## Targets" not in markdown([row])


def test_all_parts_fit_into_fifteen_minutes() -> None:
    assert sum(part.seconds for name, part in PARTS.items() if name not in OPTIONAL) < 15 * 60
    assert all((ROOT / "benchmarks" / "cpu" / f"{part.module}.py").exists() for part in PARTS.values())


def test_a_part_that_fails_costs_no_other(tmp_path: Path) -> None:
    started: list[str] = []

    def start(part: str, rows: Path, deadline: float, smoke: bool) -> str | None:
        started.append(part)
        if part == "step":
            return "exit status -11; last words: none"
        Run(part, rows, deadline, smoke).figure(f"{part} was here", "ms", 1.0)
        return None

    assert measure(Wanted(("step", "memory"), tmp_path, smoke=True), start) == 1
    assert started == ["step", "memory"]
    text = (tmp_path / "cpu.md").read_text()
    assert "| step | crashed | step | exit status -11; last words: none |" in text
    assert "memory was here" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "step,stop"], "there is no part stop; there are profile"),
        (["--against", "no-such-branch"], "no commit, branch or tag of the repository"),
    ],
)
def test_what_is_not_there_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_worktree_is_of_the_commit_and_goes_away(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        person = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *person, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "--quiet")
    for text in ("old", "new"):
        (tmp_path / "file").write_text(text)
        git("add", "file")
        git("commit", "--quiet", "-m", text)
    with against.worktree("HEAD~1", tmp_path) as tree:
        assert (tree / "file").read_text() == "old"
    assert not tree.exists()
    with pytest.raises(against.NoSuchCommitError, match="--against HEAD~5"), against.worktree("HEAD~5", tmp_path):
        pass


def test_two_sides_are_compared_pair_by_pair() -> None:
    def rows(median: float, name: str = "step") -> list[Row]:
        return [{"kind": "figure", "name": name, "unit": "ms", "median": median}]

    here, there = [rows(1.0), rows(3.0), rows(9.0)], [rows(2.0), rows(3.0), rows(3.0)]
    assert "| step | ms | 3 | 3 | 1 | 0.5 to 3 | 3 | time |" in against.paired(here, there)
    assert against.paired([rows(1.0)], [rows(1.0, "other")]) == "Nothing that both sides measured."


@pytest.mark.parametrize("tail", [0, 5])
def test_a_filled_cache_is_one_that_a_prompt_could_have_left(tail: int) -> None:
    cache: Any = caches.compressed(build(TINY), TINY, 200, 48, tail)
    for number, layer in enumerate(cache.layers):
        assert layer.keys.shape == (1, 2, 200, 16)
        lengths = layer.keys.head_lengths[0].tolist()
        assert sum(lengths) == 2 * (48 + tail)
        assert max(lengths) == caches.SKEW * 48 + tail == lengths[number % 2]
        for head in range(2):
            positions = layer.keys.positions(0, head).tolist()
            assert positions == sorted(set(positions))
            assert len(positions) == lengths[head]
    if not tail:
        assert sum(layer.keys.store.nbytes_held for layer in cache.layers) == bytes_of(TINY, 48, 0)


def test_the_operator_works_on_what_its_case_says() -> None:
    case = Case(8, 4, 16, torch.bfloat16, 3, 2, ())
    store = sealed(case, 80)
    assert store.keys.shape == store.values.shape == (3, 80, 16)
    assert store.dtype == torch.bfloat16
    lengths = store.offsets.diff(dim=1)
    assert [row.argmax().item() for row in lengths] == [0, 1, 2]
    assert lengths.amax(1).tolist() == [case.skew * 20] * 3
    assert lengths.sum(1).tolist() == [80] * 3
    assert (store.tail_length, store.length) == (1, 41)


def test_smoke(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.cpu", "--quick", "--only", "decode_op,memory", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--slack", "4"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert rows[0]["smoke"] == SMOKE
    assert not [row for row in rows if row["kind"] in ("failed", "crashed", "skipped")]
    figures = {row["name"]: row for row in rows if row["kind"] == "figure"}
    assert {row["part"] for row in figures.values()} == {"decode_op", "memory"}
    held = [row["median"] for name, row in figures.items() if name.endswith("held over the description")]
    assert held == [1.0, 1.0, 1.0]
    text = (tmp_path / "cpu.md").read_text()
    assert SMOKE in text
    assert f"## {PARTS['memory'].title}" in text
    assert (tmp_path / "cpu_op.png").exists()
