"""The boundary of a decode step: the same as the general one, with nothing made that a step doesn't need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from adakv_compile import call
from adakv_compile.assumptions import Assumption, StoreSize
from adakv_compile.call import STORE_TENSORS, Boundary, Grown, Made, Passed, Past, Returned, StorePart, bind
from adakv_compile.runtime import compressed
from adakv_compile.runtime.compressed import CompressedKV
from adakv_compile.runtime.errors import CacheError, CacheMismatchError
from adakv_compile.runtime.layout import Layout
from tests.runtime.dense import conversation, random_entries

LAYERS = 3
Outputs = tuple[Grown | Returned | Made, ...]


@pytest.fixture(params=["step", "general"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "general":
        monkeypatch.setattr(call, "_step", lambda boundary: None)
    return request.param


def boundary(outputs: Outputs = (), *, drops_oldest: bool = False) -> Boundary:
    """Return that of a graph which takes a tensor of new entries, and the caches of all layers."""
    views = tuple(Grown(i, kind, "all") for i in range(LAYERS) for kind in ("key", "value"))
    return Boundary(
        inputs=(*(StorePart(i, name) for i in range(LAYERS) for name in STORE_TENSORS), Passed(0)),
        pasts=tuple(Past(1 + 2 * i, 2 + 2 * i, 1, drops_oldest) for i in range(LAYERS)),
        outputs=outputs or (Returned(0), *views, Returned(None, "constant")),
    )


def append(*args: Any) -> tuple[Any, ...]:
    """Do on the device what a compiled step does: append to all layers."""
    new = args[-1]
    for i in range(LAYERS):
        *_, tail_keys, tail_values, cursor = args[7 * i : 7 * i + 7]
        at = int(cursor[0])
        tail_keys[:, :, at : at + 1] = new
        tail_values[:, :, at : at + 1] = new + 1
        cursor[0] += 1
    return (new * 2,)


def refuse(*args: Any) -> tuple[Any, ...]:
    return ("fallback", *args)


def caches(length: int = 17) -> list[Tensor]:
    talks = [conversation(seed, length=length) for seed in range(LAYERS)]
    return [view for talk in talks for view in (talk.key, talk.value)]


def token(seed: int = 9) -> Tensor:
    return random_entries(2, 1, torch.float64, torch.Generator().manual_seed(seed))[0]


def is_step(made: Callable[..., Any]) -> bool:
    return made.__module__ == "adakv_compile.step_call"


def test_a_step_is_what_the_general_boundary_makes_of_it(path: str) -> None:
    run = bind(boundary(), append, refuse)
    assert is_step(run) == (path == "step")
    views: Sequence[Any] = caches()
    dense = [view.dense()[0] for view in views]
    for step in range(20):  # the tail grows meanwhile
        result, *views, constant = run(token(step), *views)
        assert torch.equal(result, token(step) * 2)
        assert constant == "constant"
        for i, view in enumerate(views):
            dense[i] = torch.cat([dense[i], token(step) + i % 2], 2)
            assert (view.kind, view.start, view.length) == ("value" if i % 2 else "key", 0, 18 + step)
            assert view.shape == dense[i].shape
            assert torch.equal(view.dense()[0], dense[i])
        for key, value in zip(views[::2], views[1::2], strict=True):
            assert key.store is value.store
            assert key.store.cursor[:2].tolist() == [step + 1, 17]


def test_an_older_view_goes_on_by_itself(path: str) -> None:
    run = bind(boundary(), append, refuse)
    old = caches()
    _, *first, _ = run(token(1), *old)
    _, *second, _ = run(token(2), *old)
    for one, other, at in zip(first, second, [0, 1] * LAYERS, strict=True):
        assert one.store is not other.store
        assert torch.equal(one.dense()[0][:, :, -1:], token(1) + at)
        assert torch.equal(other.dense()[0][:, :, -1:], token(2) + at)


def test_entries_that_wait_are_written_first(path: str) -> None:
    run = bind(boundary(), append, refuse)
    grown = [torch.cat([view, token(1)], 2) for view in caches()]
    _, *views, _ = run(token(2), *grown)
    for view, at in zip(views, [0, 1] * LAYERS, strict=True):
        assert view.length == 19
        assert torch.equal(view.dense()[0][:, :, -2:], torch.cat([token(1), token(2) + at], 2))


def test_slots_that_were_dropped(path: str) -> None:
    late = [view[:, :, 5:] for view in caches()]
    assert bind(boundary(), append, refuse)(token(), *late)[0] == "fallback"
    _, *views, _ = bind(boundary(drops_oldest=True), append, refuse)(token(), *late)
    assert all((view.start, view.length) == (5, 13) for view in views)


@pytest.mark.parametrize("at", range(2 * LAYERS))
def test_a_dense_tensor_in_place_of_a_view_runs_the_models_graph(path: str, at: int) -> None:
    views = caches()
    views[at] = views[at].dense()[0]
    assert bind(boundary(), append, refuse)(token(), *views)[0] == "fallback"


def test_views_that_do_not_belong_together(path: str) -> None:
    run = bind(boundary(), append, refuse)
    views = caches()
    with pytest.raises(CacheMismatchError):
        run(token(), views[0], views[3], views[2], views[1], *views[4:])
    with pytest.raises(CacheMismatchError):
        run(token(), views[1], views[0], *views[2:])
    with pytest.raises(CacheMismatchError):
        run(token(), views[0], torch.cat([views[1], token()], 2), *views[2:])


def test_a_view_without_entries(path: str) -> None:
    views = caches()
    views[2].backing = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(CacheError, match="holds no entries"):
        bind(boundary(), append, refuse)(token(), *views)


def test_fewer_entries_than_the_graph_was_made_for(path: str) -> None:
    views = caches()
    views[4:] = [view.like(view.store.emptied(17), None) for view in views[4:]]
    assert bind(boundary(), append, refuse)(token(), *views)[0] == "fallback"


def test_what_was_assumed(path: str) -> None:
    class Never:
        def holds(self, args: Sequence[Any]) -> bool:
            return False

    usual = boundary()
    assumed: Any = (Never(),)
    run = bind(Boundary(usual.inputs, usual.pasts, usual.outputs, assumed), append, refuse)
    assert run(token(), *caches())[0] == "fallback"
    sizes = Assumption(lambda size: size > 100, (StoreSize(1, "entries"),), lambda *args: (append(*args)[0] * 5,))
    result, *_ = bind(usual, append, refuse, sizes)(token(), *caches())
    assert torch.equal(result, token() * 10)


def test_a_step_that_fails_half_way_leaves_no_trace(path: str) -> None:
    def fail(*args: Any) -> tuple[Any, ...]:
        append(*args)
        raise RuntimeError("half-way")

    views = caches()
    before = [view.dense()[0] for view in views]
    with pytest.raises(RuntimeError, match="half-way"):
        bind(boundary(), fail, refuse)(token(), *views)
    for view, dense in zip(views, before, strict=True):
        assert view.store.cursor[0] == view.store.tail_length == 0
        assert torch.equal(view.dense()[0], dense)
    _, *views, _ = bind(boundary(), append, refuse)(token(), *views)
    assert all(view.length == 18 for view in views)


def test_what_is_not_such_a_step_is_left_to_the_general_boundary() -> None:
    usual = boundary()
    by_token = Layout(("b", "l", "h", "d"))
    others: list[Outputs] = [
        (Grown(0, "key", "as before"),),
        (Grown(0, "key", 16),),
        (Grown(0, "key", "all", by_token),),
        (Made(0, "key", 1, 0, "all"),),
    ]
    assert not any(is_step(bind(boundary(outputs), append, refuse)) for outputs in others)
    pair = (Past(1, 1, 1, False), *usual.pasts[1:])
    several = (Past(1, 2, Passed(0), False), *usual.pasts[1:])
    for pasts in (pair, several):
        assert not is_step(bind(Boundary(usual.inputs, pasts, usual.outputs), append, refuse))


def test_a_step_makes_two_views_a_layer_and_passes_the_same_tensors_again(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[tuple[Any, ...]] = []
    made: list[int] = []
    make = compressed.make_wrapper

    def counted(*args: Any, **kwargs: Any) -> CompressedKV:
        made.append(1)
        return make(*args, **kwargs)

    def noted(*args: Any) -> tuple[Any, ...]:
        passed.append(args)
        return append(*args)

    run = bind(boundary(), noted, refuse)
    _, *views, _ = run(token(), *caches())
    stores = {id(view.store) for view in views}
    monkeypatch.setattr(compressed, "make_wrapper", counted)
    for _ in range(3):
        _, *views, _ = run(token(), *views)
    assert len(made) == 3 * 2 * LAYERS
    assert {id(view.store) for view in views} == stores
    for args in passed[1:]:
        assert all(one is other for one, other in zip(args[:-1], passed[0][:-1], strict=True))


def test_the_parts_of_a_store_follow_its_tail() -> None:
    store = conversation().key.store
    for _ in range(3):
        store.append(*random_entries(2, 40, torch.float64, torch.Generator().manual_seed(0)))
        assert len(store.parts) == len(STORE_TENSORS)
        for part, name in zip(store.parts, STORE_TENSORS, strict=True):
            assert part is getattr(store, name)
