"""``adakv::extend_v2``: several new tokens over a compressed past, and compression of all of it.

| argument         | shape, dtype                   | meaning                                                    |
|------------------|--------------------------------|------------------------------------------------------------|
| `query` .. `tail_values` |                        | as in `decode_attention_v2`; nothing is mutated            |
| `tail_length`    | int                            | tail entries in use                                        |
| `prefix_length`  | int                            | position of tail entry 0                                   |
| `mask` .. `softcap` |                             | as in `decode_attention_v2`                                |
| `policy`         | str                            | `Policy.encode()`                                          |
| `evict`          | bool                           | False: everything held is kept                             |
| result 0         | `[B, Hq, T, Dv]` model         | attention, exactly that of `decode_attention_v2`           |
| results 1, 2     | `[B, N', Dk]`, `[B, N', Dv]` model | the new prefix; zeros past the last offset             |
| results 3, 4     | `[B, Hkv + 1]`, `[B, N']` int32 | its offsets and positions                                 |

The new prefix covers positions up to `L = prefix_length + tail_length + T` and starts a fresh tail there. Scores: the
attention of the last `min(window, T)` queries to everything held (a sink takes its share; what a float mask hides by a
number below `policy.HIDDEN_LOGIT` has none), in float32, mean over the window's real tokens, mean or max over the query
group; pooling goes by position, and evicted neighbours are absent. The last `window` positions stay, and entries that
are padding, or that a sliding window hides from every later query, go. A row keeps `Hkv * layer_budget(policy, n)`
entries, `n` its real tokens (with a sliding window: of the last `sliding_window - 1`), or all it holds if that is less.
`N' = min(Hkv * layer_budget(policy, L), N + Hkv * (tail_length + T))` (at least 2), with `layer_capacity` in place of
`layer_budget` if there is padding (see `select_v1`) and `L` limited as `n` is; without eviction the second term. All
results are contiguous and newly allocated.
"""

from __future__ import annotations

import torch

from adakv_compile.kernels._registration import OpSpec, register
from adakv_compile.kernels._support import Subject
from adakv_compile.kernels.extend.cpu import extend_cpu
from adakv_compile.kernels.extend.reference import Extended, extend, extended_slots

__all__ = ["SPEC"]


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
) -> Extended:
    batch, num_heads, count, key_dim = key_new.shape
    value_dim = value_new.shape[3]
    fresh = tail_length + count
    length = prefix_length + fresh
    slots = extended_slots(policy, num_heads, keys.shape[1], fresh, length, sliding_window, padding is not None, evict)
    return (
        query.new_empty((*query.shape[:3], value_dim)),
        keys.new_empty((batch, slots, key_dim)),
        values.new_empty((batch, slots, value_dim)),
        offsets.new_empty((batch, num_heads + 1)),
        positions.new_empty((batch, slots)),
    )


def _subject(
    query: torch.Tensor, key_new: torch.Tensor, value_new: torch.Tensor, keys: torch.Tensor, *_: object
) -> Subject:
    return Subject(keys.device, keys.dtype, (key_new.shape[3], value_new.shape[3]))


SPEC = OpSpec(
    schema=(
        "extend_v2(Tensor query, Tensor key_new, Tensor value_new, Tensor keys, Tensor values, Tensor offsets,"
        " Tensor positions, Tensor tail_keys, Tensor tail_values, SymInt tail_length, SymInt prefix_length,"
        " Tensor? mask, Tensor? padding, Tensor? sinks, float scale, int? sliding_window, float? softcap,"
        " str policy, bool evict)"
        " -> (Tensor out, Tensor new_keys, Tensor new_values, Tensor new_offsets, Tensor new_positions)"
    ),
    portable=extend,
    fake=_fake,
    triton="adakv_compile.kernels.extend.gpu:extend",
    subject=_subject,
    cpu=extend_cpu,
)
register(SPEC)
