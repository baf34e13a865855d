"""A stable text of a graph: values renumbered, symbolic sizes as letters, no paths, no devices."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, Final

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

__all__ = ["print_graph"]

_DTYPES: Final[Mapping[torch.dtype, str]] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
}


def print_graph(graph: fx.Graph) -> str:
    """Return one line for each value: ``%3 = op(%1, %2) -> f32[2, a, 64]``.

    Symbolic sizes get letters in order of appearance, so the text depends on the graph alone.
    """
    return "\n".join(_Printer().lines(graph))


class _Printer:
    def __init__(self) -> None:
        self._names: dict[fx.Node, str] = {}
        self._letters: dict[str, str] = {}

    def lines(self, graph: fx.Graph) -> list[str]:
        lines: list[str] = []
        for node in graph.nodes:
            if node.op == "output":
                lines.append(f"return {self._value(node.args[0])}")
                continue
            self._names[node] = name = f"%{len(self._names)}"
            if node.op == "placeholder":
                call = "input"
            elif node.op == "get_attr":
                call = "constant"
            else:
                arguments = [self._value(value) for value in node.args]
                arguments += [f"{key}={self._value(value)}" for key, value in node.kwargs.items() if key != "device"]
                call = f"{_target(node.target)}({', '.join(arguments)})"
            lines.append(f"{name} = {call} -> {self._type(node.meta.get('val'))}")
        return lines

    def _value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._names[value]
        if isinstance(value, (list, tuple)):
            inside = ", ".join(self._value(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
            return f"[{inside}]"
        if isinstance(value, torch.dtype):
            return _DTYPES.get(value, str(value).removeprefix("torch."))
        if isinstance(value, int) and not isinstance(value, bool) and value >= 2**62:
            return "end"
        return repr(value)

    def _type(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            sizes = ", ".join(self._size(size) for size in value.shape)
            return f"{_DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{sizes}]"
        if isinstance(value, (list, tuple)):
            inside = ", ".join(self._type(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
            return f"({inside})"
        return self._size(value) if isinstance(value, (int, torch.SymInt)) else type(value).__name__

    def _size(self, size: int | torch.SymInt) -> str:
        if isinstance(size, int):
            return str(size)
        expression = size.node.expr
        letters = {
            symbol: sympy.Symbol(self._letters.setdefault(str(symbol), _letter(len(self._letters))))
            for symbol in sorted(expression.free_symbols, key=str)
        }
        return str(expression.xreplace(letters))


def _letter(index: int) -> str:
    letters = string.ascii_lowercase
    return letters[index] if index < len(letters) else f"{letters[index % 26]}{index // 26}"


def _target(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target).removeprefix("aten.")
    return getattr(target, "__name__", str(target))
