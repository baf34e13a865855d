"""Decode attention of one layer over ragged caches of any skew, beside the full cache and the ragged rivals.

Each call appends one token and attends, as in a model; rivals only attend, to as many entries in every head. Calls go
round over enough copies of the cache that none is found in the L2 cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.rivals import ragged_rivals
from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import Attention, Budget, head_lengths, shapes
from benchmarks.gpu.timing import Contender, Ready, compare, copies_for, copy_bandwidth, launches, prepare

__all__ = ["cases", "run"]

TAIL = 64
"""Entries appended before: a conversation that goes on for a while."""
BUDGETS = (Budget(0.1), Budget(0.2), Budget(1024), Budget(128))
SKEWS = (1, 2, 4, 8)
BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class Case:
    """One cache and what attends to it."""

    batch: int
    context: int
    budget: Budget
    skew: int

    @property
    def mean(self) -> int:
        """Entries of a KV head on average."""
        return self.budget.entries(self.context)


def cases(smoke: bool) -> Iterator[list[Case]]:
    """Return the cases that share a full cache, the most important first."""
    if smoke:
        yield [Case(1, shapes(smoke).contexts[0], Budget(0.1), skew) for skew in (1, 2)]
        return
    for batch, context in product(BATCHES, shapes(smoke).contexts):
        yield [
            Case(batch, context, budget, skew)
            for budget in BUDGETS
            # No head can keep more than there is.
            for skew in sorted({min(skew, context // budget.entries(context)) for skew in SKEWS})
        ]


def run(run: Run) -> None:
    """Write one row for every case."""
    attention = shapes(run.smoke)
    bandwidth = copy_bandwidth(run)
    for group in cases(run.smoke):
        first = group[0]
        name = f"decode attention, batch {first.batch}, context {first.context}"
        if not run.has_time(name, 3):
            continue
        with run.attempt(name):
            full = prepare(run, _full(run, attention, first))
            for case in group:
                what = f"{name}, budget {case.budget}, skew {case.skew}"
                if run.has_time(what, 1):
                    _one(run, attention, case, full, bandwidth)
            del full


def _one(run: Run, attention: Attention, case: Case, full: dict[str, Ready | str], bandwidth: float) -> None:
    rows = [head_lengths(case.mean, attention.kv_heads, case.skew) for _ in range(case.batch)]
    # The longest head is another one in each row.
    lengths = [row[index % len(row) :] + row[: index % len(row)] for index, row in enumerate(rows)]
    tail = 4 if run.smoke else TAIL
    entries = case.batch * attention.kv_heads * (case.mean + tail + 1)
    size = entries * attention.entry_bytes(run.dtype)
    copies = copies_for(run, size)
    what = f"decode attention, batch {case.batch}, budget {case.budget} of {case.context}, skew {case.skew}"
    if not run.has_memory(what, 2 * copies * size):
        return
    ours = _ours(run, attention, case, lengths, tail, copies)
    contenders: dict[str, Contender | str] = {"adakv": ours}
    contenders |= ragged_rivals(run, attention, [[n + tail + 1 for n in row] for row in lengths], copies)
    times = compare(run, {**contenders, **full})
    row: dict[str, Any] = {
        "batch": case.batch,
        "context": case.context,
        "budget": str(case.budget),
        "entries": case.mean,
        "skew": case.skew,
        "bytes": size,
        "floor_us": size / bandwidth / 1e3,
        "times": times,
    }
    if "us" in times["adakv"]:
        speed = size / times["adakv"]["us"] / 1e3
        row |= {"gb_per_s": speed, "share_of_copy": speed / bandwidth}
        if case.batch == 1 and ours.reset is not None:
            ours.reset()
            row["launches"] = launches(run, ours.calls[0])
    run.write("case", **row)


def _ours(run: Run, attention: Attention, case: Case, lengths: list[list[int]], tail: int, copies: int) -> Contender:
    """Return calls of the op, each on its own store, whose lengths are put back before every round."""
    from adakv_compile.kernels.decode_attention import CURSOR_SIZE

    heads, dim = attention.kv_heads, attention.dim
    # A token behind the prompt and the tail; the capacity is what the runtime would have allocated.
    capacity = 2 * tail

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=run.dtype, device=run.device)

    slots = heads * case.mean
    keys, values = random(copies, case.batch, slots, dim), random(copies, case.batch, slots, dim)
    tails = [random(copies, case.batch, heads, capacity, dim) for _ in range(2)]
    host_offsets = torch.zeros(case.batch, heads + 1, dtype=torch.int32)
    host_offsets[:, 1:] = torch.tensor(lengths).cumsum(1)
    host_positions = [torch.cat([torch.arange(n, dtype=torch.int32) for n in row]) for row in lengths]
    offsets, positions = host_offsets.to(run.device), torch.stack(host_positions).to(run.device)
    cursors = torch.zeros(copies, CURSOR_SIZE, dtype=torch.int32, device=run.device)
    cursors[:, 1] = case.context
    query = random(case.batch, attention.query_heads, 1, dim)
    new = [random(case.batch, heads, 1, dim) for _ in range(2)]
    op = run.op("decode_attention_v2")
    calls = [
        functools.partial(
            op,
            query,
            *new,
            keys[i],
            values[i],
            offsets,
            positions,
            tails[0][i],
            tails[1][i],
            cursors[i],
            None,
            None,
            None,
            dim**-0.5,
            None,
            None,
        )
        for i in range(copies)
    ]
    return Contender(calls, lambda: cursors[:, 0].fill_(tail))


def _full(run: Run, attention: Attention, case: Case) -> dict[str, Contender | str]:
    """Return PyTorch's attention over the full cache, as models call it and with the query group as rows."""
    heads, dim = attention.kv_heads, attention.dim
    size = case.batch * heads * case.context * attention.entry_bytes(run.dtype)
    copies = copies_for(run, size)
    what = f"full cache, batch {case.batch}, context {case.context}"
    if not run.has_memory(what, copies * size):
        return {"sdpa gqa": "does not fit the memory", "sdpa grouped": "does not fit the memory"}
    shape = (copies, case.batch, heads, case.context, dim)
    keys, values = (torch.randn(shape, dtype=run.dtype, device=run.device) for _ in range(2))
    query = torch.randn(case.batch, attention.query_heads, 1, dim, dtype=run.dtype, device=run.device)
    rows = query.view(case.batch, heads, -1, dim)
    attend = F.scaled_dot_product_attention
    return {
        "sdpa gqa": Contender(
            [functools.partial(attend, query, keys[i], values[i], enable_gqa=True) for i in range(copies)]
        ),
        "sdpa grouped": Contender([functools.partial(attend, rows, keys[i], values[i]) for i in range(copies)]),
    }
