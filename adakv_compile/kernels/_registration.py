"""How the dialect's ops are registered: one record per op, dispatch left to ``torch.library``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch._ops import OpOverload

__all__ = ["LIBRARY", "NAMESPACE", "OpSpec", "register"]

NAMESPACE: Final = "adakv"
# Registrations live as long as this object.
LIBRARY: Final = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One op of the dialect.

    Attributes:
        schema: Name, arguments, mutations and results. The name ends in a version: compiled graphs are cached on disk
            by name, so whatever changes the schema, the fake kernel or a layout needs a new one.
        portable: Implementation for any device; never waits for the device.
        fake: Shapes, strides and dtypes of the results, without branching on symbolic sizes.
        cpu: Implementation for the CPU where reading a length costs nothing. None: the portable one.
    """

    schema: str
    portable: Callable[..., Any]
    fake: Callable[..., Any]
    cpu: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """The op's name inside the namespace."""
        return self.schema.partition("(")[0]

    @property
    def overload(self) -> OpOverload:
        """The registered op, as a graph calls it."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


def register(spec: OpSpec) -> None:
    """Define an op and its implementations."""
    LIBRARY.define(spec.schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(spec.name, spec.portable, "CompositeExplicitAutograd")
    if spec.cpu is not None:
        LIBRARY.impl(spec.name, spec.cpu, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{spec.name}", spec.fake, lib=LIBRARY)
