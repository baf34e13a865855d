"""The backend that ``torch.compile(..., backend="adakv")`` finds through the ``torch_dynamo_backends`` entry point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from adakv_compile import _torch
from adakv_compile.options import Options
from adakv_compile.pipeline import compile_or_leave

__all__ = ["adakv"]


# A module-level function: Dynamo compares backends with ``==``, and a closure would recompile at every torch.compile.
def adakv(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[..., Any]:
    """Compile a graph with its attention on adaptive KV caches.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its example inputs.
        mode: A mode of ``torch.compile``, for the inner compiler.
        options: See :class:`adakv_compile.Options`.

    Returns:
        A callable with the graph's calling convention.

    Raises:
        OptionsError: An option is unknown or has a wrong value.
        CompilationRefusedError: ``strict`` and an attention with a KV cache could not be compressed.
    """
    return compile_or_leave(gm, example_inputs, Options.parse(mode, options))


_torch.route_generate(adakv)
