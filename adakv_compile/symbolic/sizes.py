"""What is known about symbolic sizes, without ever adding a guard."""

from __future__ import annotations

from collections.abc import Iterable

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

__all__ = ["Sizes"]


class Sizes:
    """Facts about the symbolic sizes of one graph.

    Comparing a ``SymInt`` with ``==`` adds a guard and with it a recompilation; everything here works on its sympy
    expression and on the value ranges and guards that are there already.

    Args:
        env: The shape environment of the graph's fake tensors, or ``None`` when all sizes are plain numbers.
    """

    def __init__(self, env: ShapeEnv | None = None) -> None:
        self._env = env
        self._canonical: dict[sympy.Expr, sympy.Expr] = {}

    @classmethod
    def of(cls, values: Iterable[object]) -> Sizes:
        """Find the shape environment of the first symbolic size among ``values``."""
        for value in values:
            if isinstance(value, torch.SymInt):
                return cls(value.node.shape_env)
        return cls()

    @property
    def is_empty(self) -> bool:
        """Whether all sizes are plain numbers."""
        return self._env is None

    def expr(self, size: int | torch.SymInt | sympy.Expr) -> sympy.Expr:
        """Return a size as an expression in which every known equality is used."""
        if isinstance(size, torch.SymInt):
            return self.canonical(size.node.expr)
        if isinstance(size, int):
            return sympy.Integer(size)
        return self.canonical(size)

    def canonical(self, expr: sympy.Expr) -> sympy.Expr:
        """Use known equalities, decide maxima and minima where ranges allow it, and expand."""
        if expr.is_Integer:
            return expr
        found = self._canonical.get(expr)
        if found is None:
            replaced = expr if self._env is None else self._env.replace(expr)
            found = self._canonical[expr] = sympy.expand(self._without_extrema(replaced))
        return found

    def equal(self, left: int | torch.SymInt | sympy.Expr, right: int | torch.SymInt | sympy.Expr) -> bool:
        """Tell whether two sizes are provably equal."""
        difference = self.canonical(self.expr(left) - self.expr(right))
        if difference.is_number:
            return difference == 0
        return self._known(sympy.Eq(difference, 0))

    def at_most(self, left: int | torch.SymInt | sympy.Expr, right: int | torch.SymInt | sympy.Expr) -> bool:
        """Tell whether ``left <= right`` is provable."""
        return self._at_most_zero(self.canonical(self.expr(left) - self.expr(right)))

    def _at_most_zero(self, difference: sympy.Expr) -> bool:
        if difference.is_number:
            return bool(difference <= 0)  # pyright: ignore[reportOperatorIssue, reportUnknownArgumentType]
        if self._env is None:
            return difference.is_nonpositive is True
        if bool(self._env.bound_sympy(difference).upper <= 0):
            return True
        return self._known(sympy.Le(difference, 0))

    def _known(self, fact: sympy.Basic) -> bool:
        if self._env is None or fact in (sympy.true, sympy.false):
            return fact == sympy.true
        return statically_known_true(self._env.create_symboolnode(fact))  # pyright: ignore[reportArgumentType]

    def _without_extrema(self, expr: sympy.Expr) -> sympy.Expr:
        """Replace ``Max`` and ``Min`` (PyTorch has its own classes of these names) by the operand that always wins."""
        if not expr.args:
            return expr
        operands = [self._without_extrema(operand) for operand in expr.args]  # pyright: ignore[reportArgumentType]
        name = expr.func.__name__
        if name in ("Max", "Min"):
            for winner in operands:
                others = (other for other in operands if other is not winner)
                signed = ((other - winner if name == "Max" else winner - other) for other in others)
                if all(self._at_most_zero(sympy.expand(difference)) for difference in signed):
                    return winner
        return expr if tuple(operands) == expr.args else expr.func(*operands)
