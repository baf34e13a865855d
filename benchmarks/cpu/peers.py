"""A decode step against kvpress, which masks what it evicts: in its own environment, which the first run makes."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu import caches
from benchmarks.cpu.decoders import SMALL, TINY, build, compiled
from benchmarks.cpu.run import Run, at_least, ratios
from benchmarks.cpu.step import BUDGET
from benchmarks.cpu.steps import stepper
from benchmarks.cpu.timing import flat, interleave
from benchmarks.peers import worker
from benchmarks.peers.client import Worker
from benchmarks.peers.environment import default_folder, prepare

__all__ = ["run"]

_STEPS = 3
_KVPRESS = "kvpress AdaKV"


def run(run: Run) -> None:
    """Time steps of both, a few at a time in turn, behind the same number of tokens.

    Raises:
        benchmarks.peers.environment.PeersMissingError: Its environment can't be made.
    """
    python = prepare(default_folder()).python
    shape, budget, length = (TINY, 48, 128) if run.smoke else (SMALL, BUDGET, 16_384)
    model = build(shape)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        log = Path(folder) / "log"
        start = functools.partial(Worker, [str(python), "-I", worker.__file__], log, max(run.left, 1.0))
        peer = start()
        try:
            peer.ask("load", model=folder, threads=torch.get_num_threads())
            way = {"kind": "adakv", "budget": budget, "window": 32, "kernel": 5}
            opened = peer.ask("open", prompt=torch.randint(shape.vocabulary, (length,)).tolist(), way=way)
            run.figure(f"prompt of {length}: {_KVPRESS}", "ms", opened["seconds"] * 1e3)
            peer.ask("decode", count=_STEPS)
            step = stepper(compiled(model, "adakv", budget=budget), caches.compressed(model, shape, length, budget))
            times: dict[str, list[list[float]]] = {"adakv": [], _KVPRESS: []}
            for _ in range(2 if run.smoke else 12):
                answer: dict[str, Any] = peer.ask("decode", count=_STEPS)
                times[_KVPRESS].append(answer["seconds"])
                times["adakv"] += interleave({"adakv": step}, 1, _STEPS, warm=2)["adakv"]
        finally:
            peer.close()
    for name, rounds in times.items():
        run.figure(f"step behind {length} tokens: {name}", "ms", flat(rounds, 1e3))
    run.figure(f"step: {_KVPRESS} over adakv", "x", ratios(times[_KVPRESS], times["adakv"]), _KVPRESS, at_least(3.0))
