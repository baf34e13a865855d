"""The page of the sweep says of every type what was found, and no more."""

from __future__ import annotations

from tests.zoo.sweep import Row
from tests.zoo.table import render

ROWS = [
    Row("zebra", "compressed", compressed=2, attentions=2, graphs=2),
    Row("ant", "refused", ["SPELLED_OUT: a | b\nat 0x7f12ab"], attentions=4, graphs=2),
    Row("newt", "not run", ["ValueError: sizes don't go together"]),
    Row("bee", "partly compressed", ["DROPOUT"], ["(b) step 1: logits differ"], compressed=1, attentions=2, graphs=3),
]


def _line(name: str) -> str:
    (line,) = (line for line in render(ROWS).splitlines() if line.startswith(f"| {name} |"))
    return line


def test_types_are_in_order() -> None:
    names = [line.split(" | ")[0][2:] for line in render(ROWS).splitlines() if line.startswith("| ")]
    assert names[-len(ROWS) :] == ["ant", "bee", "newt", "zebra"]


def test_a_row_tells_what_was_compressed_and_why_not() -> None:
    assert _line("zebra") == "| zebra | compressed | 2 of 2 | 2 |  |"
    assert _line("ant") == "| ant | refused | 0 of 4 | 2 | SPELLED_OUT: a \\| b at 0x... |"


def test_what_fails_is_not_hidden() -> None:
    assert "**fails** (b) step 1: logits differ" in _line("bee")
    assert "1 of them fail a check. 1 of the 3 with a cache, 33.3%, are compressed." in render(ROWS)


def test_a_type_that_did_not_run_has_no_figures() -> None:
    assert _line("newt") == "| newt | not run |  |  | ValueError: sizes don't go together |"


def test_a_row_survives_its_file() -> None:
    assert [Row.parse(row.json()) for row in ROWS] == ROWS
