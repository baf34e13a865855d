"""Random sequences of operations on compressed views in random layouts, against dense tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adakv_compile.runtime.compressed import CompressedKV, Kind
from adakv_compile.runtime.errors import CacheError
from adakv_compile.runtime.repeated import RepeatedKV
from tests.runtime.test_arrange import FILL, agrees, new_view
from tests.runtime.test_layout import layouts

Change = Callable[[Tensor], Any]


def _reshaped(draw: st.DrawFn, shape: torch.Size) -> list[int]:
    """Draw a shape with as many entries: dimensions merged, split at any divisor, or of size one."""
    flat = [*shape]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(flat) - 1))
        what = draw(st.sampled_from(["merge", "split", "one", "drop"]))
        if what == "merge" and at + 1 < len(flat):
            flat[at : at + 2] = [flat[at] * flat[at + 1]]
        elif what == "split" and flat[at]:
            divisor = draw(st.sampled_from([n for n in range(1, flat[at] + 1) if flat[at] % n == 0]))
            flat[at : at + 1] = [divisor, flat[at] // divisor]
        elif what == "one":
            flat.insert(at, 1)
        elif what == "drop" and flat[at] == 1 and len(flat) > 1:
            del flat[at]
    return flat


def _drawn_change(draw: st.DrawFn, view: CompressedKV) -> tuple[str, Change]:
    rank, shape = view.dim(), view.shape
    at, other = draw(st.integers(-rank, rank - 1)), draw(st.integers(-rank, rank - 1))
    size = shape[at]
    index = draw(st.integers(0, max(size - 1, 0)))
    low, high = sorted((index, draw(st.integers(0, size))))
    rows = torch.tensor(draw(st.lists(st.integers(0, max(size - 1, 0)), min_size=1, max_size=3)))
    order = list(draw(st.permutations(range(rank))))
    target = _reshaped(draw, shape)
    new = torch.randn([*shape[:at], 2, *shape[at:][1:]], dtype=view.dtype)
    times = draw(st.integers(1, 3))
    grown = [times if dim == at % rank and size == 1 else -1 for dim in range(rank)]
    changes: dict[str, Change] = {
        "transpose": lambda kv: kv.transpose(at, other),
        "permute": lambda kv: kv.permute(order),
        "view": lambda kv: kv.reshape(target),
        "unsqueeze": lambda kv: kv.unsqueeze(at),
        "squeeze": lambda kv: kv.squeeze(at),
        "select": lambda kv: kv.select(at, index),
        "slice": lambda kv: kv.narrow(at, low, high - low),
        "split": lambda kv: kv.split(max(size // 2, 1), at)[0],
        "unbind": lambda kv: kv.unbind(at)[-1],
        "cat": lambda kv: torch.cat([kv, new], at),
        "index": lambda kv: kv.index_select(at, rows),
        "repeat": lambda kv: kv.repeat([times if dim == at % rank else 1 for dim in range(rank)]),
        "repeat each": lambda kv: kv.repeat_interleave(times, at),
        "expand": lambda kv: kv.expand(grown),
        "clone": torch.Tensor.clone,
    }
    name = draw(st.sampled_from(sorted(changes)))
    return name, changes[name]


@settings(max_examples=250, deadline=None)
@given(st.data(), st.booleans(), st.integers(0, 100), st.integers(1, 2), st.booleans())
def test_any_sequence_of_operations_is_that_on_a_dense_tensor_or_refused(
    data: st.DataObject, pair: bool, seed: int, batch: int, inference: bool
) -> None:
    refused: set[str] = set()

    @st.composite
    def drawn(draw: st.DrawFn) -> None:
        layout = draw(layouts(pair))
        kind: Kind = "pair" if pair else draw(st.sampled_from(("key", "value")))
        view: Any = new_view(layout, kind, seed=seed, batch=batch)
        dense = view.dense(FILL)[0]
        for _ in range(draw(st.integers(1, 6))):
            name, change = _drawn_change(draw, view)
            expected = change(dense)
            try:
                found = change(view)
            except CacheError:
                refused.add(name)
                continue
            if isinstance(found, RepeatedKV):
                assert torch.equal(found.dense(FILL)[0], expected)
                continue
            agrees(found, expected)
            view, dense = found, expected
            if view.numel() == 0:
                return

    with torch.inference_mode(inference), torch.no_grad():
        data.draw(drawn())
    assert not refused & {"transpose", "permute", "unsqueeze", "clone"}
