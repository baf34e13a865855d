"""Methods and budgets: from the names on a command line to the options of the backend."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

from adakv_compile.errors import OptionsError, hint
from adakv_compile.evaluation.errors import EvaluationError
from adakv_compile.options import Options
from adakv_compile.policy.policy import Method

__all__ = ["FULL", "METHODS", "Setting", "parse_budgets", "settings"]

FULL: Final = "full"
METHODS: Final = (FULL, *get_args(Method))
"""The cache that keeps everything, and the methods of the backend."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One kind of cache: what a model is compiled for once, and answers every question under.

    Attributes:
        method: A name in :data:`METHODS`.
        budget: As in :class:`adakv_compile.Options`; None for the full cache.
    """

    method: str
    budget: int | float | None

    @property
    def label(self) -> str:
        """Method and budget in words."""
        return self.method if self.budget is None else f"{self.method} {self.budget}"

    def options(self, others: Mapping[str, object]) -> dict[str, object]:
        """Return the options of the backend.

        Args:
            others: Options but for method and budget.
        """
        return {**others, "method": self.method, "budget": self.budget}


def parse_budgets(texts: Sequence[str]) -> tuple[int | float, ...]:
    """Return budgets: ints are entries, floats in (0, 1) shares of the prompt.

    Raises:
        EvaluationError: One is no number.
    """
    budgets: list[int | float] = []
    for text in texts:
        try:
            value: Any = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise EvaluationError(f"budget {text!r} is neither a number of entries nor a share of the prompt, as 0.1")
        budgets.append(value)
    return tuple(budgets)


def settings(
    methods: Sequence[str], budgets: Sequence[int | float], others: Mapping[str, object]
) -> tuple[Setting, ...]:
    """Return every method under every budget, the full cache once; validated.

    Args:
        methods: Names in :data:`METHODS`.
        budgets: Budgets.
        others: Options of the backend but for method and budget.

    Raises:
        EvaluationError: A method is unknown, something is given twice, or there is nothing to do.
        OptionsError: A budget or another option has a wrong value.
    """
    for method in methods:
        if method not in METHODS:
            raise EvaluationError(f"unknown method {method!r}{hint(method, METHODS)} Allowed: {', '.join(METHODS)}")
    for name, given in (("method", methods), ("budget", budgets)):
        if len(set(given)) < len(given):
            raise EvaluationError(f"a {name} is given twice: {', '.join(map(str, given))}")
    for reserved in ("method", "budget"):
        if reserved in others:
            raise EvaluationError(f"option {reserved!r} has a flag of its own here: --{reserved}s")
    compressed = [method for method in methods if method != FULL]
    if not methods or (compressed and not budgets):
        raise EvaluationError("there is nothing to evaluate: give at least one method and, unless it is full, a budget")
    result = tuple(Setting(method, budget) for budget in budgets for method in compressed)
    for setting in result:
        _check(setting, others)
    return ((Setting(FULL, None),) if FULL in methods else ()) + result


def _check(setting: Setting, others: Mapping[str, object]) -> None:
    try:
        Options.parse(None, setting.options(others))
    except OptionsError as error:
        raise OptionsError(f"{setting.label}: {error}") from error
