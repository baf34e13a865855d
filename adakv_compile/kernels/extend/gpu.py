"""Attention to a compressed past and compression of all of it, in Triton."""

from __future__ import annotations

from typing import Final

import torch
import triton

from adakv_compile.kernels._checks import check_mask, check_softmax
from adakv_compile.kernels._launch import factors_of, launch
from adakv_compile.kernels._softmax import Softmax
from adakv_compile.kernels._support import target_of
from adakv_compile.kernels.compact.tuning import config_of
from adakv_compile.kernels.compact.tuning import constants_of as gather_constants_of
from adakv_compile.kernels.decode_attention.gpu import attend
from adakv_compile.kernels.decode_attention.reference import check_attention
from adakv_compile.kernels.extend.reference import Extended, extended_slots, real_positions
from adakv_compile.kernels.extend.triton import gather_held, score_held
from adakv_compile.kernels.extend.tuning import Scoring, blocks_of, constants_of, programs_of
from adakv_compile.kernels.select.gpu import choose
from adakv_compile.kernels.select.reference import pack
from adakv_compile.policy import Policy, layer_budget

__all__ = ["extend"]

_MAX_STRIDE: Final = 2**24


def extend(
    query: torch.Tensor,
    key_new: torch.Tensor,
    value_new: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    tail_length: int,
    prefix_length: int,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    policy: str,
    evict: bool,
) -> Extended:
    """Attend, then compress; see :mod:`adakv_compile.kernels.extend.op`."""
    check_attention("extend", query, key_new, value_new, keys, values, offsets, positions, tail_keys, tail_values)
    check_mask("extend", query, mask, padding)
    check_softmax("extend", query, sinks, softcap)
    softmax = Softmax(scale, softcap, sinks)
    rules = Policy.decode(policy)
    batch, num_heads, count = key_new.shape[:3]
    fresh = tail_length + count
    length = prefix_length + fresh
    key_new, value_new = _with_plain_rows(key_new), _with_plain_rows(value_new)
    output, sums = attend(
        query,
        key_new,
        value_new,
        keys,
        values,
        offsets,
        positions,
        tail_keys,
        tail_values,
        cursor=None,
        tail_length=tail_length,
        prefix_length=prefix_length,
        mask=mask,
        padding=padding,
        softmax=softmax,
        sliding_window=sliding_window,
        want_lse=True,
    )
    assert sums is not None  # it was asked for
    scores, held, source = _tables(
        query,
        sums,
        key_new,
        keys,
        offsets,
        positions,
        tail_keys,
        tail_length,
        prefix_length,
        mask,
        padding,
        softmax,
        sliding_window,
        rules,
        scored=evict and rules.method != "streamingllm",
    )
    slots = extended_slots(policy, num_heads, keys.shape[1], fresh, length, sliding_window, padding is not None, evict)
    if evict:
        live = length if sliding_window is None else min(length, sliding_window - 1)
        total: int | torch.Tensor = num_heads * layer_budget(rules, live)
        real = real_positions(padding, length, keys)
        if real is not None:
            total = num_heads * layer_budget(rules, real[:, length - live :].sum(-1))
        new_positions, new_offsets = choose(
            rules,
            scores,
            slots,
            valid=held,
            first_live=length - live,
            protected_from=length - rules.window,
            total=total,
        )
    else:
        new_positions, new_offsets = pack(held, slots)
    key_dim, value_dim = key_new.shape[3], value_new.shape[3]
    new_keys, new_values = keys.new_empty((batch, slots, key_dim)), values.new_empty((batch, slots, value_dim))
    config = config_of(target_of(keys.device), keys.element_size(), key_dim, value_dim, num_heads)
    launch(
        gather_held,
        (triton.cdiv(slots, config.slots), batch),
        keys,
        values,
        tail_keys,
        tail_values,
        key_new,
        value_new,
        source,
        new_positions,
        new_offsets,
        new_keys,
        new_values,
        *key_new.stride()[:3],
        *value_new.stride()[:3],
        tail_length,
        length,
        keys.shape[1],
        tail_keys.shape[2],
        slots,
        num_heads,
        device=keys.device,
        num_warps=config.num_warps,
        num_stages=1,
        **gather_constants_of(config, key_dim, value_dim, num_heads),
    )
    return output, new_keys, new_values, new_offsets, new_positions


def _with_plain_rows(new: torch.Tensor) -> torch.Tensor:
    """Return new keys or values whose rows are contiguous, and close enough for offsets of 32 bits."""
    return new if new.stride(3) == 1 and new.stride(2) < _MAX_STRIDE else new.contiguous()


def _tables(
    query: torch.Tensor,
    sums: torch.Tensor,
    key_new: torch.Tensor,
    keys: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    tail_keys: torch.Tensor,
    tail_length: int,
    prefix_length: int,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    softmax: Softmax,
    sliding_window: int | None,
    rules: Policy,
    *,
    scored: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scores, whether something real is held, and where it is stored, ``[B, H, length]`` by position.

    Scores and places mean nothing where nothing is held; scores do not where they are not wanted.
    """
    batch, num_heads, count, key_dim = key_new.shape
    num_query_heads = query.shape[1]
    fresh = tail_length + count
    heads = batch * num_heads
    rows = min(rules.window, count)
    shape = (batch, num_heads, prefix_length + fresh)
    scores = torch.empty(shape, dtype=torch.float32, device=keys.device)
    held = torch.zeros(shape, dtype=torch.uint8, device=keys.device)
    source = torch.empty(shape, dtype=torch.int32, device=keys.device)
    columns = real_columns = 0
    mask_strides, padding_strides = (0, 0, 0, 0), (0, 0)
    if mask is not None:
        columns = mask.shape[3]
        mask = mask.expand(batch, num_query_heads, count, columns)
        mask_strides = mask.stride()
    if padding is not None:
        real_columns = padding.shape[1]
        padding = padding.expand(batch, real_columns)
        padding_strides = padding.stride()
    target = target_of(keys.device)
    blocks = blocks_of(target, keys.element_size(), key_dim, num_query_heads // num_heads, rows)
    programs, extra = programs_of(target, blocks, heads, batch * keys.shape[1], fresh)
    launch(
        score_held,
        (programs,),
        query,
        sums,
        key_new,
        keys,
        offsets,
        positions,
        tail_keys,
        mask,
        padding,
        scores,
        held,
        source,
        *factors_of(softmax.scale, softmax.softcap),
        tail_length,
        prefix_length,
        count,
        rows,
        heads,
        extra,
        keys.shape[1],
        tail_keys.shape[2],
        sliding_window or 0,
        columns,
        real_columns,
        *query.stride(),
        *key_new.stride()[:3],
        *mask_strides,
        *padding_strides,
        device=keys.device,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **constants_of(
            blocks,
            Scoring(
                batch=batch,
                num_heads=num_heads,
                group=num_query_heads // num_heads,
                rows=rows,
                key_dim=key_dim,
                scored=scored,
                largest=rules.gqa == "max",
                causal=count > 1,
                window=sliding_window is not None,
                mask=None if mask is None else mask.dtype,
                padded=padding is not None,
            ),
        ),
    )
    return scores, held.view(torch.bool), source
