"""Operators by flash-attn's names and schemas that run anywhere, and decoders that call them as the package does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from tests.backend.decoders import Cache, OneLayer

__all__ = ["Flash", "Packed", "TorchPacked", "flash_attn_func", "sparse_forward"]


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend as flash-attn's documentation says, by the operators of PyTorch."""
    new, total = q.shape[1], k.shape[1]
    right = 0 if causal else window_size_right
    k, v = (entries.repeat_interleave(q.shape[2] // k.shape[2], 2) for entries in (k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale
    if softcap > 0:
        logits = torch.tanh(logits / softcap) * softcap
    distance = torch.arange(total) - torch.arange(total - new, total)[:, None]
    if right >= 0:
        logits = logits.masked_fill(distance > right, -torch.inf)
    if window_size_left >= 0:
        logits = logits.masked_fill(distance < -window_size_left, -torch.inf)
    if alibi_slopes is not None:
        logits = logits - alibi_slopes[:, None, None] * distance.abs()
    weights = F.dropout(logits.softmax(-1), dropout_p)
    out = torch.empty_like(q)
    out.copy_(torch.einsum("bhij,bjhd->bihd", weights, v))
    return out, logits.logsumexp(-1), q.new_empty(0), torch.zeros(2, dtype=torch.int64)


@_forward.register_fake
def _fake(  # pyright: ignore[reportUnusedFunction]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)


class _Function(torch.autograd.Function):
    """What the package's function is, as far as its forward pass goes."""

    @staticmethod
    def forward(
        ctx: object,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout: float,
        scale: float | None,
        causal: bool,
        window: tuple[int, int],
        softcap: float,
        slopes: Tensor | None,
        lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        # By name from the window on, as the package has it.
        out, sums, *_ = torch.ops.flash_attn._flash_attn_forward(
            q,
            k,
            v,
            dropout,
            scale,
            causal=causal,
            window_size_left=window[0],
            window_size_right=window[1],
            softcap=softcap,
            alibi_slopes=slopes,
            return_softmax=False,
        )
        return (out[..., : q.shape[-1]], sums) if lse else out[..., : q.shape[-1]]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend over ``[B, L, H, D]``; the package's arguments."""
    found: Tensor | tuple[Tensor, Tensor] = _Function.apply(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_lse
    )
    return found


class Flash(OneLayer):
    """A decoder that caches ``[B, L, H, D]`` and attends with flash-attn; ``given`` are its arguments."""

    def __init__(self, **given: object) -> None:
        super().__init__()
        self.given = given

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        q, k, v = (layer(x).unflatten(-1, (-1, 16)) for layer in (self.q, self.k, self.v))
        if cache is not None:
            k, v = (torch.cat(pair, 1) for pair in zip(cache, (k, v), strict=True))
        out = flash_attn_func(q, k, v, **self.given)  # pyright: ignore[reportArgumentType]
        if isinstance(out, tuple):
            out = out[0] + out[1].mT[..., None]
        return out.flatten(2), (k, v)


@torch.library.custom_op("flash_attn_fork::_flash_attn_forward", mutates_args=())
def sparse_forward(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, local_window: int) -> Tensor:
    """Stand for what forks register by the same name, with other arguments and another meaning."""
    return q * softmax_scale


@sparse_forward.register_fake
def _sparse_fake(  # pyright: ignore[reportUnusedFunction]
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, local_window: int
) -> Tensor:
    return torch.empty_like(q)


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """Attend causally inside of each sequence of ``[L, H, D]``; every query head has its keys."""
    row = torch.bucketize(torch.arange(q.shape[0]), starts, right=True)
    index = torch.arange(q.shape[0])
    seen = (row[:, None] == row) & (index <= index[:, None])
    weights = (torch.einsum("ihd,jhd->hij", q, k) / 4).masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
def _varlen_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    return _attend_packed(q, k, v, cu_seqlens_q)


@_varlen_forward.register_fake
def _varlen_fake(  # pyright: ignore[reportUnusedFunction]
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_into", mutates_args=("out",))
def _varlen_into(out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    out.copy_(_attend_packed(q, k, v, cu_seqlens_q))


class Packed(OneLayer):
    """A decoder over sequences packed one after the other, ``forward(x, starts)`` with ``x`` ``[L, 64]``."""

    def __init__(self, *, into: bool = False) -> None:
        super().__init__()
        self.into = into

    def packed(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        """Return the attention's output ``[L, 4, 16]``."""
        if not self.into:
            return _varlen_forward(q, k, v, starts, starts)
        out = torch.empty_like(q)
        _varlen_into(out, q, k, v, starts, starts)
        return out

    def forward(self, x: Tensor, starts: Tensor) -> tuple[Tensor, Cache]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v = (layer(x).unflatten(-1, (-1, 16)) for layer in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return self.packed(q, k, v, starts).flatten(1), (k, v)


class TorchPacked(Packed):
    """The same by PyTorch's operator."""

    def packed(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        longest = q.shape[0]
        out = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out
