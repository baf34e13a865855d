"""Positions in the sequence as the host can know them: sums of sizes and integers, or elements of an input besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from adakv_compile.buffer_call import Number, Position
from adakv_compile.capture import Program
from adakv_compile.symbolic.expr import Expr, Iota, Load, Size, add, linear
from adakv_compile.symbolic.mask import Offset
from adakv_compile.symbolic.read import Leaf
from adakv_compile.symbolic.sizes import Sizes

__all__ = ["HostNumbers", "Start"]


@dataclass(frozen=True)
class Start:
    """A position: ``shift``, or the element of an input plus ``shift``."""

    leaf: fx.Node | None
    element: tuple[int, ...]
    shift: sympy.Expr

    def __str__(self) -> str:
        if self.leaf is None:
            return str(self.shift)
        element = f"{self.leaf.name}[{', '.join(map(str, self.element))}]" if self.element else self.leaf.name
        return element if self.shift == 0 else f"{element} + {self.shift}"


@dataclass
class HostNumbers:
    """Says how the host computes sizes from a call's arguments.

    Attributes:
        program: The captured graph.
        sizes: What is known about its symbolic sizes.
    """

    program: Program
    sizes: Sizes
    _sources: dict[sympy.Expr, tuple[int, int | None]] = field(init=False)

    def __post_init__(self) -> None:
        self._sources = {}
        for index, node in enumerate(self.program.inputs):
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                self._sources.setdefault(value.node.expr, (index, None))
            elif isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt):
                        self._sources.setdefault(size.node.expr, (index, dim))

    def number(self, size: int | torch.SymInt | sympy.Expr) -> Number | None:
        """Return how a size is computed; ``None`` if it is no sum of inputs."""
        constant, terms = 0, list[tuple[int, int, int | None]]()
        for symbol, factor in self.sizes.expr(size).as_coefficients_dict().items():
            if not sympy.sympify(factor).is_Integer:
                return None
            if symbol == 1:
                constant = int(factor)
            elif symbol in self._sources:
                terms.append((int(factor), *self._sources[symbol]))
            else:
                return None
        return Number(constant, tuple(terms))

    def position(self, start: Start) -> Position | None:
        """Return how a position is computed."""
        number = self.number(start.shift)
        if number is None:
            return None
        tensor = None if start.leaf is None else self.program.inputs.index(start.leaf)
        return Position(number, tensor, start.element)

    def start_of(self, offset: Offset, leaves: Mapping[str, Leaf]) -> Start | None:
        """Return a position from an expression that says it for the first query; ``None`` if the host can't know it."""
        if isinstance(offset, sympy.Expr):
            return Start(None, (), self.sizes.expr(offset))
        terms, shift = linear(offset)
        if not terms:
            return Start(None, (), self.sizes.expr(shift))
        (load, factor), *others = terms.items()
        if others or factor != 1 or not isinstance(load, Load):
            return None
        leaf = leaves[load.leaf].node
        element = [_number(index) for index in load.index]
        if leaf.op != "placeholder" or None in element:
            return None
        return Start(leaf, tuple(index for index in element if index is not None), self.sizes.expr(shift))

    def start_of_entries(self, entry: Expr, count: int | torch.SymInt, leaves: Mapping[str, Leaf]) -> Start | None:
        """Return the first of consecutive positions.

        Args:
            entry: Position of entry ``Iota(0)``.
            count: Entries.
            leaves: The tensors that it reads.
        """
        terms, _ = linear(entry)
        step = terms.pop(Iota(0), sympy.Integer(0))
        if not (step == 1 or (isinstance(count, int) and count == 1 and step == 0)):
            return None
        rest = add(entry, Iota(0), -1) if step == 1 else entry
        return self.start_of(rest, leaves)

    def differ(self, one: Start, other: Start) -> bool:
        """Tell whether two positions are not the same expression, up to the input that they are read from.

        Positions that differ only in the input they are read from are compared at every call.
        """
        if one.leaf is other.leaf and one.element == other.element:
            return not self.sizes.equal(one.shift, other.shift)
        return one.leaf is None and other.leaf is None

    def same(self, one: Start, other: Start) -> bool:
        """Tell whether two positions are the same expression."""
        return one.leaf is other.leaf and one.element == other.element and self.sizes.equal(one.shift, other.shift)


def _number(expr: Expr) -> int | None:
    return int(expr.value) if isinstance(expr, Size) and expr.value.is_Integer else None  # pyright: ignore[reportArgumentType]
