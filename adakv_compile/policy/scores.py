"""Importance of cached entries: attention of the observation window, pooled (SnapKV)."""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional

from adakv_compile.policy.policy import Gqa, Pool

__all__ = ["HIDDEN_LOGIT", "pool_scores", "window_scores"]

# Float masks hide by the lowest float as well as by -inf: no product of a query and a key comes near. A query all of
# whose logits are below sees nothing: their differences are rounding. The Triton kernels' bound, in units of log 2, is
# half of their LOWEST.
HIDDEN_LOGIT: Final = -3.4e37

# Largest float32 transient that one step of the scoring may make.
_MAX_BLOCK_BYTES: Final = 64 << 20


@torch.no_grad()
def window_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scale: float,
    visible: torch.Tensor | None = None,
    causal: bool = False,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    gqa: Gqa = "mean",
    query_valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention that the window pays to every key, one number per KV head and key.

    Softmax in float32 over all keys (the window's own included) and the sink, if there is one,
    then the mean over the valid queries of the window, then mean or max over the query heads that
    share a KV head (Ada-KV, Algorithm 2, in the order of the reference code). Keys are never
    expanded over the group: the group is folded into the query rows.

    Args:
        query: ``[B, Hq, W, D]``, the queries of the observation window.
        key: ``[B, Hkv, L, D]``; KV head ``h`` serves query heads ``h * G`` to ``h * G + G - 1``
            with ``G = Hq / Hkv``.
        scale: Factor on the logits.
        visible: Bool ``[B | 1, Hq | Hkv | 1, W | 1, L | 1]``, True where a query may attend to a
            key. None: everywhere.
        causal: Whether the queries are those of the last ``W`` keys and see none after their own, on top of
            ``visible``. Only these keys' logits are looked at, not those of the whole prompt.
        bias: Float, added to the capped logits, broadcastable like ``visible``; what is below ``HIDDEN_LOGIT``, such
            as ``-inf`` or the lowest float, hides a key, too.
        softcap: Logits are ``softcap * tanh(scale * product / softcap)``. None: they are not capped.
        sinks: Floating ``[Hq]``, one more logit of each query head, of no key; it takes its share of the softmax.
        gqa: Reduction over the group, ``"mean"`` or ``"max"``.
        query_valid: Bool ``[B, W]``, False for queries that are padding: they are not counted.
            None: all valid.

    Returns:
        Float32 ``[B, Hkv, L]``, not pooled. Keys that no query sees, and rows without a valid
        query, have 0. A NaN logit makes its head's scores NaN, which
        :func:`adakv_compile.policy.select` ranks lowest.

    Raises:
        ValueError: The query heads do not divide into groups, one for each KV head.
    """
    num_query_heads, num_kv_heads = query.shape[1], key.shape[1]
    if num_query_heads % num_kv_heads:
        raise ValueError(f"{num_query_heads} query heads do not divide over {num_kv_heads} KV heads")
    batch, _, window, dim = query.shape
    group = num_query_heads // num_kv_heads
    grouped = query.view(batch, num_kv_heads, group, window, dim)
    mask = None if visible is None else _per_group(visible, num_kv_heads, group)
    extra = None if bias is None else _per_group(bias, num_kv_heads, group)
    counted = None if query_valid is None else query_valid[:, None, None, :, None]
    sink = None if sinks is None else sinks.float().reshape(1, num_kv_heads, group, 1, 1)
    rows, heads = _block_shape(grouped, key)
    if rows >= key.shape[0] and heads >= num_kv_heads:
        return _block_scores(grouped, key, scale, softcap, causal, mask, extra, counted, sink, gqa)
    scores = torch.empty(key.shape[:3], dtype=torch.float32, device=key.device)
    for row in range(0, key.shape[0], rows):
        for head in range(0, num_kv_heads, heads):
            part = (slice(row, row + rows), slice(head, head + heads))
            masks = _cut(mask, part), _cut(extra, part), _cut(counted, part), _cut(sink, part)
            scores[part] = _block_scores(grouped[part], key[part], scale, softcap, causal, *masks, gqa)
    return scores


def pool_scores(scores: torch.Tensor, *, kind: Pool, kernel_size: int) -> torch.Tensor:
    """Pool along the sequence with stride 1; the length stays and what lies outside is nothing.

    Args:
        scores: Float ``[B, H, L]``.
        kind: ``"max"`` (outside is ``-inf``) or ``"avg"`` (outside is 0; always divided by
            ``kernel_size``).
        kernel_size: Odd width in entries.

    Returns:
        Float ``[B, H, L]``.
    """
    # Shifted slices rather than a pooling operator: max_pool1d specialises a symbolic length, and
    # here a sum has one order wherever its window lies, so padding cannot change a bit of it.
    reach, length = kernel_size // 2, scores.shape[-1]
    if kind == "avg":
        padded = functional.pad(scores, (reach, reach))
        total = padded[..., :length]
        for shift in range(1, kernel_size):
            total = total + padded[..., shift : shift + length]
        return total / kernel_size
    pooled = functional.pad(scores, (reach, reach), value=-torch.inf)
    width = 1
    while width < kernel_size:
        step = min(width, kernel_size - width)
        pooled = torch.maximum(pooled[..., :-step], pooled[..., step:])
        width += step
    return pooled


def _block_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    softcap: float | None,
    causal: bool,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    counted: torch.Tensor | None,
    sinks: torch.Tensor | None,
    gqa: Gqa,
) -> torch.Tensor:
    """Score ``[b, h, G, W, D]`` on ``[b, h, L, D]``; masks and sinks broadcast to ``[b, h, G, W, L]``."""
    window = query.shape[3]
    rows = (query.float() * scale).flatten(2, 3)
    logits = (rows @ key.float().mT).view(*query.shape[:-1], key.shape[2])
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        bias = bias.float()
        logits += bias.masked_fill(bias < HIDDEN_LOGIT, -torch.inf)
    if mask is not None:
        logits.masked_fill_(~mask, -torch.inf)
    if causal:
        later = torch.ones((window, window), dtype=torch.bool, device=key.device).triu_(1)
        logits[..., key.shape[2] - window :].masked_fill_(later, -torch.inf)
    if counted is None:
        num_queries: int | torch.Tensor = window
    else:
        # Hidden rather than weighted with 0: what padding holds may be NaN.
        logits.masked_fill_(~counted, -torch.inf)
        num_queries = counted.sum(-2, keepdim=True).clamp(min=1)
    peak = logits.amax(-1, keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks)
    peak = peak.masked_fill_(peak == -torch.inf, 0.0)
    logits.sub_(peak).exp_()
    mass = logits.sum(-1, keepdim=True)
    if sinks is not None:
        mass += (sinks - peak).exp_()
    mass = mass.masked_fill_(mass == 0, 1.0) * num_queries
    per_head = (mass.reciprocal().mT @ logits).squeeze(-2)
    return per_head.amax(2) if gqa == "max" else per_head.mean(2)


def _block_shape(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int]:
    """Return how many batch rows and KV heads to score at once."""
    num_rows, num_heads, length, dim = key.shape
    if isinstance(length, torch.SymInt):  # one block rather than a guard
        return num_rows, num_heads
    per_key = query.shape[2] * query.shape[3] + (0 if key.dtype == torch.float32 else dim)
    units = max(1, _MAX_BLOCK_BYTES // max(1, 4 * length * per_key))
    return (num_rows, units // num_rows) if units >= num_rows else (units, 1)


def _per_group(mask: torch.Tensor, num_kv_heads: int, group: int) -> torch.Tensor:
    """View a mask as ``[B | 1, Hkv | 1, G | 1, W | 1, L | 1]``."""
    mask = mask[(None,) * (4 - mask.dim())]
    rows, heads, window, length = mask.shape
    if heads in (1, num_kv_heads):
        return mask.unsqueeze(2)
    return mask.view(rows, num_kv_heads, group, window, length)


def _cut(mask: torch.Tensor | None, part: tuple[slice, slice]) -> torch.Tensor | None:
    """Cut a block out of a mask, whose size 1 stands for every row or head."""
    if mask is None:
        return None
    rows = slice(None) if mask.shape[0] == 1 else part[0]
    return mask[rows, slice(None) if mask.shape[1] == 1 else part[1]]
