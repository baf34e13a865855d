"""What is compared: the methods of the paper at seven budgets, and one change at a time of the default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from adakv_compile.evaluation.methods import METHODS, Setting, settings
from adakv_compile.evaluation.prompts import PROTOCOLS

__all__ = ["ADAPTIVE", "AWARE", "BUDGETS", "MAIN", "PARTS", "UNIFORM", "Part"]

AWARE: Final = "question-aware"
UNIFORM: Final = "snapkv"
ADAPTIVE: Final = "ada-snapkv"

#: Entries per KV head, the window of 32 included: 4 to 29 per cent of the prompts' 900 tokens.
BUDGETS: Final = (36, 40, 48, 72, 96, 128, 256)
_FEW: Final = (40, 48, 72, 96)


@dataclass(frozen=True, slots=True)
class Part:
    """One run: settings that share their options.

    Attributes:
        name: Name, and of its folder.
        settings: Methods and budgets.
        protocols: Protocols.
        options: Options of the backend that are not the defaults.
    """

    name: str
    settings: tuple[Setting, ...]
    protocols: tuple[str, ...]
    options: Mapping[str, object] = field(default_factory=dict[str, object])


MAIN: Final = Part("main", settings(METHODS, BUDGETS, {}), PROTOCOLS)


def _variant(
    name: str, options: Mapping[str, object], methods: tuple[str, ...] = (UNIFORM, ADAPTIVE), least: int = 0
) -> Part:
    budgets = tuple(budget for budget in _FEW if budget > least)
    return Part(name, settings(methods, budgets, options), (AWARE,), options)


PARTS: Final = {
    part.name: part
    for part in (
        MAIN,
        _variant("ties=score", {"ties": "score"}),
        _variant("safeguard=hard", {"safeguard": "hard"}, (ADAPTIVE,)),
        _variant("alpha=0.05", {"alpha": 0.05}, (ADAPTIVE,)),
        _variant("alpha=0.5", {"alpha": 0.5}, (ADAPTIVE,)),
        _variant("window=8", {"window": 8}),
        _variant("window=64", {"window": 64}, least=64),
        _variant("pool=avg", {"pool": "avg"}),
        _variant("gqa=max", {"gqa": "max"}),
    )
}
"""The runs by name; the default of every option that a variant changes is in ``main``."""
