"""``adakv::select_v1``: which entries every head keeps.

| argument         | shape, dtype                | meaning                                                         |
|------------------|-----------------------------|-----------------------------------------------------------------|
| `scores`         | `[B, H, L]` float32         | raw scores, as `observe_v3` gives them                          |
| `padding`        | `[B or 1, L]` bool, or None | True for real tokens; others are never kept nor counted         |
| `sliding_window` | int or None                 | keys a query sees, its own included                             |
| `policy`         | str                         | `Policy.encode()`                                               |
| result 0         | `[B, N]` int32              | positions, heads back to back, ascending inside a head          |
| result 1         | `[B, H + 1]` int32          | head `h` of row `b` is `offsets[b, h] .. offsets[b, h + 1] - 1` |

`N = max(2, H * layer_budget(policy, n))` is known without reading a tensor; `n` is `L`, with a sliding window at most
`sliding_window - 1`: what no later query sees, positions up to `L - sliding_window`, is never kept. A row with `n_b`
real tokens (of those `n`) keeps exactly `H * layer_budget(policy, n_b)` entries. With `padding` and a pyramid, a short
row may keep more than a long one; then `N = max(2, H * layer_capacity(policy, n))`. Slots past `offsets[b, -1]` hold
position 0 and are never read. Both results are contiguous and newly allocated.
"""

from __future__ import annotations

import torch

from adakv_compile.kernels._registration import OpSpec, register
from adakv_compile.kernels._support import Subject
from adakv_compile.kernels.select.cpu import select_cpu
from adakv_compile.kernels.select.reference import capacity, select
from adakv_compile.policy import Policy

__all__ = ["SPEC"]


def _fake(
    scores: torch.Tensor, padding: torch.Tensor | None, sliding_window: int | None, policy: str
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, num_heads, length = scores.shape
    slots = capacity(Policy.decode(policy), num_heads, length, sliding_window, padding is not None)
    return (
        scores.new_empty((batch, slots), dtype=torch.int32),
        scores.new_empty((batch, num_heads + 1), dtype=torch.int32),
    )


def _subject(scores: torch.Tensor, *_: object) -> Subject:
    return Subject(scores.device, scores.dtype)


SPEC = OpSpec(
    schema=(
        "select_v1(Tensor scores, Tensor? padding, int? sliding_window, str policy)"
        " -> (Tensor positions, Tensor offsets)"
    ),
    portable=select,
    fake=_fake,
    triton="adakv_compile.kernels.select.gpu:select",
    subject=_subject,
    cpu=select_cpu,
)
register(SPEC)
