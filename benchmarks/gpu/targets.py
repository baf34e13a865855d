"""The targets on an H200, in one table, and how a figure for each is read off the rows of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.gpu.run import Row

__all__ = ["TARGETS", "Target"]

_VARLEN: Final = ("varlen heads", "varlen rows")


@dataclass(frozen=True)
class Target:
    """A figure and what it should be.

    Attributes:
        name: What is measured, and over which cases the worst is taken.
        unit: Of the figure.
        at_least: Whether ``value`` is a lower bound; an upper one otherwise.
        value: The bound.
        source: Where it comes from.
        figure: The worst case of a run; None if it was not measured.
    """

    name: str
    unit: str
    at_least: bool
    value: float
    source: str
    figure: Callable[[Sequence[Row]], float | None]

    def verdict(self, rows: Sequence[Row]) -> str:
        """Return ``met``, ``not met`` or ``not measured``."""
        figure = self.figure(rows)
        if figure is None:
            return "not measured"
        return "met" if (figure >= self.value if self.at_least else figure <= self.value) else "not met"


def _cases(rows: Sequence[Row], part: str, **wanted: object) -> list[Row]:
    return [
        row
        for row in rows
        if row["part"] == part and row["kind"] == "case" and all(row.get(name) == want for name, want in wanted.items())
    ]


def _us(row: Row, name: str = "adakv") -> float | None:
    return row["times"].get(name, {}).get("us")


def _least(figures: Sequence[float | None]) -> float | None:
    return min((figure for figure in figures if figure is not None), default=None)


def _most(figures: Sequence[float | None]) -> float | None:
    return max((figure for figure in figures if figure is not None), default=None)


def _share_of_copy(rows: Sequence[Row]) -> float | None:
    cases = _cases(rows, "decode", context=131_072)
    return _least([row.get("share_of_copy") for row in cases if row["budget"] in ("10%", "20%")])


def _against_varlen(rows: Sequence[Row]) -> float | None:
    speed_ups: list[float] = []
    for row in _cases(rows, "decode"):
        ours, theirs = _us(row), _least([_us(row, name) for name in _VARLEN])
        if ours is not None and theirs is not None:
            speed_ups.append(theirs / ours)
    return _least(speed_ups)


def _small(rows: Sequence[Row]) -> list[Row]:
    return [row for row in _cases(rows, "decode", batch=1) if row["entries"] <= 1024]


def _small_us(rows: Sequence[Row]) -> float | None:
    return _most([_us(row) for row in _small(rows)])


def _small_launches(rows: Sequence[Row]) -> float | None:
    return _most([row.get("launches") for row in _small(rows)])


def _selection(rows: Sequence[Row]) -> float | None:
    return _most([_us(row) for row in _cases(rows, "compression", op="select", context=131_072)])


def _ms(rows: Sequence[Row], kind: str, way: str, batch: int, context: int) -> float | None:
    found = (
        row["ms"]
        for row in rows
        if row["part"] == "end_to_end" and row["kind"] == kind and _is(row, way, batch, context)
    )
    return next(found, None)


def _is(row: Row, way: str, batch: int, context: int) -> bool:
    return (row["way"], row["batch"], row["context"]) == (way, batch, context)


def _compression(rows: Sequence[Row], contexts: Sequence[int]) -> float | None:
    shares: list[float] = []
    for context in contexts:
        ours, theirs = (_ms(rows, "prefill", way, 1, context) for way in ("adakv", "inductor"))
        if ours is not None and theirs is not None:
            shares.append(ours / theirs - 1)
    return _most(shares)


def _speed_up(rows: Sequence[Row], batch: int, context: int) -> float | None:
    ours, full = (_ms(rows, "decode", way, batch, context) for way in ("adakv graphs", "static graphs"))
    return None if ours is None or full is None else full / ours


def _extra_recordings(rows: Sequence[Row]) -> float | None:
    return _most(
        [
            row["recordings"] - row["doublings"]
            for row in rows
            if row["part"] == "end_to_end"
            and row["kind"] == "decode"
            and row["way"] == "adakv graphs"
            and "recordings" in row
        ]
    )


_ISSUE: Final = "issue 3"

TARGETS: Final = (
    Target(
        "decode attention at 10-20 % of 128k, any skew and batch: share of copy bandwidth",
        "",
        True,
        0.8,
        _ISSUE,
        _share_of_copy,
    ),
    Target("decode attention: speed-up over varlen, any case", "x", True, 1.0, _ISSUE, _against_varlen),
    Target("decode attention, batch 1, budgets up to 1024: time of a layer", "us", False, 5.0, _ISSUE, _small_us),
    Target(
        "decode attention, batch 1, budgets up to 1024: launches of a layer", "", False, 1.0, _ISSUE, _small_launches
    ),
    Target("selection at 1e6 scores", "us", False, 50.0, _ISSUE, _selection),
    Target(
        "compression, share of the time to first token at 32k and 128k",
        "",
        False,
        0.01,
        _ISSUE,
        lambda rows: _compression(rows, (32_768, 131_072)),
    ),
    Target(
        "compression, share of the time to first token at 8k",
        "",
        False,
        0.03,
        _ISSUE,
        lambda rows: _compression(rows, (8_192,)),
    ),
    Target(
        "time per token at 128k, 10 %, batch 1: speed-up over the full cache with CUDA graphs",
        "x",
        True,
        1.6,
        _ISSUE,
        lambda rows: _speed_up(rows, 1, 131_072),
    ),
    Target(
        "time per token at 32k, 10 %, batch 8: speed-up over the full cache with CUDA graphs",
        "x",
        True,
        2.0,
        _ISSUE,
        lambda rows: _speed_up(rows, 8, 32_768),
    ),
    Target(
        "CUDA graphs recorded in 256 tokens beyond one per doubling of the tail",
        "",
        False,
        0.0,
        _ISSUE,
        _extra_recordings,
    ),
)
