"""``adakv::lay_out_v1``: what a store with one KV head holds, with several new tokens behind it.

| argument                            | shape, dtype               | meaning                                          |
|-------------------------------------|----------------------------|--------------------------------------------------|
| `key_new` .. `tail_values`          |                            | as in `extend_v2`, `Hkv = 1`; nothing is mutated |
| `tail_length`, `prefix_length`      | int                        | as in `extend_v2`                                |
| `mask`, `padding`, `sliding_window` |                            | as in `extend_v2`                                |
| result 0                            | `[B, 1, M, Dk]` model      | the prefix, the tail, the new tokens             |
| result 1                            | `[B, 1, M, Dv]` model      | likewise                                         |
| result 2                            | `[B, 1 or Hq, T, M]` model | added to logits: `-inf` hides                    |
| result 3                            | `[B, M]` int32             | the position of each entry; -1 for padding       |

`M = N + tail_length + T`; the last entry is the newest. Slots of the prefix that hold nothing are zeros at position -1,
and nobody sees them. For caches of what keys and values are computed from, as
`entries_v1` is for single tokens; `retain_v1` evicts from these results. All are newly allocated.
"""

from __future__ import annotations

import torch

from adakv_compile.kernels._registration import OpSpec, register
from adakv_compile.kernels.lay_out.reference import lay_out

__all__ = ["SPEC"]


def _fake(
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
    sliding_window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, _, count, _ = key_new.shape
    held = keys.shape[1] + tail_length + count
    heads = 1 if mask is None else mask.shape[1]
    return (
        keys.new_empty((batch, 1, held, keys.shape[2])),
        values.new_empty((batch, 1, held, values.shape[2])),
        key_new.new_empty((batch, heads, count, held)),
        positions.new_empty((batch, held)),
    )


SPEC = OpSpec(
    schema=(
        "lay_out_v1(Tensor key_new, Tensor value_new, Tensor keys, Tensor values, Tensor offsets, Tensor positions,"
        " Tensor tail_keys, Tensor tail_values, SymInt tail_length, SymInt prefix_length, Tensor? mask,"
        " Tensor? padding, int? sliding_window)"
        " -> (Tensor entry_keys, Tensor entry_values, Tensor visible, Tensor at)"
    ),
    portable=lay_out,
    fake=_fake,
)
register(SPEC)
