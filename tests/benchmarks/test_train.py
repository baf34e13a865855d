"""Training from the command line: made wider, stopped and gone on with, refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaForCausalLM

from benchmarks.testbed import model, train

_START = ("--start", str(model.WEIGHTS / "0"), "--first-length", "128")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_start_is_made_wider_and_a_second_run_goes_on(tmp_path: Path) -> None:
    old = LlamaForCausalLM.from_pretrained(model.WEIGHTS / "0")
    wide = old.config.hidden_size + 64
    rest = [*_START, "--width", str(wide), "--out", str(tmp_path)]
    train.main(["--minutes", "0.001", *rest])
    first = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert first.config.hidden_size == wide
    assert first.config.num_key_value_heads == wide // 32
    log = tmp_path / "log.jsonl"
    [done] = [json.loads(line) for line in log.read_text().splitlines()]
    assert done["step"] > 0
    # However long the first step took, there is time for another.
    train.main(["--minutes", str(done["seconds"] / 60 + 0.01), *rest])
    assert json.loads(log.read_text().splitlines()[-1])["step"] > done["step"]
    again = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert not torch.equal(first.lm_head.weight, again.lm_head.weight)


@pytest.mark.parametrize("width", ["200", "64"])
def test_a_width_that_does_not_fit_is_refused(tmp_path: Path, width: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main([*_START, "--width", width, "--out", str(tmp_path)])
    assert f"--width {width}: give a multiple of 32 from" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
