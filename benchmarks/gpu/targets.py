"""The targets on an H200, in one table, and how a figure for each is read off the rows of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.gpu.run import Row
from benchmarks.gpu.shapes import LLAMA

__all__ = ["TARGETS", "Target", "compression_ms"]

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


def compression_ms(rows: Sequence[Row]) -> dict[int, float]:
    """Return milliseconds of scores, selection and compaction at 10 %, all layers together, by context."""
    layers: dict[int, dict[str, float]] = {}
    for row in _cases(rows, "compression"):
        if row.get("budget") in (None, "10%") and (us := _us(row)) is not None:
            layers.setdefault(row["context"], {})[row["op"]] = us
    return {context: LLAMA.layers * sum(ops.values()) / 1e3 for context, ops in layers.items() if len(ops) == 3}


def _kernels(rows: Sequence[Row], contexts: Sequence[int]) -> float | None:
    ours = compression_ms(rows)
    shares: list[float] = []
    for context in contexts:
        whole = _ms(rows, "prefill", "inductor", 1, context)
        if whole is not None and context in ours:
            shares.append(ours[context] / whole)
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


def _at_least(name: str, value: float, unit: str, figure: Callable[[Sequence[Row]], float | None]) -> Target:
    return Target(name, unit, True, value, _ISSUE, figure)


def _at_most(name: str, value: float, unit: str, figure: Callable[[Sequence[Row]], float | None]) -> Target:
    return Target(name, unit, False, value, _ISSUE, figure)


_ISSUE: Final = "issue 3, H200"
_LONG: Final = (32_768, 131_072)
_SHORT: Final = (8_192,)

TARGETS: Final = (
    _at_least("decode attention, 10-20 % of 128k, any skew: share of copy bandwidth", 0.8, "", _share_of_copy),
    _at_least("decode attention, any case: speed-up over varlen", 1.0, "x", _against_varlen),
    _at_most("decode attention, batch 1, budget up to 1024: time of a layer", 5.0, "us", _small_us),
    _at_most("decode attention, batch 1, budget up to 1024: launches of a layer", 1.0, "", _small_launches),
    _at_most("selection at 1e6 scores", 50.0, "us", _selection),
    _at_most("32k, 128k: first token later than uncompressed by", 0.01, "", lambda rows: _compression(rows, _LONG)),
    _at_most("32k, 128k: compression's kernels over first token", 0.01, "", lambda rows: _kernels(rows, _LONG)),
    _at_most("8k: first token later than uncompressed by", 0.03, "", lambda rows: _compression(rows, _SHORT)),
    _at_most("8k: compression's kernels over first token", 0.03, "", lambda rows: _kernels(rows, _SHORT)),
    _at_least("128k, 10 %, batch 1: token speed-up over full", 1.6, "x", lambda rows: _speed_up(rows, 1, 131_072)),
    _at_least("32k, 10 %, batch 8: token speed-up over full", 2.0, "x", lambda rows: _speed_up(rows, 8, 32_768)),
    _at_most("graphs recorded in 256 tokens, beyond one a doubling", 0.0, "", _extra_recordings),
)
"""The worst case of a run counts. Full: a static cache with CUDA graphs."""
