"""Random ragged caches, and the dense float64 attention that they must agree with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from adakv_compile.policy import Policy

__all__ = ["Case", "dense", "ragged_case"]


@dataclass
class Case:
    """A store in the middle of a conversation, and a call."""

    query: torch.Tensor
    key_new: torch.Tensor
    value_new: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor
    positions: torch.Tensor
    tail_keys: torch.Tensor
    tail_values: torch.Tensor
    cursor: torch.Tensor
    mask: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    scale: float = 0.3
    sliding_window: int | None = None
    softcap: float | None = None

    @property
    def length(self) -> int:
        """Logical length after the call."""
        return int(self.cursor.sum()) + self.query.shape[2]

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of ``decode_attention_v2``, its mutated ones cloned."""
        clone = dataclasses.replace(
            self,
            tail_keys=self.tail_keys.clone(),
            tail_values=self.tail_values.clone(),
            cursor=self.cursor.clone(),
        )
        return tuple(getattr(clone, field.name) for field in dataclasses.fields(clone))

    def attend_arguments(self) -> tuple[Any, ...]:
        """The arguments of ``attend_v1`` for the same queries over a store that has taken the new tokens."""
        values = list(self.arguments())
        start, end = int(self.cursor[0]), int(self.cursor[0]) + self.query.shape[2]
        values[7][:, :, start:end] = self.key_new
        values[8][:, :, start:end] = self.value_new
        values[9][0] = end
        return (values[0], *values[3:])

    def extend_arguments(self, policy: Policy, evict: bool = True) -> tuple[Any, ...]:
        """The arguments of ``extend_v2``."""
        values = list(self.arguments())
        tail_length, prefix_length = self.cursor.tolist()
        return (*values[:9], tail_length, prefix_length, *values[10:], policy.encode(), evict)

    def to(self, device: torch.device | str) -> Case:
        """The same case on another device."""
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


def ragged_case(
    lengths: list[list[int]],
    *,
    group: int = 2,
    count: int = 1,
    tail: int = 3,
    capacity: int = 24,
    prefix_length: int = 200,
    slots: int | None = None,
    key_dim: int = 8,
    value_dim: int = 6,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    poison: bool = True,
) -> Case:
    """Make a case whose row ``b`` keeps ``lengths[b][h]`` entries in head ``h``; what no one may read is NaN."""
    random = torch.Generator().manual_seed(seed)
    batch, num_heads = len(lengths), len(lengths[0])
    slots = max(map(sum, lengths)) if slots is None else slots
    nothing = float("nan") if poison else 0.0

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    keys, values = draw(batch, slots, key_dim), draw(batch, slots, value_dim)
    positions = torch.full((batch, slots), -1 if poison else 0, dtype=torch.int32)
    offsets = torch.zeros(batch, num_heads + 1, dtype=torch.int32)
    for row, counts in enumerate(lengths):
        offsets[row, 1:] = torch.tensor(counts).cumsum(0)
        chosen = [torch.randperm(prefix_length, generator=random)[:n].sort().values for n in counts]
        positions[row, : sum(counts)] = torch.cat(chosen).int()
        keys[row, sum(counts) :] = nothing
        values[row, sum(counts) :] = nothing
    tail_keys = torch.full((batch, num_heads, capacity, key_dim), nothing, dtype=dtype)
    tail_values = torch.full((batch, num_heads, capacity, value_dim), nothing, dtype=dtype)
    tail_keys[:, :, :tail] = draw(batch, num_heads, tail, key_dim)
    tail_values[:, :, :tail] = draw(batch, num_heads, tail, value_dim)
    return Case(
        query=draw(batch, num_heads * group, count, key_dim) * 2,
        key_new=draw(batch, num_heads, count, key_dim),
        value_new=draw(batch, num_heads, count, value_dim),
        keys=keys,
        values=values,
        offsets=offsets,
        positions=positions,
        tail_keys=tail_keys,
        tail_values=tail_values,
        cursor=torch.tensor([tail, prefix_length], dtype=torch.int32),
    )


@dataclass(frozen=True)
class Dense:
    """Keys and values at every logical position in float64, what is held, and attention with the rest masked."""

    keys: torch.Tensor
    values: torch.Tensor
    held: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor


def dense(case: Case) -> Dense:
    """Compute a case the obvious way: one loop per row, head and query."""
    batch, num_heads, count, key_dim = case.key_new.shape
    tail, prefix_length = case.cursor.tolist()
    length = case.length
    keys = torch.zeros(batch, num_heads, length, key_dim, dtype=torch.float64)
    values = torch.zeros(batch, num_heads, length, case.value_new.shape[3], dtype=torch.float64)
    held = torch.zeros(batch, num_heads, length, dtype=torch.bool)
    for row in range(batch):
        for head in range(num_heads):
            begin, end = case.offsets[row, head : head + 2].tolist()
            places = case.positions[row, begin:end].long()
            held[row, head, places] = True
            keys[row, head, places] = case.keys[row, begin:end].double()
            values[row, head, places] = case.values[row, begin:end].double()
    held[..., prefix_length:] = True
    keys[:, :, prefix_length : prefix_length + tail] = case.tail_keys[:, :, :tail].double()
    values[:, :, prefix_length : prefix_length + tail] = case.tail_values[:, :, :tail].double()
    keys[:, :, prefix_length + tail :] = case.key_new.double()
    values[:, :, prefix_length + tail :] = case.value_new.double()

    num_query_heads = case.query.shape[1]
    group = num_query_heads // num_heads
    weights = torch.zeros(batch, num_query_heads, count, length, dtype=torch.float64)
    order = torch.arange(length)
    for row in range(batch):
        for head in range(num_query_heads):
            for step in range(count):
                logits = keys[row, head // group] @ case.query[row, head, step].double() * case.scale
                if case.softcap is not None:
                    logits = case.softcap * torch.tanh(logits / case.softcap)
                seen = held[row, head // group].clone()
                if case.mask is None:
                    place = length - count + step
                    seen &= order <= place
                    if case.sliding_window is not None:
                        seen &= order > place - case.sliding_window
                else:
                    columns = case.mask.shape[-1]
                    line = case.mask.expand(batch, num_query_heads, count, columns)[row, head, step]
                    known = min(columns, length)
                    seen[: length - known] = False
                    if line.dtype == torch.bool:
                        seen[length - known :] &= line[columns - known :]
                    else:
                        logits[length - known :] += line[columns - known :].double()
                if case.padding is not None:
                    columns = case.padding.shape[-1]
                    line = case.padding.expand(batch, columns)[row]
                    known = min(columns, length)
                    seen[: length - known] = False
                    seen[length - known :] &= line[columns - known :]
                logits[~seen] = -torch.inf
                if (logits > -torch.inf).any():
                    sink = logits.new_tensor([]) if case.sinks is None else case.sinks[head : head + 1].double()
                    weights[row, head, step] = torch.cat((logits, sink)).softmax(-1)[:length]
    output = weights.unflatten(1, (num_heads, group)) @ values.unsqueeze(2)
    return Dense(keys, values, held, weights, output.flatten(1, 2))
