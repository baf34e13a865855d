"""A guard under which what would wait for a device, or could not be captured in a CUDA graph, fails on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adakv_compile.kernels._support import interpreting

__all__ = ["HostReadError", "no_host_reads"]

#: Methods that read a tensor's elements, some of them without a call that is dispatched.
READS = {
    getattr(torch.Tensor, name)
    for name in (
        "__bool__",
        "__complex__",
        "__contains__",
        "__float__",
        "__index__",
        "__int__",
        "cpu",
        "cuda",
        "is_nonzero",
        "item",
        "numpy",
        "tolist",
    )
}
#: Functions that copy what Python holds to a device.
UPLOADS = {torch.as_tensor, torch.asarray, torch.from_numpy, torch.tensor, torch.Tensor.new_tensor}
#: The value, or the shape, of a result depends on elements.
DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
#: Their masks are turned into indices, which is ``nonzero``.
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")


class HostReadError(AssertionError):
    """An operation that waits for the device."""


class _Pause:
    """Whether the guard looks away."""

    active = False


class _Functions(TorchFunctionMode):
    def __init__(self, pause: _Pause) -> None:
        super().__init__()
        self.pause = pause

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.pause.active and (func in READS or func in UPLOADS):
            raise HostReadError(f"{getattr(func, '__qualname__', func)} moves elements between host and device")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, pause: _Pause) -> None:
        super().__init__()
        self.pause = pause

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.pause.active and (why := _why_it_waits(func, args, kwargs)):
            raise HostReadError(f"{func}: {why}")
        return func(*args, **kwargs)


def _why_it_waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    name = func._schema.name
    if name in INDEXED:
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
            return "an index is a mask, so that the result's shape depends on elements"
    elif DATA_DEPENDENT.intersection(func.tags):
        return "its result, or the shape of it, depends on elements"
    if name == "aten::lift_fresh":
        return "a tensor made of Python numbers is copied to the device"
    devices = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
    if (target := kwargs.get("device")) is not None and devices:
        devices.add(torch.device(target))
    # A new tensor on another device is no copy.
    if len(devices) > 1 and not name.startswith("aten::new_"):
        return f"devices {', '.join(sorted(map(str, devices)))} meet"
    return None


@contextmanager
def no_host_reads() -> Generator[None]:
    """Fail on whatever reads a tensor on the host, makes a shape of one, or copies between devices.

    A CUDA graph can be captured of what passes: there is nothing in it that a capture forbids. Triton's interpreter,
    which reads everything, is let through; the launched kernels themselves run on the device.
    """
    pause = _Pause()
    with ExitStack() as stack:
        if interpreting():
            stack.enter_context(_interpreter_exempt(pause))
        stack.enter_context(_Functions(pause))
        stack.enter_context(_Operators(pause))
        yield


def _interpreter_exempt(pause: _Pause) -> Any:
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__

    def exempt(*args: Any, **kwargs: Any) -> Any:
        pause.active = True
        try:
            return run(*args, **kwargs)
        finally:
            pause.active = False

    return mock.patch.object(interpreter.GridExecutor, "__call__", exempt)
