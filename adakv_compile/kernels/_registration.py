"""How the dialect's ops are registered: one record per op, dispatch left to ``torch.library``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch
from torch._ops import OpOverload

from adakv_compile.kernels._support import Subject, why_unsupported

__all__ = ["KERNELS", "LIBRARY", "NAMESPACE", "Kernels", "OpSpec", "register"]

NAMESPACE: Final = "adakv"
# Registrations live as long as this object.
LIBRARY: Final = torch.library.Library(NAMESPACE, "FRAGMENT")

Kernels = Literal["auto", "triton", "portable"]
"""Who computes an op: the best for the device, or one implementation wherever it runs."""

KERNELS: Final[tuple[Kernels, ...]] = get_args(Kernels)


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One op of the dialect.

    One with a Triton implementation is registered as three overloads of the same schema: ``default`` goes by the
    device, ``triton`` and ``portable`` are these implementations on any device, for whoever asks for them
    (``options={"kernels": ...}``).

    Attributes:
        schema: Name, arguments, mutations and results. The name ends in a version: compiled graphs are cached on disk
            by name, so whatever changes the schema, the fake kernel or a layout needs a new one.
        portable: Implementation for any device; never waits for the device.
        fake: Shapes, strides and dtypes of the results, without branching on symbolic sizes.
        triton: ``"module:function"`` of the Triton implementation, imported when it is first called: Triton is slow to
            import and need not be installed. It never waits for the device either. None: there is none.
        subject: What of a call's arguments decides whether Triton serves it; given together with ``triton``.
        cpu: Implementation for the CPU where reading a length costs nothing. None: the portable one.
        native: Whether C++ may take the CPU over from ``cpu``, which is the overload of that name then, for C++ to call
            where it doesn't serve the arguments.
    """

    schema: str
    portable: Callable[..., Any]
    fake: Callable[..., Any]
    triton: str | None = None
    subject: Callable[..., Subject] | None = None
    cpu: Callable[..., Any] | None = None
    native: bool = False

    @property
    def name(self) -> str:
        """The op's name inside the namespace."""
        return self.schema.partition("(")[0]

    @property
    def overload(self) -> OpOverload:
        """The registered op that goes by the device."""
        return self.overload_for("auto")

    def overload_for(self, kernels: Kernels) -> OpOverload:
        """Return the registered op as a graph calls it; without a Triton implementation there is no choice."""
        packet = getattr(getattr(torch.ops, NAMESPACE), self.name)
        return getattr(packet, "default" if kernels == "auto" or self.triton is None else kernels)

    def run_triton(self, *args: Any) -> Any:
        """Call the Triton implementation.

        Raises:
            RuntimeError: It does not serve these arguments.
        """
        if why := self._why_not(args):
            raise RuntimeError(f"{NAMESPACE}::{self.name}.triton: {why}")
        return self._implementation()(*args)

    def run_on_cuda(self, *args: Any) -> Any:
        """Call the Triton implementation, or the portable one where Triton does not serve the arguments."""
        return self.portable(*args) if self._why_not(args) else self._implementation()(*args)

    def run_without_native(self, *args: Any) -> Any:
        """Call what goes by the device as long as no implementation in C++ does."""
        run = self.portable if self.cpu is None or args[0].device.type != "cpu" else self.cpu
        return run(*args)

    def _why_not(self, args: tuple[Any, ...]) -> str | None:
        assert self.subject is not None  # it is given together with the kernel, without which nothing asks
        return why_unsupported(self.subject(*args))

    def _implementation(self) -> Callable[..., Any]:
        assert self.triton is not None  # there is no overload that would call this
        module, _, function = self.triton.partition(":")
        return getattr(importlib.import_module(module), function)


def register(spec: OpSpec) -> None:
    """Define an op and its implementations."""
    if spec.native and spec.cpu is not None:
        # The CPU's own place in the dispatcher's table is left free.
        _define(spec, "", spec.run_without_native)
        _define(spec, ".cpu", spec.cpu)
    else:
        _define(spec, "", spec.portable)
        if spec.cpu is not None:
            LIBRARY.impl(spec.name, spec.cpu, "CPU")
    if spec.triton is not None:
        LIBRARY.impl(spec.name, spec.run_on_cuda, "CUDA")
        _define(spec, ".portable", spec.portable)
        _define(spec, ".triton", spec.run_triton)


def _define(spec: OpSpec, overload: str, implementation: Callable[..., Any]) -> None:
    name = f"{spec.name}{overload}"
    LIBRARY.define(name + spec.schema.removeprefix(spec.name), tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", spec.fake, lib=LIBRARY)
