"""Tables, verdicts and pictures, from made-up measurements."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from adakv_compile.cli.errors import CommandError
from adakv_compile.cli.generate import Run
from adakv_compile.cli.render import as_json, check_picture, head_budgets, plot_heads, summary, verdict
from adakv_compile.runtime.stats import CacheStats, LayerStats


def _layer(lengths: list[int], logical: int = 100) -> LayerStats:
    heads = torch.tensor([lengths])
    return LayerStats(
        heads, logical, bytes_held=sum(lengths) * 512, bytes_dense=logical * 512 * len(lengths), compressed=True
    )


COMPRESSED = Run(
    label="ada-snapkv",
    tokens=(1, 2, 3),
    text="one two three",
    chunks=1,
    first_token=1.25,
    per_token=0.0305,
    compiling=12.0,
    stats=CacheStats((_layer([10, 30]), _layer([20, 20]))),
)
FULL = replace(
    COMPRESSED, label="full cache", tokens=(1, 2, 4), stats=CacheStats((_layer([100, 100]), _layer([100, 100])))
)


def _print(*runs: Run) -> str:
    page = io.StringIO()
    Console(width=100, file=page).print(summary(runs, prompt_tokens=12345))
    return page.getvalue()


def test_summary_of_one_run() -> None:
    text = _print(COMPRESSED)
    assert "12,345 prompt tokens, 3 generated" in text
    for shown in ("1.25 s", "30.5 ms", "12.00 s", "40.00 KiB", "200.00 KiB", "20.0%", "80 of 400"):
        assert shown in text


def test_summary_compares_runs_and_names_parts() -> None:
    text = _print(replace(COMPRESSED, chunks=3, per_token=None), FULL)
    assert "in 3 parts" in text
    assert "full cache" in text
    assert "400 of 400" in text


def test_verdict() -> None:
    assert verdict(COMPRESSED, FULL) == "The answers agree for 2 of 3 tokens, then differ."
    assert verdict(COMPRESSED, replace(FULL, tokens=(1, 2, 3))) == "Both caches give the same 3 tokens."


def test_head_budgets_of_layers_with_different_heads() -> None:
    table = head_budgets(CacheStats((_layer([10, 30]), _layer([7]))))
    assert table[0].tolist() == [10, 30]
    assert table[1, 0] == 7
    assert table[1, 1].isnan()


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (64, 32)])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture(tmp_path: Path, shape: tuple[int, int], ending: str) -> None:
    layers, heads = shape
    path = tmp_path / f"heads.{ending}"
    check_picture(path)
    plot_heads(CacheStats(tuple(_layer(list(range(1, heads + 1))) for _ in range(layers))), path, "title")
    assert path.stat().st_size > 1000


@pytest.mark.parametrize("name", ["heads.docx", "heads"])
def test_picture_of_an_unknown_format(name: str) -> None:
    with pytest.raises(CommandError, match=r"\.png"):
        check_picture(Path(name))


def test_json_holds_everything() -> None:
    document = json.loads(as_json({"model": "m"}, [COMPRESSED, FULL]))
    assert document["model"] == "m"
    assert document["agreement"] == {"same": False, "first_difference": 2}
    assert document["runs"][0]["cache"]["layers"][0]["head_lengths"] == [[10, 30]]
    assert document["runs"][0]["seconds_per_token"] == 0.0305
    assert "agreement" not in json.loads(as_json({}, [FULL]))
