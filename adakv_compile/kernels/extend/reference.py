"""Several tokens over a compressed past, then compression of all of it, in plain PyTorch."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch

from adakv_compile.kernels._checks import check_mask, check_softmax
from adakv_compile.kernels._ragged import Entries, ragged_entries, tail_entries, weights
from adakv_compile.kernels._retention import choose
from adakv_compile.kernels._softmax import Softmax
from adakv_compile.kernels._visibility import Visibility
from adakv_compile.kernels.compact.reference import head_of_slots
from adakv_compile.kernels.decode_attention.reference import (
    attend_all,
    attend_block,
    check_attention,
    grouped_query,
    visibility_of,
)
from adakv_compile.kernels.select.reference import capacity, pack
from adakv_compile.policy import HIDDEN_LOGIT, Policy

__all__ = ["Extended", "extend", "extended_slots", "real_positions"]

Extended = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def extended_slots(
    policy: str,
    num_heads: int,
    slots: int,
    fresh: int,
    length: int,
    sliding_window: int | None,
    padded: bool,
    evict: bool,
) -> int:
    """Return ``N`` of the new prefix, at least 2 as in ``capacity``; sizes may be symbolic.

    Args:
        policy: ``Policy.encode()``.
        num_heads: KV heads.
        slots: ``N`` of the old prefix.
        fresh: Entries per head behind it, the call's own included.
        length: Logical length after the call.
        sliding_window: As in the op.
        padded: Whether the call has a padding mask.
        evict: As in the op.
    """
    room: Any = slots + num_heads * fresh
    if evict:
        budget = capacity(Policy.decode(policy), num_heads, length, sliding_window, padded)
        room = torch.sym_min(budget, room)
    return cast("int", torch.sym_max(room, 2))


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
    attention: torch.Tensor | None = None,
) -> Extended:
    """Attend, then compress; see :mod:`adakv_compile.kernels.extend.op`.

    ``attention`` is result 0, where somebody has computed it already.
    """
    check_attention("extend", query, key_new, value_new, keys, values, offsets, positions, tail_keys, tail_values)
    check_mask("extend", query, mask, padding)
    check_softmax("extend", query, sinks, softcap)
    softmax = Softmax(scale, softcap, sinks)
    num_heads, count = key_new.shape[1:3]
    dense_keys = torch.cat((tail_keys[:, :, :tail_length], key_new), 2)
    dense_values = torch.cat((tail_values[:, :, :tail_length], value_new), 2)
    fresh = tail_length + count
    length = prefix_length + fresh
    visibility = visibility_of(query, num_heads, length - count, mask, padding, sliding_window)
    after = torch.arange(prefix_length, length, device=keys.device)
    entries = [
        *ragged_entries(keys, values, offsets, positions),
        tail_entries(dense_keys, dense_values, after, None),
    ]
    output = attend_all(entries, query, softmax, visibility) if attention is None else attention

    source = _sources(offsets, positions, prefix_length, fresh)
    real = real_positions(padding, length, keys)
    valid = source >= 0
    if real is not None:
        valid &= real[:, None]
    slots = extended_slots(policy, num_heads, keys.shape[1], fresh, length, sliding_window, padding is not None, evict)
    if evict:
        rules = Policy.decode(policy)
        scores = _scores(rules, entries, query, softmax, visibility, valid.shape, real)
        valid = choose(rules, scores, valid, real, sliding_window)
    kept, new_offsets = pack(valid, slots)
    head = head_of_slots(new_offsets, slots)
    unused = head == num_heads
    row = torch.arange(keys.shape[0], device=keys.device)[:, None]
    where = source[row, head.clamp(max=num_heads - 1), kept.long()].masked_fill_(unused, 0)
    new_keys = torch.cat((keys, dense_keys.flatten(1, 2)), 1)[row, where]
    new_values = torch.cat((values, dense_values.flatten(1, 2)), 1)[row, where]
    hidden = unused[..., None]
    return (
        output,
        new_keys.masked_fill_(hidden, 0),
        new_values.masked_fill_(hidden, 0),
        new_offsets,
        kept,
    )


def _sources(offsets: torch.Tensor, positions: torch.Tensor, prefix_length: int, fresh: int) -> torch.Tensor:
    """Return where the entry of each position is stored, ``[B, H, length]`` int64, -1 where it was evicted.

    An index counts through the old prefix and then through the dense entries of head 0, head 1, ...
    """
    batch, slots = positions.shape
    num_heads = offsets.shape[1] - 1
    device = positions.device
    # One more head takes the unused slots.
    table = torch.full((batch, (num_heads + 1) * prefix_length), -1, device=device)
    head = head_of_slots(offsets, slots)
    # Unused slots hold arbitrary positions.
    position = positions.masked_fill(head == num_heads, 0)
    table.scatter_(1, head * prefix_length + position, torch.arange(slots, device=device).expand(batch, slots))
    old = table.unflatten(1, (num_heads + 1, prefix_length))[:, :num_heads]
    new = torch.arange(slots, slots + num_heads * fresh, device=device).view(num_heads, fresh)
    return torch.cat((old, new.expand(batch, num_heads, fresh)), 2)


def real_positions(padding: torch.Tensor | None, length: int, keys: torch.Tensor) -> torch.Tensor | None:
    """Return which positions are real tokens, ``[B, length]``; those before the first column are not."""
    if padding is None:
        return None
    columns = padding.shape[1]
    padding = padding.expand(keys.shape[0], columns)
    if columns >= length:
        return padding[:, columns - length :]
    return torch.nn.functional.pad(padding, (length - columns, 0), value=False)


def _scores(
    policy: Policy,
    entries: list[Entries],
    query: torch.Tensor,
    softmax: Softmax,
    visibility: Visibility,
    shape: torch.Size,
    real: torch.Tensor | None,
) -> torch.Tensor:
    """Score every held entry by the last queries, ``[B, H, length]`` float32; 0 where nothing is held."""
    batch, num_heads, length = shape
    scores = torch.zeros((batch * num_heads, length), device=query.device)
    if policy.method == "streamingllm":
        return scores.view(shape)
    window = min(policy.window, visibility.count)
    visibility = visibility.block(visibility.count - window, window)
    grouped = grouped_query(query, num_heads, softmax.scale)
    attended = attend_block(entries, grouped, softmax, visibility)
    # A query that sees only what a float mask hides attends to all alike, which says nothing of any entry.
    blind = attended.peak < HIDDEN_LOGIT
    attended = dataclasses.replace(attended, mass=attended.mass.masked_fill(blind, torch.inf))
    rows = grouped[:, :, visibility.start :].flatten(1, 2)
    counted = None
    if real is not None:
        counted = real[:, None, length - window :].expand(batch, num_heads, window).flatten(0, 1)
    for part in entries:
        found = weights(part, rows, softmax, visibility, attended).unflatten(1, (visibility.group, window))
        if counted is None:
            found = found.mean(2)
        else:
            mine = counted[part.owner][:, None, :, None]
            found = found.masked_fill(~mine, 0.0).sum(2) / mine.sum(2).clamp(min=1)
        found = found.amax(1) if policy.gqa == "max" else found.mean(1)
        index = part.owner[:, None] * length + part.positions
        if part.used is None:
            scores.view(-1).index_copy_(0, index.flatten(), found.flatten().float())
        else:
            # Pieces overlap where they aren't used: there they must not write.
            index = torch.where(part.used, index, batch * num_heads * length)
            spilled = torch.cat((scores.view(-1), scores.new_zeros(1)))
            scores = spilled.index_copy_(0, index.flatten(), found.flatten().float())[:-1]
    return scores.view(shape)
