"""``python -m benchmarks.step_profile``: where a decode step's time goes, ours beside plain Inductor's.

Plain Inductor has a dense cache of as many entries as ours keeps.

Two models: the 88M-parameter Llama of :mod:`benchmarks.cpu`, and one of 32 layers so narrow that little but Python is
left. Every figure is a median of interleaved steps of one process; what is timed inside of a step is timed in all steps
of both, so the sum is the step. Reads PyTorch's private parts: what it can't find on another version it leaves out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from unittest import mock

import torch
from torch._dynamo import guards as dynamo_guards
from torch._inductor.output_code import CompiledFxGraph
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from adakv_compile import pipeline
from adakv_compile.backend import adakv

__all__ = ["PARTS", "main", "profile"]

PARTS: Final = {
    "whole": "the call of the model",
    "guards": "Dynamo's guards, called directly",
    "eager": "calls around the compiled frame, its bytecode, the cache and the result it builds (a difference)",
    "boundary": "views to stores and back",
    "aot": "AOTAutograd's wrapper",
    "inductor": "Inductor's code, the rows below among it",
    "attention": "the attention's operator (from the profiler)",
    "matmul": "aten::mm and aten::addmm (from the profiler)",
}
"""The rows, in order; the first is the sum of the next five."""

_ATTENTION: Final = ("adakv::decode_attention", "aten::_scaled_dot_product")
_MATMUL: Final = ("aten::mm", "aten::addmm")

NARROW: Final = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1 << 17,
)
LLAMA_88M: Final = LlamaConfig(
    vocab_size=16_000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=1 << 17,
    tie_word_embeddings=True,
)


@dataclass
class _Clock:
    """Seconds spent in what was wrapped, since the last :meth:`take`."""

    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[name] += time.perf_counter() - begin

        # AOTAutograd's callables take a list that they empty, and say so.
        timed.__dict__.update(getattr(function, "__dict__", {}))
        return timed

    def take(self) -> dict[str, float]:
        taken = dict(self.spent)
        self.spent.clear()
        return taken


@dataclass
class Subject:
    """A compiled model with a cache, ready for one more step.

    Attributes:
        model: The model.
        cache: Its cache.
        guards: Dynamo's guards of the step, and the locals of the frame, which they are checked on.
    """

    model: LlamaForCausalLM
    cache: DynamicCache
    guards: tuple[Any, dict[str, Any]]

    def step(self) -> None:
        """Run one decode step."""
        self.model(torch.ones(1, 1, dtype=torch.long), past_key_values=self.cache, use_cache=True)


@contextmanager
def _watched(clock: _Clock, found: list[tuple[Any, dict[str, Any]]]) -> Generator[None]:
    """Let what is compiled meanwhile be timed, and note its guards."""
    build, bind, call = dynamo_guards.CheckFunctionManager.__init__, pipeline.bind, CompiledFxGraph.__call__

    def noted(self: Any, code: Any, output: Any, *args: Any, **kwargs: Any) -> None:
        build(self, code, output, *args, **kwargs)
        found.append((self.guard_manager, dict(output.local_scope)))

    def timed_bind(boundary: Any, compiled: Any, *rest: Any) -> Callable[..., Any]:
        return clock.wrap("bound", bind(boundary, clock.wrap("compiled", compiled), *rest))

    def timed_call(self: CompiledFxGraph, inputs: Sequence[Any]) -> Any:
        begin = time.perf_counter()
        try:
            return call(self, inputs)
        finally:
            clock.spent["inductor"] += time.perf_counter() - begin

    with (
        mock.patch.object(dynamo_guards.CheckFunctionManager, "__init__", noted),
        mock.patch.object(pipeline, "bind", timed_bind),
        mock.patch.object(CompiledFxGraph, "__call__", timed_call),
    ):
        yield


def _subject(config: LlamaConfig, kind: str, entries: int, prompt: int, clock: _Clock, found: list[Any]) -> Subject:
    """Return a random model after a few steps.

    Args:
        config: Its sizes.
        kind: ``"adakv"``, or ``"inductor"`` on a dense cache.
        entries: Entries a head keeps of its prompt, or holds.
        prompt: Tokens of the prompt, for ``"adakv"``.
        clock: What times the step.
        found: Where the guards are noted.
    """

    def plain(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        compiled = clock.wrap("compiled", compile_fx(gm, list(inputs)))
        return clock.wrap("bound", lambda *args: compiled(*args))

    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    if kind == "adakv":
        # The prompt is not what is measured: without Inductor it compiles in a moment.
        model.compile(backend=adakv, options={"budget": entries, "inner": "eager"}, dynamic=True)
        cache = model(torch.randint(0, config.vocab_size, (1, prompt)), logits_to_keep=1).past_key_values
        model.compile(backend=adakv, options={"budget": entries}, dynamic=True)
    else:
        model.compile(backend=plain, dynamic=True)
        cache = DynamicCache(config=config)
        assert config.num_key_value_heads is not None
        shape = (1, config.num_key_value_heads, entries, config.hidden_size // config.num_attention_heads)
        for layer in range(config.num_hidden_layers):
            cache.update(torch.randn(shape), torch.randn(shape), layer)
    found.clear()
    ready = Subject(model, cache, (None, {}))
    for _ in range(4):
        ready.step()
    ready.guards = found[-1]
    return ready


def _rows(subjects: dict[str, Subject], clock: _Clock, rounds: int) -> list[dict[str, Any]]:
    """Time steps, interleaved.

    Returns:
        For every subject and part ``{"subject", "part", "microseconds"}``.
    """
    samples: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, one in subjects.items():
            manager, frame = one.guards
            clock.take()
            begin = time.perf_counter()
            one.step()
            whole = time.perf_counter() - begin
            spent = clock.take()
            begin = time.perf_counter()
            passed = manager.check(frame)
            guards = time.perf_counter() - begin
            if not passed:
                raise RuntimeError(f"the guards of {name} fail: {manager.check_verbose(frame)}")
            parts = {
                "whole": whole,
                "guards": guards,
                "eager": whole - guards - spent["bound"],
                "boundary": spent["bound"] - spent["compiled"],
            }
            if "inductor" in spent:
                parts |= {"aot": spent["compiled"] - spent["inductor"], "inductor": spent["inductor"]}
            for part, seconds in parts.items():
                samples[name, part].append(seconds)
    for name, one in subjects.items():
        for part, seconds in _operators(one, rounds).items():
            samples[name, part].append(seconds)
    return [
        {"subject": name, "part": part, "microseconds": statistics.median(found) * 1e6}
        for (name, part), found in samples.items()
    ]


def _operators(one: Subject, steps: int) -> dict[str, float]:
    """Return seconds a step in attention and in products, from the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        for _ in range(steps):
            one.step()
    spent: dict[str, float] = {"attention": 0.0, "matmul": 0.0}
    for event in trace.events() or ():
        outer = event.cpu_parent is None or not event.cpu_parent.name.startswith((*_ATTENTION, *_MATMUL))
        for part, names in (("attention", _ATTENTION), ("matmul", _MATMUL)):
            if outer and event.name.startswith(names):
                spent[part] += event.cpu_time_total / 1e6 / steps
    return spent


