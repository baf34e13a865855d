"""What a step costs in Python and guards, which does not shrink with the model."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.cpu import caches
from benchmarks.cpu.decoders import build, compiled, many_layers
from benchmarks.cpu.run import Run, at_most, ratios
from benchmarks.cpu.steps import stepper
from benchmarks.cpu.timing import flat, interleave
from benchmarks.models import twin

__all__ = ["boundary", "guards_of", "run"]

_CALLS: Final = 50
_PLAIN: Final = "a DynamicCache, graphs run eagerly"


def run(run: Run) -> None:
    """Time the guards of a decode step and the call boundary.

    Graphs of both sides run eagerly, as Inductor takes minutes for those of 32 layers. With Inductor on both sides the
    ratio was the smaller one, where both were measured: 1.05, against 1.21.
    """
    layers = 2 if run.smoke else 32
    shape = many_layers(layers)
    model = build(shape)
    plain_model = twin(model)
    plain = compiled(plain_model, "eager")
    ours = compiled(model, "adakv", budget=64, inner="eager")
    sides = {
        "adakv": (ours, caches.compressed(model, shape, 256, 64)),
        _PLAIN: (plain, caches.dense(plain_model, shape, 256)),
    }
    for side in sides.values():
        step = stepper(*side)
        step()
        step()
    rounds = 2 if run.smoke else 20
    checks = {name: guards_of(model, cache) for name, (model, cache) in sides.items()}
    seconds = interleave(checks, rounds, _CALLS, warm=_CALLS)
    for name, each in seconds.items():
        run.figure(f"guards of {layers} layers: {name}", "us", flat(each, 1e6))
    over = ratios(seconds["adakv"], seconds[_PLAIN])
    run.figure(f"guards: adakv over {_PLAIN}", "x", over, _PLAIN, at_most(1.3))

    micros = [second * 1e6 for second in boundary(layers, 20 if run.smoke else 300)]
    run.figure(f"call boundary, {layers} layers", "us", micros)
    run.figure("call boundary, a layer", "us", [micro / layers for micro in micros], target=at_most(5.0))


def guards_of(model: Any, cache: Any) -> Callable[[], object]:
    """Return what evaluates the guards of the compiled code that serves the next step, as a call would.

    The model's forward may be wrapped in other functions: Dynamo compiles the first of them that it sees.

    Args:
        model: Compiled, and called with such a cache before.
        cache: Of the next step.

    Raises:
        RuntimeError: No compiled code of the model serves the cache.
    """
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list  # pyright: ignore[reportPrivateUsage]

    call = (model, torch.ones(1, 1, dtype=torch.long))
    function: Any = type(model).forward
    while function is not None:
        bound = inspect.signature(function, follow_wrapped=False).bind(*call, past_key_values=cache, use_cache=True)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        frame = {**bound.arguments, **{name: cell.cell_contents for name, cell in cells}}
        for entry in _debug_get_cache_entry_list(function.__code__):
            manager: Any = entry.guard_manager
            with torch.no_grad():
                if manager.check(frame):
                    return functools.partial(_check, manager, frame)
        function = getattr(function, "__wrapped__", None)
    raise RuntimeError("no compiled code of this model serves this cache: it would be compiled again")


def _check(manager: Any, frame: Mapping[str, Any]) -> object:
    with torch.no_grad():
        return manager.check(frame)


def boundary(layers: int, rounds: int) -> list[float]:
    """Return the seconds of calls of the boundary alone: views to stores and back, nothing compiled in between."""
    from adakv_compile.call import STORE_TENSORS, Boundary, Grown, Past, StorePart, bind
    from adakv_compile.runtime.boundary import wrap_prefill

    heads, dim = 8, 128
    args: list[Tensor] = []
    for _ in range(layers):
        entries = torch.zeros(1, heads * 64, dim)
        offsets = torch.arange(heads + 1, dtype=torch.int32)[None] * 64
        positions = torch.zeros(1, heads * 64, dtype=torch.int32)
        args += wrap_prefill(entries, entries.clone(), offsets, positions, 4096)
    described = Boundary(
        inputs=tuple(StorePart(i, name) for i in range(layers) for name in STORE_TENSORS),
        pasts=tuple(Past(2 * i, 2 * i + 1, 1, False) for i in range(layers)),
        outputs=tuple(Grown(i, kind, "all") for i in range(layers) for kind in ("key", "value")),
    )
    call = bind(described, lambda *parts: (), lambda *parts: ())
    seconds: list[float] = []
    for _ in range(rounds):
        begin = time.perf_counter()
        args = list(call(*args))
        seconds.append(time.perf_counter() - begin)
    return seconds
