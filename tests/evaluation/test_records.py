"""Results survive whatever ends a run, and only the same run continues them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adakv_compile.evaluation.errors import EvaluationError
from adakv_compile.evaluation.records import CONFIGURATION, RECORDS, Records, key_of, read
from tests.evaluation.samples import record

SETUP: dict[str, Any] = {"model": "m", "settings": (("snapkv", 16),), "versions": {"torch": "2"}}


def write(directory: Path, *indices: int) -> None:
    with Records(directory, SETUP) as records:
        for index in indices:
            records.append(record(index=index))


def test_a_run_continues_where_it_stopped(tmp_path: Path) -> None:
    write(tmp_path / "made" / "here", 0, 1)
    with Records(tmp_path / "made" / "here", SETUP) as records:
        assert set(records.done) == {key_of(record(index=0)), key_of(record(index=1))}
        records.append(record(index=2))
    found, _ = read(tmp_path / "made" / "here" / RECORDS)
    assert [r["index"] for r in found.values()] == [0, 1, 2]


def test_a_record_is_on_disk_when_it_was_appended(tmp_path: Path) -> None:
    with Records(tmp_path, SETUP) as records:
        records.append(record())
        assert json.loads((tmp_path / RECORDS).read_text()) == record()


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_half_written_line_is_dropped_and_what_comes_next_is_whole(tmp_path: Path, cut: int) -> None:
    write(tmp_path, 0, 1)
    path = tmp_path / RECORDS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-cut])
    write(tmp_path, 1)
    assert path.read_bytes() == b"".join(lines)


def test_nothing_is_counted_twice(tmp_path: Path) -> None:
    write(tmp_path, 0)
    with Records(tmp_path, SETUP) as records, pytest.raises(ValueError, match="already"):
        records.append(record(score=0.0))
    path = tmp_path / RECORDS
    path.write_bytes(path.read_bytes() * 2)
    found, _ = read(path)
    assert len(found) == 1


def test_samples_differ_in_every_part_of_the_key(tmp_path: Path) -> None:
    changes = ({"method": "full"}, {"budget": 0.1}, {"protocol": "p"}, {"seed": 1}, {"task": "t"}, {"length": 1})
    with Records(tmp_path, SETUP) as records:
        for changed in ({}, *changes, {"index": 1}):
            records.append(record(**changed))
        assert len(records.done) == 8


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("settings", (("snapkv", 32),), r"settings is \[\['snapkv', 16\]\] there and \[\['snapkv', 32\]\] here"),
        ("model", "other", "model is 'm' there and 'other' here"),
        ("versions", {"torch": "3"}, "versions is"),
        ("new", 1, "new is None there and 1 here"),
    ],
)
def test_another_configuration_is_refused_with_what_differs(tmp_path: Path, name: str, value: Any, told: str) -> None:
    write(tmp_path, 0)
    before = (tmp_path / RECORDS).read_bytes()
    with pytest.raises(EvaluationError, match=told):
        Records(tmp_path, {**SETUP, name: value})
    assert (tmp_path / RECORDS).read_bytes() == before


def test_an_option_that_is_missing_now_is_a_difference(tmp_path: Path) -> None:
    write(tmp_path, 0)
    with pytest.raises(EvaluationError, match="model is 'm' there and None here"):
        Records(tmp_path, {name: value for name, value in SETUP.items() if name != "model"})


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(EvaluationError, match=r"not empty .* 'thesis.tex'"):
        Records(tmp_path, SETUP)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIGURATION).write_text(text)
    with pytest.raises(EvaluationError, match="not the configuration of an evaluation"):
        Records(tmp_path, SETUP)


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EvaluationError, match="can't write"):
        Records(tmp_path / "file", SETUP)


@pytest.mark.parametrize("line", ["{}", "{", "[1]", "null", "text"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    write(tmp_path, 0)
    with (tmp_path / RECORDS).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(EvaluationError, match=r"line 2 of .* is no record"):
        Records(tmp_path, SETUP)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_two_runs_do_not_write_to_one_directory(tmp_path: Path) -> None:
    with Records(tmp_path, SETUP), pytest.raises(EvaluationError, match="another run is writing"):
        Records(tmp_path, SETUP)
    write(tmp_path, 0)


KILLED = """
import os, sys, types
from pathlib import Path
# Records need nothing of PyTorch, which takes long to import.
package = types.ModuleType("adakv_compile")
package.__path__ = [sys.argv[2]]
sys.modules["adakv_compile"] = package
from adakv_compile.evaluation.records import Records
with Records(Path(sys.argv[1]), {"a": 1}) as records:
    for index in range(3):
        records.append(dict(method="m", budget=1, protocol="p", seed=0, task="t", length=None, index=index))
    os._exit(9)
"""


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    package = Path(__file__).parents[2] / "adakv_compile"
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(package)], timeout=120, check=False)
    assert done.returncode == 9
    with Records(tmp_path, {"a": 1}) as records:
        assert len(records.done) == 3
