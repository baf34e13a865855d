"""``adakv::entries_v1``: append the new tokens, and return all that a store with one KV head holds.

| argument              | shape, dtype                   | meaning                                                  |
|-----------------------|--------------------------------|----------------------------------------------------------|
| `key_new` .. `cursor` |                                | as in `decode_attention_v2`, `Hkv = 1`, mutated likewise |
| `mask`, `padding`, `sliding_window` |                  | as in `decode_attention_v2`                              |
| result 0              | `[B, 1, N + C, Dk]` model      | the prefix and the tail; zeros where nothing is held     |
| result 1              | `[B, 1, N + C, Dv]` model      | likewise                                                 |
| result 2              | `[B, 1 or Hq, T, N + C]` model | added to logits: `-inf` for what a query does not see    |

For caches of what keys and values are computed from (multi-head latent attention, DeepSeek-V2, arXiv 2405.04434): the
model computes them from the entries returned, and attends. With one head all rows keep equally many entries, so nothing
is ragged. Results are newly allocated.
"""

from __future__ import annotations

import torch

from adakv_compile.kernels._registration import OpSpec, register
from adakv_compile.kernels.entries.reference import entries

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
    cursor: torch.Tensor,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    sliding_window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, _, count, _ = key_new.shape
    held = keys.shape[1] + tail_keys.shape[2]
    heads = 1 if mask is None else mask.shape[1]
    return (
        keys.new_empty((batch, 1, held, keys.shape[2])),
        values.new_empty((batch, 1, held, values.shape[2])),
        key_new.new_empty((batch, heads, count, held)),
    )


SPEC = OpSpec(
    schema=(
        "entries_v1(Tensor key_new, Tensor value_new, Tensor keys, Tensor values, Tensor offsets, Tensor positions,"
        " Tensor(a!) tail_keys, Tensor(b!) tail_values, Tensor(c!) cursor, Tensor? mask, Tensor? padding,"
        " int? sliding_window) -> (Tensor entry_keys, Tensor entry_values, Tensor visible)"
    ),
    portable=entries,
    fake=_fake,
)
register(SPEC)
