"""The libraries that can compute the attention of a prompt, when each can, and which is taken: one table."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from adakv_compile.kernels._checks import check_grouped, check_like, check_shape
from adakv_compile.kernels._support import target_of

__all__ = ["BACKENDS", "Backend", "Request", "best_backend", "prefill_attention"]


@dataclass(frozen=True, slots=True)
class Request:
    """A causal attention of as many queries as keys, without padding.

    Attributes:
        device: Of all tensors.
        dtype: Of all tensors.
        key_dim: ``Dk``.
        value_dim: ``Dv``.
        sliding_window: Keys a query sees, its own included.
    """

    device: torch.device
    dtype: torch.dtype
    key_dim: int
    value_dim: int
    sliding_window: int | None


Run = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float, "int | None"], "tuple[torch.Tensor, torch.Tensor | None]"
]


@dataclass(frozen=True, slots=True)
class Backend:
    """One library.

    Attributes:
        why_not: Why it does not serve a request, None if it does.
        run: Query ``[B, Hq, T, Dk]``, key, value, scale and sliding window to the output ``[B, Hq, T, Dv]`` and the
            log-sum-exp ``[B, Hq, T]``. None: the graph calls PyTorch's operator, or keeps the model's.
        gives_lse: Whether it returns the log-sum-exp at no cost.
    """

    why_not: Callable[[Request], str | None]
    run: Run | None = None
    gives_lse: bool = False


def _served(request: Request) -> str | None:
    return None


def _why_not_sdpa(request: Request) -> str | None:
    return None if request.sliding_window is None else "scaled_dot_product_attention has no sliding window of its own"


def _why_not_flash(request: Request) -> str | None:
    """What every kernel of the flash-attention family asks for."""
    if request.device.type != "cuda":
        return f"the device is {request.device.type}, not CUDA"
    if target_of(request.device).capability < (8, 0):
        return "compute capability below 8.0"
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {request.dtype} is neither bfloat16 nor float16"
    if request.key_dim != request.value_dim:
        return f"keys of {request.key_dim} and values of {request.value_dim} dimensions"
    if request.key_dim > 256 or request.key_dim % 8:
        return f"head dimension {request.key_dim} is above 256 or no multiple of 8"
    return None


def _why_not_cudnn(request: Request) -> str | None:
    if not torch.backends.cudnn.is_available():
        return "cuDNN is not available"
    return _why_not_sdpa(request) or _why_not_flash(request)


def _why_not_flash_attn(request: Request) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    return _why_not_flash(request)


def _run_cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, sliding_window: int | None
) -> tuple[torch.Tensor, None]:
    grouped = query.shape[1] != key.shape[1]
    # Without the priority PyTorch would take flash attention wherever both can be had.
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        out = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
        )
    return out, None


def _run_flash_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, sliding_window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    flash: Any = importlib.import_module("flash_attn")
    out, lse, _ = flash.flash_attn_func(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        softmax_scale=scale,
        causal=True,
        window_size=_window(sliding_window),
        # Makes it return the sums; the probabilities themselves are only made when there is dropout.
        return_attn_probs=True,
    )
    return out.transpose(1, 2), lse


def _run_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, sliding_window: int | None
) -> tuple[torch.Tensor, None]:
    varlen: Any = importlib.import_module("torch.nn.attention.varlen")
    batch, _, length, _ = query.shape
    starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    rows = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    # PyTorch 2.11 takes grouped heads as they are and has no such argument.
    known = inspect.signature(varlen.varlen_attn).parameters
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in known else {}
    left, right = _window(sliding_window)
    out = varlen.varlen_attn(
        *rows, starts, starts, length, length, scale=scale, window_size=(left, right if left >= 0 else 0), **grouped
    )
    return out.unflatten(0, (batch, length)).transpose(1, 2), None


def _window(sliding_window: int | None) -> tuple[int, int]:
    """Return how far a query sees to the left and right; -1 is without bound."""
    return (-1, -1) if sliding_window is None else (sliding_window - 1, 0)


BACKENDS: Final[dict[str, Backend]] = {
    "model": Backend(_served),
    "sdpa": Backend(_why_not_sdpa),
    "cudnn": Backend(_why_not_cudnn, _run_cudnn),
    "flash-attn": Backend(_why_not_flash_attn, _run_flash_attn, gives_lse=True),
    "varlen": Backend(_why_not_flash, _run_varlen),
}
"""By the names of ``options={"attention": ...}``. ``model`` is the operator that the model calls, its mask and its
repeated keys included; ``sdpa`` is the same operator called with its causal flag, so that PyTorch can choose among all
its kernels and no mask is made."""

# PyTorch's own choice is good and maintained wherever it needs no mask; a sliding window needs one there.
_ORDER: Final = {"cuda": ("sdpa", "flash-attn", "varlen", "model")}


def best_backend(request: Request) -> str:
    """Return the backend to take when the user leaves it open.

    On a CPU that is always the model's own operator: what it computes stays the same to the last bit.
    """
    order = _ORDER.get(request.device.type, ("model",))
    return next(name for name in order if BACKENDS[name].why_not(request) is None)


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend; see :mod:`adakv_compile.kernels.prefill_attention.op`."""
    op = "prefill_attention"
    check_shape(op, "query", query, (None, None, None, None))
    batch, heads, length, key_dim = query.shape
    check_shape(op, "key", key, (batch, None, length, key_dim))
    check_shape(op, "value", value, (batch, key.shape[1], length, None))
    check_like(op, query, key=key, value=value)
    check_grouped(op, heads, key.shape[1])
    run = BACKENDS[backend].run
    if run is None:
        raise ValueError(f"{op}: backend {backend!r} is an operator of the graph, not of this op")
    out, lse = run(query, key, value, scale, sliding_window)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, query.new_empty((batch, heads, 0), dtype=torch.float32) if lse is None else lse.contiguous()
