"""Eager attention over a compressed cache: the kept entries, padded to the longest head, and ordinary SDPA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv_compile.runtime.boundary import join
from adakv_compile.runtime.compressed import CompressedKV, kept_positions
from adakv_compile.runtime.errors import CacheMismatchError
from adakv_compile.runtime.repeated import RepeatedKV
from adakv_compile.runtime.store import LayerStore

__all__ = ["attend", "densify"]


def attend(
    query: Tensor,
    key: CompressedKV,
    value: CompressedKV,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Return what dense attention returns when the evicted slots are masked out, ``[B, Hq, T, Dv]``.

    ``is_causal`` means what it means in PyTorch: query ``t`` sees slots ``0..t``, whatever the lengths. This serves
    graphs that were not compiled; it takes memory for the longest head of each row, never for the logical length.

    Args:
        query: ``[B, Hq, T, Dk]``.
        key: Keys of logical shape ``[B, H, L, Dk]``, where ``H`` divides ``Hq``.
        value: Values of logical shape ``[B, H, L, Dv]``.
        mask: Boolean or additive, broadcastable to ``[B, Hq, T, L]``.
        dropout: Probability, on attention weights.
        is_causal: Whether PyTorch's causal mask applies as well.
        scale: Scale of the scores; ``1 / sqrt(Dk)`` if None.

    Raises:
        CacheMismatchError: Keys and values, or the query, don't belong together.
        TailGrowthError: There is no memory for the new entries.
    """
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[1] % key.shape[1]:
        raise CacheMismatchError(
            f"Attention of a query {list(query.shape)} over keys {list(key.shape)} and values {list(value.shape)}:"
            " batch and length must agree, and the number of query heads must be a multiple of the KV heads."
        )
    plain_key = key.base if isinstance(key, RepeatedKV) else key
    plain_value = value.base if isinstance(value, RepeatedKV) else value
    store = join(plain_key, plain_value)
    keys, values, slots, held = _gathered(store, plain_key.start)
    if slots.shape[2] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[3])
    group = query.shape[1] // store.num_kv_heads
    allowed = _allowed(query, slots, held, mask, is_causal, group, key.shape[2])
    return F.scaled_dot_product_attention(query, keys, values, allowed, dropout, scale=scale, enable_gqa=group > 1)


def densify(view: CompressedKV, fill: float) -> tuple[Tensor, Tensor]:
    """Return the dense tensor in the view's layout, and ``[B, Hkv, L]`` bool: which slots are held."""
    store = view.store
    keys, values = (store.keys, store.tail_keys), (store.values, store.tail_values)
    if view.kind == "pair":
        (dense_keys, held), (dense_values, _) = _scattered(view, *keys, fill), _scattered(view, *values, fill)
        return view.axes.join_pair(dense_keys, dense_values), held
    dense, held = _scattered(view, *(keys if view.kind == "key" else values), fill)
    return view.axes.from_standard(dense), held


def _scattered(view: CompressedKV, prefix: Tensor, tail: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """Return kept entries ``[B, N, D]`` and appended ones at their slots, ``[B, Hkv, L, D]``, and which are held."""
    store, start, length = view.store, view.start, view.length
    shape = (store.batch, store.num_kv_heads, length)
    dense = prefix.new_full((*shape, prefix.shape[2]), fill)
    held = torch.zeros(shape, dtype=torch.bool, device=prefix.device)
    positions, valid = kept_positions(store)
    valid = valid & (positions >= start)
    row, head, _ = valid.nonzero(as_tuple=True)
    slot = positions[valid] - start
    dense[row, head, slot] = _by_head(store, prefix)[valid]
    held[row, head, slot] = True
    parts = [tail[:, :, : view.tail_length]]
    if (pending := view.pending) is not None:
        parts.append(pending)
    appended = torch.cat(parts, dim=2)
    shown = min(appended.shape[2], length)
    if shown:
        dense[:, :, length - shown :] = appended[:, :, appended.shape[2] - shown :]
        held[:, :, length - shown :] = True
    return dense, held


def _gathered(store: LayerStore, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return keys and values ``[B, Hkv, M, D*]``, their slots and which of them are held, ``[B, Hkv, M]``."""
    positions, held = kept_positions(store)
    used = store.tail_length
    first = store.prefix_length
    appended = torch.arange(first, first + used, device=positions.device).expand(*positions.shape[:2], -1)
    slots = torch.cat([positions, appended], dim=2) - start
    held = torch.cat([held, torch.ones_like(appended, dtype=torch.bool)], dim=2) & (slots >= 0)
    keys = torch.cat([_by_head(store, store.keys), store.tail_keys[:, :, :used]], dim=2)
    values = torch.cat([_by_head(store, store.values), store.tail_values[:, :, :used]], dim=2)
    return keys, values, slots.clamp(min=0), held


def _by_head(store: LayerStore, entries: Tensor) -> Tensor:
    """Return ``[B, N, D]`` entries as ``[B, Hkv, M, D]``, padded to the longest head."""
    starts, ends = store.offsets[:, :-1, None].to(torch.int64), store.offsets[:, 1:, None]
    longest = int((ends - starts).max()) if starts.numel() else 0
    if longest == 0:
        return entries.new_empty(store.batch, store.num_kv_heads, 0, entries.shape[2])
    index = (starts + torch.arange(longest, device=entries.device)).clamp(max=entries.shape[1] - 1)
    rows = torch.arange(store.batch, device=entries.device)[:, None, None]
    # Padding holds another head's entries, or anything past the row's end: zeros, as 0 * NaN is NaN.
    return entries[rows, index].masked_fill(
        (starts + torch.arange(longest, device=entries.device) >= ends)[..., None], 0
    )


def _allowed(
    query: Tensor,
    slots: Tensor,
    held: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    group: int,
    length: int,
) -> Tensor:
    """Return the mask over gathered entries, ``[B, Hq, T, M]``, boolean or additive like the given one."""
    batch, heads, tokens = query.shape[:3]
    slots = slots.repeat_interleave(group, dim=1)[:, :, None, :]
    held = held.repeat_interleave(group, dim=1)[:, :, None, :]
    if is_causal:
        held = held & (slots <= torch.arange(tokens, device=slots.device)[:, None])
    if mask is None:
        return held.expand(batch, heads, tokens, -1)
    everywhere = mask.expand(batch, heads, tokens, length)
    looked_up = everywhere.gather(3, slots.expand(batch, heads, tokens, -1))
    if looked_up.dtype == torch.bool:
        return looked_up & held
    return looked_up.masked_fill(~held, -torch.inf)
