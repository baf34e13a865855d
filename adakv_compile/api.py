"""The functions a user calls: compile a model in place, and explain what would be compressed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import fx, nn

from adakv_compile.backend import adakv
from adakv_compile.options import Options
from adakv_compile.pipeline import compile_or_leave
from adakv_compile.report import GraphReport, Report

__all__ = ["compile", "explain"]

_Target = TypeVar("_Target", bound=Callable[..., Any])


@overload
def compile(target: _Target, /) -> _Target: ...
@overload
def compile(
    target: None = None, /, *, dynamic: bool | None = True, fullgraph: bool = False, **options: Any
) -> Callable[[_Target], _Target]: ...
@overload
def compile(target: _Target, /, *, dynamic: bool | None = True, fullgraph: bool = False, **options: Any) -> _Target: ...
def compile(target: Any = None, /, *, dynamic: bool | None = True, fullgraph: bool = False, **options: Any) -> Any:
    """Compile a function, a module or a module class with the ``adakv`` backend; usable as a decorator.

    A module is compiled in place, so that methods which call it (``generate`` of transformers, for one) are served,
    too. A decorated class compiles each of its instances.

    Args:
        target: The function, module or class; omit it to get a decorator: ``@compile(budget=512)``.
        dynamic: As in ``torch.compile``. The default, ``True``, makes one prefill graph and one decode graph serve
            every prompt length from the first prompt on.
        fullgraph: As in ``torch.compile``.
        **options: The fields of :class:`adakv_compile.Options`.

    Returns:
        The compiled function, or the same module or class; without ``target``, a decorator.

    Raises:
        OptionsError: An option is unknown or has a wrong value; raised here, not at the first call.
        TypeError: ``target`` can't be compiled.
    """
    Options.parse(None, options)
    settings: dict[str, Any] = {"backend": adakv, "dynamic": dynamic, "fullgraph": fullgraph, "options": options}
    if target is None:
        return functools.partial(_apply, settings=settings)
    return _apply(target, settings)


def _apply(target: Any, settings: dict[str, Any]) -> Any:
    if isinstance(target, nn.Module):
        target.compile(**settings)
        return target
    if isinstance(target, type) and issubclass(target, nn.Module):
        original = target.__init__

        @functools.wraps(original)
        def compiled_init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.compile(**settings)

        target.__init__ = compiled_init
        return target
    if inspect.isroutine(target):
        return torch.compile(target, **settings)
    raise TypeError(f"adakv_compile.compile takes a function, an nn.Module or an nn.Module class, not {target!r}")


def explain(
    model: Callable[..., Any], /, *args: Any, options: Mapping[str, object] | None = None, **kwargs: Any
) -> Report:
    """Run a model once and tell what happens to each of its attentions, and why.

    The call runs without gradients. If its result has ``logits`` and ``past_key_values``, as a causal language model of
    transformers returns them, one decode step follows, so that the report covers both graphs. Nothing is handed to
    Inductor.

    Args:
        model: A module or function, compiled or not; its own compilation isn't used.
        *args: Arguments of the call.
        options: As for the backend.
        **kwargs: Keyword arguments of the call.

    Returns:
        The report; ``print`` it.

    Raises:
        OptionsError: An option is unknown or has a wrong value.
    """
    parsed = Options.parse(None, {**(options or {}), "inner": "eager"})
    graphs: list[GraphReport] = []

    def observe(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_or_leave(gm, example_inputs, parsed, graphs.append)

    # The bound method, not the module: a module compiled in place would be called through its own compilation.
    call = model.forward if isinstance(model, nn.Module) else model
    compiled = torch.compile(call, backend=observe)
    with torch.no_grad():
        result = compiled(*args, **kwargs)
        _decode_once(compiled, result, kwargs)
    return Report(tuple(graphs))


def _decode_once(call: Callable[..., Any], result: Any, kwargs: Mapping[str, Any]) -> None:
    logits, cache = getattr(result, "logits", None), getattr(result, "past_key_values", None)
    if not isinstance(logits, torch.Tensor) or cache is None:
        return
    step: dict[str, Any] = {"input_ids": logits[:, -1:].argmax(-1), "past_key_values": cache, "use_cache": True}
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        step["attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
    call(**step)