def profile(config: LlamaConfig, entries: int, prompt: int, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of one model, compressed and on a dense cache of as many entries."""
    clock, found = _Clock(), list[Any]()
    with torch.no_grad(), _watched(clock, found):
        kinds = ("adakv", "inductor")
        subjects = {kind: _subject(config, kind, entries, prompt, clock, found) for kind in kinds}
        return _rows(subjects, clock, rounds)


def _table(found: Sequence[dict[str, Any]]) -> str:
    figures = {(row["subject"], row["part"]): row["microseconds"] for row in found}
    lines = ["| part | adakv, us | Inductor, us | |", "|---|---|---|---|"]
    for part, meaning in PARTS.items():
        cells = (f"{figures[kind, part]:.0f}" if (kind, part) in figures else "-" for kind in ("adakv", "inductor"))
        lines.append(f"| {part} | {' | '.join(cells)} | {meaning} |")
    return "\n".join(lines)


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=("llama", "narrow"), default=["llama", "narrow"])
    parser.add_argument("--entries", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="print rows instead of tables")
    given = parser.parse_args()
    for name in given.models:
        config = LLAMA_88M if name == "llama" else NARROW
        found = profile(config, given.entries, given.prompt, given.rounds)
        text = json.dumps({"model": name, "rows": found}) if given.json else f"{name}\n\n{_table(found)}\n"
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
