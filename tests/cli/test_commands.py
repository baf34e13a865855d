"""Whole command lines. Most run with a stand-in for the backend; the last ones compile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from adakv_compile.cli import commands
from tests.cli.inputs import RETRIEVER, document, run

LENGTH = 300
BUDGET = 40
WINDOW = 8


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text(document(LENGTH), encoding="utf-8")
    return file


def _leave_alone(gm: fx.GraphModule, _: Sequence[Any], **__: Any) -> Callable[..., Any]:
    return gm.forward


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "adakv", _leave_alone)


@pytest.mark.usefixtures("stand_in")
def test_answer_goes_to_output_and_the_rest_to_errors(prompt: Path) -> None:
    result = run("generate", "--model", RETRIEVER, "--prompt-file", prompt, "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.split()) == 4
    for shown in ("prompt tokens", "time to first token", "cache held", "Nothing was compressed"):
        assert shown not in result.stdout
        assert shown in result.stderr


def _generate(prompt: Path, tmp_path: Path, *flags: object) -> tuple[Any, dict[str, Any]]:
    out = tmp_path / "out.json"
    fixed = ("--max-new-tokens", 4, "--inner", "eager", "--window", WINDOW, "--json", out)
    result = run("generate", "--model", RETRIEVER, "--prompt-file", prompt, *fixed, *flags)
    assert result.exit_code == 0, result.output
    return result, json.loads(out.read_text())


def _prefix_entries(run: dict[str, Any], heads: int) -> list[int]:
    """Return the entries per layer that were kept of the prompt: those of the tail come on top."""
    tail = heads * (len(run["tokens"]) - 1)
    return [sum(layer["head_lengths"][0]) - tail for layer in run["cache"]["layers"]]


def test_small_budget_against_the_full_cache(prompt: Path, tmp_path: Path) -> None:
    picture = tmp_path / "heads.png"
    result, document = _generate(prompt, tmp_path, "--budget", BUDGET, "--compare", "--plot", picture, "--strict")
    compressed, full = document["runs"]
    layers = compressed["cache"]["layers"]
    assert _prefix_entries(compressed, heads=4) == [4 * BUDGET] * 4
    assert {layer["logical_length"] for layer in layers} == {document["prompt_tokens"] + 3}
    assert compressed["cache"]["bytes_held"] < full["cache"]["bytes_held"] == full["cache"]["bytes_dense"]
    assert compressed["tokens"][0] == full["tokens"][0], "the first token comes from the whole prompt"
    assert picture.stat().st_size > 1000
    for shown in ("full cache (eager)", "held / dense", "agree" if not document["agreement"]["same"] else "the same"):
        assert shown in result.stderr


def test_budget_of_the_whole_prompt_changes_nothing(prompt: Path, tmp_path: Path) -> None:
    result, document = _generate(prompt, tmp_path, "--budget", 1000, "--compare")
    assert document["agreement"] == {"same": True, "first_difference": None}
    assert "Both caches give the same 4 tokens" in result.stderr


def test_prompt_in_parts_ends_within_the_budget(prompt: Path, tmp_path: Path) -> None:
    _, document = _generate(
        prompt, tmp_path, "--budget", BUDGET, "--prefill-chunk", 100, "--method", "snapkv", "--strict"
    )
    assert document["runs"][0]["prompt_parts"] == 4
    assert _prefix_entries(document["runs"][0], heads=4) == [4 * BUDGET] * 4


def test_explain(prompt: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = run("explain", "--model", RETRIEVER, "--prompt-file", prompt, "--budget", BUDGET, "--json", out)
    assert result.exit_code == 0, result.output
    assert "4 of 4 attentions on a compressed cache" in result.stdout
    graphs = json.loads(out.read_text())["graphs"]
    assert [len(graph["sites"]) for graph in graphs] == [4, 4]


def test_explain_needs_no_prompt() -> None:
    result = run("explain", "--model", RETRIEVER)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("4 of 4 attentions") == 2


def test_the_command_as_it_is_installed(prompt: Path) -> None:
    command = [sys.executable, "-c", "from adakv_compile.cli import main; main()", "generate"]
    flags = ["--model", str(RETRIEVER), "--prompt-file", str(prompt), "--budget", "40", "--window", "8", "--strict"]
    done = subprocess.run(
        [*command, *flags, "--max-new-tokens", "4", "--dtype", "bfloat16", "--inner", "eager"],
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4
    assert "held / dense" in done.stderr


def test_out_of_memory_is_explained(prompt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("adakv_compile.cli.generate._call", fail)
    result = run("generate", "--model", RETRIEVER, "--prompt-file", prompt)
    assert result.exit_code == 2
    assert "not enough memory" in " ".join(result.stderr.split())
