"""``adakv::compact_v1``: copy the kept entries out of the dense keys and values.

| argument    | shape, dtype             | meaning                                                   |
|-------------|--------------------------|-----------------------------------------------------------|
| `key`       | `[B, H, L, Dk]` model    | dense keys, any strides                                   |
| `value`     | `[B, H, L, Dv]` model    | dense values, any strides                                 |
| `positions` | `[B, N]` int32           | what to keep, as `select_v1` gives it                     |
| `offsets`   | `[B, H + 1]` int32       | where each head starts                                    |
| result 0, 1 | `[B, N, Dk]`, `[B, N, Dv]` | newly allocated, contiguous; zeros past `offsets[b, -1]` |
"""

from __future__ import annotations

import torch

from adakv_compile.kernels._registration import OpSpec, register
from adakv_compile.kernels._support import Subject
from adakv_compile.kernels.compact.reference import compact, compact_cpu

__all__ = ["SPEC"]


def _fake(
    key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = (positions.shape[0], positions.shape[1])
    return key.new_empty((*rows, key.shape[3])), value.new_empty((*rows, value.shape[3]))


def _subject(key: torch.Tensor, value: torch.Tensor, *_: object) -> Subject:
    return Subject(key.device, key.dtype, (key.shape[3], value.shape[3]))


SPEC = OpSpec(
    schema=("compact_v1(Tensor key, Tensor value, Tensor positions, Tensor offsets) -> (Tensor keys, Tensor values)"),
    portable=compact,
    fake=_fake,
    triton="adakv_compile.kernels.compact.gpu:compact",
    subject=_subject,
    cpu=compact_cpu,
)
register(SPEC)
