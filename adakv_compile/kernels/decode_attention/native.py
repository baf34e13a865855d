"""The C++ kernel of decode attention on CPUs: built once a machine in the background, called with plain numbers.

It is called from here until its entry is built as well, by which PyTorch's dispatcher calls it without Python; the
entry includes PyTorch's headers, so that it takes several times as long to build. Both compute the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import subprocess
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, Final

import torch

from adakv_compile import _torch

__all__ = ["build_ahead", "building_entry", "decode", "kernel", "take_over"]

log = logging.getLogger(__name__)

_KERNEL: Final = Path(__file__).with_name("native.cpp")
_ENTRY: Final = Path(__file__).with_name("entry.cpp")
_DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_ROOM: Final = 1
# What comes of a compiler that is missing or fails, of a linker, a file system, a lock, another version of Inductor.
_FAILURES: Final = (RuntimeError, OSError, subprocess.SubprocessError, ImportError, AttributeError, TypeError)
_Kernel = Any
_Numbers = ctypes.c_int64 * 19
_Factors = ctypes.c_double * 2
_Pointers = ctypes.c_void_p * 14


@functools.cache
def building() -> Future[ctypes.CDLL | None]:
    """Begin to build the kernel, or to load it where it was built before.

    Returns:
        What will be the library; None if it can't be built.
    """
    return _begin(_KERNEL, "PyTorch's operators serve")


@functools.cache
def building_entry() -> Future[ctypes.CDLL | None]:
    """Begin to build the kernel's entry, or to load it; as :func:`building`."""
    return _begin(_ENTRY, "Python calls the kernel at every step")


def build_ahead() -> None:
    """Begin to build the kernel without waiting for it."""
    building()


@functools.cache
def kernel() -> _Kernel | None:
    """Return the kernel as soon as it is built; None where it can't be: without a C++ compiler, say."""
    library = building().result()
    return None if library is None else library.adakv_decode_attention


def take_over() -> None:
    """Let PyTorch's dispatcher call the kernel itself from now on, if its entry is built by now.

    The entry is not begun before the first step is there: until then the compiler has the model's graphs to compile.
    Registering is left to whoever calls the op, as the dispatcher's tables are not to be changed beside a call.
    """
    if kernel() is not None and building_entry().done():
        _register()


@functools.cache
def _register() -> None:
    entry, found = building_entry().result(), kernel()
    if entry is not None and found is not None:
        entry.adakv_register(ctypes.cast(found, ctypes.c_void_p))


def _begin(source: Path, otherwise: str) -> Future[ctypes.CDLL | None]:
    found: Future[ctypes.CDLL | None] = Future()

    def build() -> None:
        library = None
        try:
            library = _build(source, otherwise)
        finally:
            # Whatever failed, nobody waits for it for ever.
            found.set_result(library)

    # A program that ends meanwhile does not wait for the compiler.
    Thread(target=build, name="adakv-native", daemon=True).start()
    return found


def _build(source: Path, otherwise: str) -> ctypes.CDLL | None:
    try:
        return _torch.load_cpp(source.read_text())
    except _FAILURES as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        log.warning("decode attention's %s can't be built, %s: %s", source.name, otherwise, first)
        return None


def decode(
    query: torch.Tensor,
    key_new: torch.Tensor,
    value_new: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    cursor: torch.Tensor,
    prefix_seen: torch.Tensor | None,
    tail_seen: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor | None:
    """Append and attend with one query of each row; arguments as in :mod:`adakv_compile.kernels.decode_attention.op`.

    Every step comes through here for every layer.

    Args:
        query: ``[B, Hq, 1, Dk]``.
        key_new: ``[B, H, 1, Dk]``.
        value_new: ``[B, H, 1, Dv]``.
        keys: ``[B, N, Dk]``.
        values: ``[B, N, Dv]``.
        offsets: ``[B, H + 1]``.
        positions: ``[B, N]``.
        tail_keys: ``[B, H, C, Dk]``.
        tail_values: ``[B, H, C, Dv]``.
        cursor: ``[2 or more]``.
        prefix_seen: Bool ``[B, N]``, False where a mask hides an entry; None hides nothing.
        tail_seen: Bool ``[B, t]`` of the tail with the new token, given together with ``prefix_seen``.
        sinks: ``[Hq]``, or None.
        scale: See there.
        sliding_window: See there.
        softcap: See there.

    Returns:
        ``[B, Hq, 1, Dv]``; None if the kernel doesn't serve these arguments, and nothing was done.

    Raises:
        ValueError: The tail has no room for the token.
    """
    code = _DTYPES.get(query.dtype)
    run = None if code is None else kernel()
    if run is None:
        return None
    batch, query_heads, _, key_dim = query.shape
    heads, capacity, value_dim = tail_values.shape[1:]
    slots = keys.shape[1]
    fits = (
        heads > 0
        and query_heads % heads == 0
        and query.shape[2] == 1
        and key_new.shape == (batch, heads, 1, key_dim)
        and value_new.shape == (batch, heads, 1, value_dim)
        and keys.shape == (batch, slots, key_dim)
        and values.shape == (batch, slots, value_dim)
        and offsets.shape == (batch, heads + 1)
        and positions.shape == (batch, slots)
        and tail_keys.shape == (batch, heads, capacity, key_dim)
        and tail_values.shape[0] == batch
        and (sinks is None or (sinks.shape == (query_heads,) and sinks.is_cpu and sinks.is_floating_point()))
        and (softcap is None or 0 < softcap < math.inf)
    )
    entries = (keys, values, tail_keys, tail_values)
    integers = (offsets, positions, cursor)
    if not (
        fits
        and query.is_cpu
        and all(t.dtype == query.dtype and t.is_cpu for t in (key_new, value_new))
        and all(t.dtype == query.dtype and t.is_cpu and t.is_contiguous() for t in entries)
        and all(t.dtype == torch.int32 and t.is_cpu and t.is_contiguous() for t in integers)
    ):
        # The general implementation says what is wrong, if anything is.
        return None
    out = query.new_empty((batch, query_heads, 1, value_dim))
    if sinks is not None:
        sinks = sinks.float().contiguous()
    q, k, v = query.stride(), key_new.stride(), value_new.stride()
    threads = torch.get_num_threads()
    numbers = _Numbers(
        *(batch, heads, query_heads // heads, key_dim, value_dim, slots, capacity, sliding_window or 0, code, threads),
        *(q[0], q[1], q[3], k[0], k[1], k[3], v[0], v[1], v[3]),
    )
    pointers = _Pointers(
        *(query.data_ptr(), key_new.data_ptr(), value_new.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(offsets.data_ptr(), positions.data_ptr(), tail_keys.data_ptr(), tail_values.data_ptr(), cursor.data_ptr()),
        *(None if some is None else some.data_ptr() for some in (prefix_seen, tail_seen, sinks)),
        out.data_ptr(),
    )
    failed = run(numbers, _Factors(scale, softcap or 0.0), pointers)
    if failed == _NO_ROOM:
        raise ValueError(
            f"decode_attention: {int(cursor[0])} tail entries and 1 new ones exceed the capacity {capacity}"
        )
    return None if failed else out
