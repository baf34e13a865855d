"""The attention operator of a decode step against a copy of the bytes that it reads.

As in a model, the calls of several layers follow each other, so that a layer's entries are no longer in the nearest
caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv_compile.kernels.decode_attention import SPEC
from adakv_compile.runtime.store import LayerStore
from benchmarks.cpu.run import Bound, Run, at_most, ratios
from benchmarks.cpu.steps import time_steps
from benchmarks.cpu.timing import flat
from benchmarks.gpu.shapes import head_lengths

__all__ = ["CASES", "Case", "run", "sealed"]

_MOST_LAYERS: Final = 12
_ENOUGH_BYTES: Final = 64 << 20
"""More than the caches of most processors hold."""
_LONG: Final = 8192
"""Entries of a layer's row from which the operator has to keep to its bound: below, calling it is what takes time."""


@dataclass(frozen=True)
class Case:
    """What the operator works on.

    Attributes:
        query_heads: ``Hq``.
        kv_heads: ``Hkv``.
        dim: Of a head.
        dtype: Of queries and entries.
        batch: Rows.
        skew: Longest head over mean.
        entries: Of all heads of a row together, one figure for each.
    """

    query_heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    batch: int
    skew: int
    entries: Sequence[int]

    @property
    def name(self) -> str:
        """A line's label."""
        heads = f"{self.query_heads}/{self.kv_heads} heads of {self.dim}"
        return f"{heads}, {str(self.dtype).removeprefix('torch.')}, batch {self.batch}, skew {self.skew}"


CASES: Final = (
    Case(12, 4, 64, torch.float32, 1, 2, (512, 2048, 8192, 32_768, 131_072, 262_144)),
    Case(32, 8, 64, torch.float32, 1, 8, (8192, 32_768, 131_072)),
    Case(32, 8, 64, torch.bfloat16, 1, 8, (8192, 32_768, 131_072, 262_144)),
    Case(32, 8, 128, torch.bfloat16, 1, 1, (8192, 131_072)),
    Case(32, 8, 64, torch.float32, 8, 4, (8192, 32_768)),
    Case(32, 8, 64, torch.bfloat16, 8, 4, (8192, 32_768)),
)
_TINY: Final = (Case(4, 2, 16, torch.float32, 1, 2, (32, 96)), Case(4, 2, 16, torch.bfloat16, 2, 1, (32,)))


def run(run: Run) -> None:
    """Time the operator from few entries to many."""
    for case in _TINY if run.smoke else CASES:
        seen: list[list[float]] = []
        for entries in case.entries:
            if not run.has_time(f"{case.name}, {entries} entries", 0 if run.smoke else 3):
                break
            seen.append(_compare(run, case, entries))
        run.series("op", case.name, case.entries[: len(seen)], seen)


def sealed(case: Case, entries: int) -> LayerStore:
    """Return a layer's store behind an eviction and a step, of random entries; each row's longest head is another one.

    Args:
        case: Its sizes.
        entries: Of a row.
    """
    lengths = head_lengths(entries // case.kv_heads, case.kv_heads, case.skew)
    turned = [lengths[-row % len(lengths) :] + lengths[: -row % len(lengths)] for row in range(case.batch)]
    counts = torch.tensor([[0, *row] for row in turned], dtype=torch.int32)
    total = sum(lengths)
    keys, values = (torch.randn(case.batch, total, case.dim).to(case.dtype) for _ in range(2))
    positions = torch.stack([torch.cat([torch.arange(count) for count in row]) for row in turned]).to(torch.int32)
    store = LayerStore.sealed(keys, values, counts.cumsum(1, dtype=torch.int32), positions, max(lengths))
    # One entry in the tail, so that there is room for more.
    store.append(*(torch.randn(case.batch, case.kv_heads, 1, case.dim).to(case.dtype) for _ in range(2)))
    return store


def _compare(run: Run, case: Case, entries: int) -> list[float]:
    layer_bytes = 2 * case.batch * entries * case.dim * case.dtype.itemsize
    layers = max(2, min(_MOST_LAYERS, -(-_ENOUGH_BYTES // layer_bytes)))
    stores = [sealed(case, entries) for _ in range(layers)]
    heads = (2, case.batch, case.kv_heads, entries // case.kv_heads, case.dim)
    dense = [torch.randn(heads).to(case.dtype) for _ in stores]
    targets = [(torch.empty_like(store.keys), torch.empty_like(store.values)) for store in stores]
    query = torch.randn(case.batch, case.query_heads, 1, case.dim).to(case.dtype)
    contenders: dict[str, Callable[[], Any]] = {
        "operator": lambda: [_attend(store, query) for store in stores],
        "copy": lambda: [
            (key.copy_(store.keys), value.copy_(store.values))
            for (key, value), store in zip(targets, stores, strict=True)
        ],
        "dense SDPA": lambda: [
            F.scaled_dot_product_attention(query, pair[0], pair[1], enable_gqa=True) for pair in dense
        ],
    }
    times = time_steps(run, contenders, rounds=12, calls=3, share=0.1)
    what = f"{case.name}, {entries} entries"
    for name, rounds in times.items():
        run.figure(f"{what}: {name}, a layer", "us", flat(rounds, 1e6 / layers), entries=entries)
    over = ratios(times["operator"], times["copy"])
    target: Bound | None = at_most(2) if entries >= _LONG else None
    run.figure(f"{what}: operator over a copy", "x", over, "copy of keys and values", target, entries=entries)
    against = "dense SDPA of as many entries"
    run.figure(f"{what}: operator over SDPA", "x", ratios(times["operator"], times["dense SDPA"]), against)
    return over


def _attend(store: LayerStore, query: Tensor) -> Tensor:
    """Attend with one token, which is appended, and forget it again: the tail keeps its length."""
    new = query[:, : store.num_kv_heads]
    prefix = (store.keys, store.values, store.offsets, store.positions)
    tail = (store.tail_keys, store.tail_values, store.cursor)
    softmax = (query.shape[-1] ** -0.5, None, None)
    result = SPEC.overload(query, new, new, *prefix, *tail, None, None, None, *softmax)
    store.cursor[0] = store.tail_length
    return result
