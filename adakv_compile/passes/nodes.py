"""Small questions about nodes of a captured graph that several analyses ask."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from adakv_compile.report import SourceLine

__all__ = ["arg", "is_cast", "same_layout", "same_size", "shape_of", "skip_no_ops", "source_line", "static_int"]

aten = torch.ops.aten

_FRAME: Final = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)')
_ALWAYS_NO_OPS: Final[frozenset[Callable[..., object]]] = frozenset(
    {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.contiguous.default}
)
_NO_OPS_OF_SAME_SHAPE: Final[frozenset[Callable[..., object]]] = frozenset(
    {
        aten.clone.default,
        aten.expand.default,
        aten.reshape.default,
        aten.slice.Tensor,
        aten.view.default,
        aten._unsafe_view.default,
    }
)


def shape_of(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """Return the sizes of a tensor value; symbolic ones stay symbolic."""
    return tuple(node.meta["val"].shape)


def arg(node: fx.Node, position: int, name: str, default: object = None) -> object:
    """Return an argument of an operator call, however it was passed."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Tell whether two sizes are provably equal; adds no guard."""
    return statically_known_true(a == b)


def same_layout(a: fx.Node, b: fx.Node) -> bool:
    """Tell whether two values of one shape provably lie in memory alike; dimensions of size one don't matter."""
    first, second = a.meta["val"], b.meta["val"]
    pairs = zip(first.shape, first.stride(), second.stride(), strict=True)
    return all((isinstance(size, int) and size == 1) or same_size(x, y) for size, x, y in pairs)


def static_int(size: object) -> int | None:
    """Return a size that is a plain number, or ``None``; adds no guard."""
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def skip_no_ops(node: fx.Node) -> fx.Node:
    """Walk up through operators that return their first input unchanged."""
    while node.op == "call_function":
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not _is_no_op(node, source):
            break
        node = source
    return node


def _is_no_op(node: fx.Node, source: fx.Node) -> bool:
    if node.target in _ALWAYS_NO_OPS:
        return True
    if node.target is aten.slice.Tensor:
        # Equal length alone proves it: a slice with step 1 that keeps every entry keeps all of them in place.
        if arg(node, 4, "step", 1) != 1:
            return False
    elif node.target not in _NO_OPS_OF_SAME_SHAPE:
        return False
    old, new = shape_of(source), shape_of(node)
    return len(old) == len(new) and all(same_size(a, b) for a, b in zip(old, new, strict=True))


def source_line(node: fx.Node) -> SourceLine | None:
    """Return the innermost line of the user's program that made a value, with a short file name."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return None
    file, line, code = frames[-1]
    return SourceLine("/".join(file.split("/")[-2:]), int(line), code.strip())


def is_cast(node: fx.Node) -> bool:
    """Tell whether a node changes nothing but the floating-point type."""
    plain = node.target is aten._to_copy.default and not set(node.kwargs) - {"dtype", "memory_format"}
    if not plain and node.target is not aten.type_as.default:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and all(value.meta["val"].dtype.is_floating_point for value in (source, node))
