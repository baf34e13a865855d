"""``adakv::attend_v1``: attention to a store that already holds the call's tokens, as a layer that reads another's.

| argument         | shape, dtype                   | meaning                                                    |
|------------------|--------------------------------|------------------------------------------------------------|
| `query`          | `[B, Hq, T, Dk]` model         | any strides; query `t` sits at position `P - T + t`        |
| `keys`, `values` | `[B, N, Dk]`, `[B, N, Dv]`     | kept entries, contiguous                                   |
| `offsets`        | `[B, Hkv + 1]` int32           | head `h` of row `b`: `offsets[b, h]` to `offsets[b, h + 1]` |
| `positions`      | `[B, N]` int32                 | position of every kept entry, below `cursor[1]`            |
| `tail_keys`      | `[B, Hkv, C, Dk]` model        | contiguous                                                 |
| `tail_values`    | `[B, Hkv, C, Dv]` model        | contiguous                                                 |
| `cursor`         | `[2 or more]` int32            | tail entries in use; position of tail entry 0              |
| `mask` .. `softcap` |                             | as in `decode_attention_v2`                                |
| result           | `[B, Hq, T, Dv]` model         | contiguous, newly allocated; zeros for a query that sees nothing |

`P = cursor[0] + cursor[1]`. Nothing is mutated: the layer that owns the store has appended the tokens. The rules are
those of `decode_attention_v2`: without a mask a query sees positions up to its own, also where some of the last `T` are
no longer in the tail; column `c` of a mask of `M` is position `P - M + c`. Lengths are device tensors: no step waits
for the device. Softmax is float32.
"""

from __future__ import annotations

import torch

from adakv_compile.kernels._registration import OpSpec, register
from adakv_compile.kernels._support import Subject
from adakv_compile.kernels.attend.cpu import attend_cpu
from adakv_compile.kernels.attend.reference import attend

__all__ = ["SPEC"]


def _fake(
    query: torch.Tensor,
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
    return query.new_empty((*query.shape[:3], values.shape[2]))


def _subject(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *_: object) -> Subject:
    return Subject(keys.device, keys.dtype, (keys.shape[2], values.shape[2]))


SPEC = OpSpec(
    schema=(
        "attend_v1(Tensor query, Tensor keys, Tensor values, Tensor offsets, Tensor positions, Tensor tail_keys,"
        " Tensor tail_values, Tensor cursor, Tensor? mask, Tensor? padding, Tensor? sinks, float scale,"
        " int? sliding_window, float? softcap) -> Tensor"
    ),
    portable=attend,
    cpu=attend_cpu,
    fake=_fake,
    triton="adakv_compile.kernels.attend.gpu:attend",
    subject=_subject,
)
register(SPEC)
