"""``adakv::decode_attention_v2``: append the new tokens to the tail, then attend to prefix and tail.

| argument         | shape, dtype                   | meaning                                                    |
|------------------|--------------------------------|------------------------------------------------------------|
| `query`          | `[B, Hq, T, Dk]` model         | any strides; query `t` sits at position `P + t`            |
| `key_new`        | `[B, Hkv, T, Dk]` model        | any strides                                                |
| `value_new`      | `[B, Hkv, T, Dv]` model        | any strides                                                |
| `keys`, `values` | `[B, N, Dk]`, `[B, N, Dv]`     | kept entries, contiguous; read                             |
| `offsets`        | `[B, Hkv + 1]` int32           | head `h` of row `b`: `offsets[b, h]` to `offsets[b, h + 1]` |
| `positions`      | `[B, N]` int32                 | position of every kept entry, below `cursor[1]`            |
| `tail_keys`      | `[B, Hkv, C, Dk]` model        | **mutated**, contiguous: `T` entries written at `cursor[0]` |
| `tail_values`    | `[B, Hkv, C, Dv]` model        | **mutated**, likewise                                      |
| `cursor`         | `[2 or more]` int32            | **mutated**: tail entries in use; position of tail entry 0 |
| `mask`           | `[B or 1, 1 or Hq, T or 1, M]` | bool, or float to be added, or None                        |
| `padding`        | `[B or 1, M]` bool, or None    | True for real tokens; on top of the rule or the mask       |
| `sinks`          | `[Hq]` floating, or None       | a logit of each query head, see below; `-inf` is none      |
| `scale`          | float                          | factor on the products of queries and keys                 |
| `sliding_window` | int or None                    | keys a query sees, its own included                        |
| `softcap`        | float above 0, or None         | logits are `softcap * tanh(scale * product / softcap)`     |
| result           | `[B, Hq, T, Dv]` model         | contiguous, newly allocated; zeros for a query that sees nothing |

`P = cursor[0] + cursor[1]` before the call, which adds `T` to `cursor[0]`; `cursor[0] + T <= C` is the caller's
promise. Tail entry `i` has position `cursor[1] + i` in every row and head. A mask replaces the other rules; without one
a query sees positions up to its own (causal) and above `P + t - sliding_window`. Column `c` of a mask is position `P +
T - M + c`: the last one is the newest token, and what lies before the first is invisible. A float mask is added to the
capped logits. A sink adds `exp(sink)` to the denominator of its head's softmax and nothing to the numerator; it is
neither scaled nor capped nor masked. No tensor overlaps another.
Elements of `cursor` past the second count programs while a kernel runs and are zero before and after. Where there are
`CURSOR_SIZE` of them, a step of a few heads needs no other memory to be cleared and so is one launch.
Lengths are device tensors: no step waits for the device. Softmax is float32. Cost: each entry is read once for the
whole query group.
"""

from __future__ import annotations

from typing import Final

import torch

from adakv_compile.kernels._registration import OpSpec, register
from adakv_compile.kernels._support import Subject
from adakv_compile.kernels.decode_attention.cpu import decode_attention_cpu
from adakv_compile.kernels.decode_attention.reference import decode_attention

__all__ = ["CURSOR_SIZE", "SPEC"]

CURSOR_SIZE: Final = 520
"""Elements of a store's cursor: two lengths, and counters for 512 heads and more of all rows together."""


def _fake(
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
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    return query.new_empty((*query.shape[:3], value_new.shape[3]))


def _subject(
    query: torch.Tensor, key_new: torch.Tensor, value_new: torch.Tensor, keys: torch.Tensor, *_: object
) -> Subject:
    return Subject(keys.device, keys.dtype, (key_new.shape[3], value_new.shape[3]))


SPEC = OpSpec(
    schema=(
        "decode_attention_v2(Tensor query, Tensor key_new, Tensor value_new, Tensor keys, Tensor values,"
        " Tensor offsets, Tensor positions, Tensor(a!) tail_keys, Tensor(b!) tail_values, Tensor(c!) cursor,"
        " Tensor? mask, Tensor? padding, Tensor? sinks, float scale, int? sliding_window, float? softcap) -> Tensor"
    ),
    portable=decode_attention,
    cpu=decode_attention_cpu,
    native=True,
    fake=_fake,
    triton="adakv_compile.kernels.decode_attention.gpu:decode_attention",
    subject=_subject,
)
register(SPEC)
