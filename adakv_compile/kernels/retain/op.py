"""``adakv::retain_v1``: keep the best of what a store with one KV head holds.

| argument                    | shape, dtype                    | meaning                                         |
|-----------------------------|---------------------------------|-------------------------------------------------|
| `scores`                    | `[B, 1, M]` float32             | raw scores of the entries                       |
| `at`                        | `[B, M]` int32                  | their positions, each once; -1: nothing is held |
| `keys`, `values`            | `[B, 1, M, Dk]`, `.. Dv]` model | the entries                                     |
| `length`                    | int                             | logical length `L`: positions are below it      |
| `padding`, `sliding_window` |                                 | as in `extend_v2`                               |
| `policy`, `evict`           |                                 | as in `extend_v2`                               |
| results 0, 1                | `[B, N', Dk]`, `.. Dv]` model   | the new prefix; zeros past the last offset      |
| results 2, 3                | `[B, 2]`, `[B, N']` int32       | its offsets and positions                       |

What stays is what `extend_v2` keeps, given these scores; there is one head, so nothing is shared out. `N' = min(
layer_budget(policy, L), M)`, at least 2, with `layer_capacity` in its place if there is padding; without eviction
`M`. Results are contiguous and newly allocated.
"""

from __future__ import annotations

import torch

from adakv_compile.kernels._registration import OpSpec, register
from adakv_compile.kernels.extend.reference import extended_slots
from adakv_compile.kernels.retain.reference import retain

__all__ = ["SPEC"]


def _fake(
    scores: torch.Tensor,
    at: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: int,
    padding: torch.Tensor | None,
    sliding_window: int | None,
    policy: str,
    evict: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, _, held, key_dim = keys.shape
    slots = extended_slots(policy, 1, held, 0, length, sliding_window, padding is not None, evict)
    return (
        keys.new_empty((batch, slots, key_dim)),
        values.new_empty((batch, slots, values.shape[3])),
        at.new_empty((batch, 2)),
        at.new_empty((batch, slots)),
    )


SPEC = OpSpec(
    schema=(
        "retain_v1(Tensor scores, Tensor at, Tensor keys, Tensor values, SymInt length, Tensor? padding,"
        " int? sliding_window, str policy, bool evict)"
        " -> (Tensor new_keys, Tensor new_values, Tensor new_offsets, Tensor new_positions)"
    ),
    portable=retain,
    fake=_fake,
)
register(SPEC)
