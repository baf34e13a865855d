"""Prompts that fit into the budget: nothing is evicted, and nothing should be slower than under plain Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cpu.decoders import SMALL, TINY, build, compiled
from benchmarks.cpu.run import PLAIN, Run, at_most, ratios
from benchmarks.cpu.steps import stepper, time_steps
from benchmarks.cpu.timing import flat
from benchmarks.models import twin

__all__ = ["run"]


def run(run: Run) -> None:
    """Time prompts and the steps behind them."""
    shape, budget = (TINY, 64) if run.smoke else (SMALL, 512)
    model = build(shape)
    plain = compiled(twin(model), "inductor")
    ours = compiled(model, "adakv", budget=budget)
    for length in (24, 48) if run.smoke else (32, 128, 512):
        ids = torch.randint(shape.vocabulary, (1, length))
        prompts = {"adakv": _reader(ours, ids), PLAIN: _reader(plain, ids)}
        _report(run, f"prompt of {length}", time_steps(run, prompts, rounds=12, calls=2, share=0.25))
        steps = {"adakv": stepper(ours, _reader(ours, ids)()), PLAIN: stepper(plain, _reader(plain, ids)())}
        _report(run, f"step behind {length} tokens", time_steps(run, steps, rounds=24, calls=3, share=0.25))


def _reader(model: Callable[..., Any], ids: torch.Tensor) -> Callable[[], Any]:
    def read() -> Any:
        with torch.no_grad():
            return model(ids, use_cache=True, logits_to_keep=1).past_key_values

    return read


def _report(run: Run, what: str, times: dict[str, list[list[float]]]) -> None:
    for name, rounds in times.items():
        run.figure(f"{what}: {name}", "ms", flat(rounds, 1e3))
    run.figure(f"{what}: adakv over {PLAIN}", "x", ratios(times["adakv"], times[PLAIN]), PLAIN, at_most(1.03))
