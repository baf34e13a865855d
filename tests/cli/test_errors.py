"""A wrong command line gets one clear message and no traceback."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import adakv_compile
from adakv_compile import cli
from adakv_compile.cli.errors import CommandError, require
from tests.cli.inputs import RETRIEVER, document, run


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text(document(20), encoding="utf-8")
    return file


def assert_refused(result: Any, *messages: str) -> None:
    """Check for exit code 2 and an error message that holds the texts, line breaks aside."""
    output = " ".join(result.output.split())
    assert result.exit_code == 2, result.output
    assert "error:" in output
    assert "Traceback" not in output
    for message in messages:
        assert message in output


def test_version() -> None:
    assert f"adakv_compile {adakv_compile.__version__} (torch " in run("--version").output


def test_help_names_every_flag_of_the_readme() -> None:
    for flag in ("--model", "--prompt-file", "--budget", "--method", "--max-new-tokens", "--compare", "--plot"):
        assert flag in run("generate", "--help").output


def test_missing_prompt_file(tmp_path: Path) -> None:
    missing = tmp_path / "none.txt"
    assert_refused(run("generate", "--model", RETRIEVER, "--prompt-file", missing), "none.txt", "no such file")


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_empty_prompt(tmp_path: Path, text: str) -> None:
    file = tmp_path / "empty.txt"
    file.write_text(text)
    assert_refused(run("generate", "--model", RETRIEVER, "--prompt-file", file), "is empty")


def test_prompt_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(b"\x89PNG\xff\xfe")
    assert_refused(run("generate", "--model", RETRIEVER, "--prompt-file", file), "not UTF-8")


def test_unknown_method_suggests_the_nearest(prompt: Path) -> None:
    result = run("generate", "--model", RETRIEVER, "--prompt-file", prompt, "--method", "ada-snapvk")
    assert_refused(result, "'ada-snapvk'", "did you mean 'ada-snapkv'?", "pyramidkv")


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("0", "'budget' is 0"),
        ("-5", "'budget' is -5"),
        ("1.5", "between 0 and 1"),
        ("20", "observation window of 32"),
        ("lots", "'lots'"),
        ("None", "None"),
        ("[1]", "[1]"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "explain"])
def test_bad_budget(prompt: Path, command: str, budget: str, message: str) -> None:
    assert_refused(run(command, "--model", RETRIEVER, "--prompt-file", prompt, "--budget", budget), "budget", message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", "2"], "'alpha' is 2.0"),
        (["--window", "0"], "'window' is 0"),
        (["-o", "kernel_size=4"], "must be odd"),
        (["-o", "kernel_sise=5"], "did you mean 'kernel_size'?"),
        (["-o", "pool=median"], "Allowed: 'max', 'avg'"),
        (["-o", "pool"], "NAME=VALUE"),
        (["--inner", "nvfuser"], "'inner' is 'nvfuser'"),
        (["--dtype", "float8"], "--dtype is 'float8'"),
        (["--device", "abacus"], "--device 'abacus'"),
        (["--plot", "nowhere/heads.png"], "no folder 'nowhere'"),
        (["--json", "nowhere/out.json"], "no folder 'nowhere'"),
    ],
)
def test_bad_flags(prompt: Path, flags: list[str], message: str) -> None:
    assert_refused(run("generate", "--model", RETRIEVER, "--prompt-file", prompt, *flags), message)


def test_plot_of_an_unknown_format(prompt: Path, tmp_path: Path) -> None:
    result = run("generate", "--model", RETRIEVER, "--prompt-file", prompt, "--plot", tmp_path / "heads.docx")
    assert_refused(result, "'.docx'", ".png")


def test_prompt_longer_than_the_model(tmp_path: Path) -> None:
    positions = AutoConfig.from_pretrained(RETRIEVER).max_position_embeddings
    file = tmp_path / "long.txt"
    file.write_text(document(positions), encoding="utf-8")
    result = run("generate", "--model", RETRIEVER, "--prompt-file", file, "--max-new-tokens", 5)
    assert_refused(result, f"{positions:,} positions", "shorten the prompt by")


@pytest.mark.parametrize("name", ["./none", "no/such/model/folder"])
def test_missing_model_folder(prompt: Path, name: str) -> None:
    assert_refused(run("generate", "--model", name, "--prompt-file", prompt), f"no model folder '{name}'")


def test_model_that_is_nowhere(prompt: Path) -> None:
    result = run("generate", "--model", "nobody/nothing-at-all", "--prompt-file", prompt)
    assert_refused(result, "no model 'nobody/nothing-at-all'", "not a folder", "the hub")


def test_folder_without_a_model(prompt: Path, tmp_path: Path) -> None:
    assert_refused(run("generate", "--model", tmp_path, "--prompt-file", prompt), "can't be loaded")


@pytest.mark.parametrize("kind", ["mamba", "t5"])
def test_model_without_a_kv_cache(prompt: Path, tmp_path: Path, kind: str) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    message = {"mamba": "keeps no KV cache", "t5": "encoder-decoder"}[kind]
    assert_refused(run("generate", "--model", tmp_path, "--prompt-file", prompt), message)


def test_missing_package_names_the_extra() -> None:
    with pytest.raises(CommandError, match=r"adakv_compile\[cli\]"):
        require("no_such_package", "cli")


def test_missing_typer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_typer(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "typer":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "adakv_compile.cli.commands", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_typer)
    with pytest.raises(SystemExit, match=r"typer is not installed.*adakv_compile\[cli\]"):
        cli.main()
