"""``adakv::select_v1``: which entries every head keeps.

| argument         | shape, dtype                | meaning                                                       |
|------------------|-----------------------------|---------------------------------------------------------------|
| `scores`         | `[B, H, L]` float32         | raw scores, as `observe_v1` gives them                        |
| `padding`        | `[B or 1, L]` bool, or None | True for real tokens; others are never kept nor counted       |
| `sliding_window` | int or None                 | entries at `L - sliding_window` and before are never kept: no later query sees them |
| `policy`         | str                         | `Policy.encode()`                                             |
| result 0         | `[B, N]` int32              | positions in `0..L - 1`, heads back to back, ascending inside a head; newly allocated, contiguous |
| result 1         | `[B, H + 1]` int32          | head `h` of row `b` is `offsets[b, h] .. offsets[b, h + 1] - 1` |

`N = H * layer_budget(policy, n)`, `n = L` or `min(L, sliding_window - 1)`, is known without reading a tensor; a row of
`n_b` real tokens keeps exactly `H * layer_budget(policy, n_b)` entries. Slots past `offsets[b, -1]` hold position 0 and
are never read. With `padding` and a pyramid, a short row may keep more than a long one; then
`N = H * layer_capacity(policy, n)`.
"""

from __future__ import annotations

import torch

from adakv_compile.kernels._registration import OpSpec, register
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


SPEC = OpSpec(
    schema=(
        "select_v1(Tensor scores, Tensor? padding, int? sliding_window, str policy)"
        " -> (Tensor positions, Tensor offsets)"
    ),
    portable=select,
    fake=_fake,
)
register(SPEC)
