"""The call boundary: the only Python that runs at every step.

The compiled graph takes plain tensors. Here each ``CompressedKV`` argument is replaced by the parts of its layer's
store, and the parts that come back are wrapped again, so the caller's cache holds compressed tensors of the logical
shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final, Literal, cast

from adakv_compile.assumptions import Assumed, Assumption, CausalMask
from adakv_compile.block_masks import BlockTable
from adakv_compile.buffer_call import Buffer, bind_buffers
from adakv_compile.runtime.boundary import join, wrap_grown, wrap_prefill
from adakv_compile.runtime.compressed import CompressedKV, Kind, make_view
from adakv_compile.runtime.layout import STANDARD, Layout
from adakv_compile.runtime.store import STORE_TENSORS, LayerStore
from adakv_compile.step_call import Layer, Step, bind_step

__all__ = [
    "STORE_TENSORS",
    "Boundary",
    "CachedLength",
    "Dimension",
    "Grown",
    "Made",
    "Passed",
    "Past",
    "Returned",
    "StorePart",
    "bind",
]

_FEWEST_ENTRIES: Final = 2
"""The compiled graph was made for at least two kept entries, as any size that PyTorch keeps symbolic."""


@dataclass(frozen=True, slots=True)
class Passed:
    """An input handed on as it is."""

    index: int


@dataclass(frozen=True, slots=True)
class StorePart:
    """A field of the store behind a compressed past."""

    past: int
    field: str


@dataclass(frozen=True, slots=True)
class Dimension:
    """A size of an argument that the graph itself no longer takes."""

    index: int
    dim: int


Input = Passed | StorePart | Dimension


@dataclass(frozen=True, slots=True)
class Past:
    """A layer's compressed past.

    Attributes:
        key: Index of the argument that holds the keys.
        value: Index of the argument that holds the values; the same for keys and values in one tensor.
        appends: Tokens that the graph appends to the tail in place: a number, or the argument that holds it.
        drops_oldest: Whether the graph tells apart entries that a sliding cache has dropped.
    """

    key: int
    value: int
    appends: int | Passed
    drops_oldest: bool


@dataclass(frozen=True, slots=True)
class Returned:
    """An output handed on: a result of the compiled graph, or a constant."""

    index: int | None
    constant: object = None


CachedLength = int | Returned | Literal["all", "as before"]
"""A number, a result that holds it, all tokens so far, or as many as the past had: what a sliding cache keeps."""


@dataclass(frozen=True, slots=True)
class Made:
    """A cache made from results ``first .. first + 3``: keys, values, offsets and positions.

    Attributes:
        first: Index of the first of the four results.
        kind: Which of the two tensors this output is, or that it is both.
        tokens: Tokens of this call that the cache covers: a number, or the result that holds it.
        past: The past it continues, if any.
        cached: Logical length of the tensor the caller gets.
        layout: Its layout.
    """

    first: int
    kind: Kind
    tokens: int | Returned
    past: int | None
    cached: CachedLength
    layout: Layout = STANDARD


@dataclass(frozen=True, slots=True)
class Grown:
    """A compressed past after the graph appended to it.

    Attributes:
        past: The past.
        kind: Which of the two tensors this output is, or that it is both.
        cached: Logical length of the tensor the caller gets.
        layout: Its layout.
    """

    past: int
    kind: Kind
    cached: CachedLength
    layout: Layout = STANDARD


Output = Returned | Made | Grown


@dataclass(frozen=True, slots=True)
class Boundary:
    """How arguments and results of the compiled graph relate to those of Dynamo's graph.

    Attributes:
        inputs: Where the compiled graph's arguments come from.
        pasts: The compressed pasts; in a graph with buffers, those of the buffers.
        outputs: What the caller gets.
        assumed: Arguments that must be what they were when the graph was made.
        buffers: The preallocated buffers that are written to.
    """

    inputs: tuple[Input, ...]
    pasts: tuple[Past, ...]
    outputs: tuple[Output, ...]
    assumed: tuple[Assumed | CausalMask | BlockTable, ...] = ()
    buffers: tuple[Buffer, ...] = ()


def bind(
    boundary: Boundary,
    compiled: Callable[..., Sequence[Any]],
    fallback: Callable[..., Sequence[Any]],
    sizes: Assumption | None = None,
) -> Callable[..., Sequence[Any]]:
    """Return the callable that Dynamo will run.

    Args:
        boundary: How to translate arguments and results.
        compiled: The compiled graph, on plain tensors.
        fallback: The original graph; runs eagerly when an argument is not what the graph was compiled for.
        sizes: What must hold of the stores for the compiled graph.
    """
    if not boundary.pasts and not boundary.buffers and all(isinstance(output, Returned) for output in boundary.outputs):
        return compiled
    pasts, assumed = boundary.pasts, boundary.assumed

    def graph_for(stores: Sequence[LayerStore]) -> Callable[..., Sequence[Any]]:
        usual = sizes is None or sizes.holds(*(size.of(stores) for size in sizes.sizes))
        return compiled if usual else cast("Assumption", sizes).otherwise

    def is_as_assumed(args: Sequence[Any]) -> bool:
        return all(assumption.holds(args) for assumption in assumed)

    step = _step(boundary)
    if step is not None:
        return bind_step(step, graph_for, fallback, is_as_assumed if assumed else None, _FEWEST_ENTRIES)
    getters = [_getter(source) for source in boundary.inputs]
    layouts = _layouts(boundary.outputs)
    if boundary.buffers:

        def wrapped(results: Sequence[Any]) -> tuple[Any, ...]:
            return _wrap(boundary, layouts, results, (), ())

        return bind_buffers(boundary.buffers, getters, graph_for, fallback, wrapped, is_as_assumed)

    def run(*args: Any) -> Sequence[Any]:
        if not is_as_assumed(args):
            return fallback(*args)
        stores: list[LayerStore] = []
        for past in pasts:
            key, value = args[past.key], args[past.value]
            if not (type(key) is CompressedKV and type(value) is CompressedKV):
                return fallback(*args)
            if key.start and not past.drops_oldest:
                return fallback(*args)
            store = join(key, value, _count(past, args))
            if store.entries < _FEWEST_ENTRIES:
                return fallback(*args)
            stores.append(store)
        before = [(args[past.key].length, args[past.key].start) for past in pasts]
        finished = False
        try:
            results = graph_for(stores)(*[get(args, stores) for get in getters])
            finished = True
        finally:
            if not finished:
                # Some layers may have appended already: their device cursors must say again what the host says.
                for store in stores:
                    store.rewind()
        for past, store in zip(pasts, stores, strict=True):
            if past.appends:
                store.advance(_count(past, args))
        return _wrap(boundary, layouts, results, stores, before)

    return run


def _step(boundary: Boundary) -> Step | None:
    """Return what a decode step in the usual layout does, None for any other graph."""
    layers = [
        Layer(past.key, past.value, past.appends, past.drops_oldest)
        for past in boundary.pasts
        if isinstance(past.appends, int) and past.key != past.value
    ]
    if boundary.buffers or len(layers) < len(boundary.pasts):
        return None
    inputs: list[int] = []
    for source in boundary.inputs:
        if isinstance(source, Passed):
            inputs.append(len(STORE_TENSORS) * len(layers) + source.index)
        elif isinstance(source, StorePart) and source.field in STORE_TENSORS:
            inputs.append(len(STORE_TENSORS) * source.past + STORE_TENSORS.index(source.field))
        else:
            return None
    constants: list[object] = [
        output.constant for output in boundary.outputs if isinstance(output, Returned) and output.index is None
    ]
    outputs: list[int] = []
    results = 2 * len(layers) + len(constants)
    constant = iter(range(2 * len(layers), results))
    for output in boundary.outputs:
        if isinstance(output, Returned):
            outputs.append(next(constant) if output.index is None else results + output.index)
        elif isinstance(output, Grown) and output.layout is STANDARD and output.cached == "all":
            outputs.append(2 * output.past + (output.kind == "value"))
        else:
            return None
    return Step(tuple(layers), tuple(inputs), tuple(outputs), tuple(constants))


def _count(past: Past, args: Sequence[Any]) -> int:
    """Return how many tokens a call appends."""
    return past.appends if isinstance(past.appends, int) else args[past.appends.index]


def _getter(source: Input) -> Callable[[Sequence[Any], Sequence[LayerStore]], Any]:
    if isinstance(source, Passed):
        index = source.index
        return lambda args, stores: args[index]
    if isinstance(source, Dimension):
        index, dim = source.index, source.dim
        return lambda args, stores: args[index].shape[dim]
    past, read = source.past, attrgetter(source.field)
    return lambda args, stores: read(stores[past])


_Name = tuple[type, int]
"""What the outputs of one layer have in common: their views are made together and share a store."""
_Layouts = tuple[Layout, Layout]
"""Of a layer's keys and of its values; twice the same for both in one tensor."""


def _name(output: Made | Grown) -> _Name:
    return type(output), output.first if isinstance(output, Made) else output.past


def _layouts(outputs: Sequence[Output]) -> dict[_Name, _Layouts]:
    """Return the layouts in which each layer's views are made."""
    layouts: dict[_Name, _Layouts] = {}
    views = [output for output in outputs if not isinstance(output, Returned)]
    for output in sorted(views, key=lambda output: output.kind == "pair"):  # both in one tensor decides
        of_keys, of_values = layouts.get(_name(output), (STANDARD, STANDARD))
        layouts[_name(output)] = (
            of_keys if output.kind == "value" else output.layout,
            of_values if output.kind == "key" else output.layout,
        )
    return layouts


def _wrap(
    boundary: Boundary,
    layouts: Mapping[_Name, _Layouts],
    results: Sequence[Any],
    stores: Sequence[LayerStore],
    before: Sequence[tuple[int, int]],
) -> tuple[Any, ...]:
    made: dict[_Name, tuple[CompressedKV, CompressedKV]] = {}
    outputs: list[Any] = []
    for output in boundary.outputs:
        if isinstance(output, Returned):
            outputs.append(output.constant if output.index is None else results[output.index])
            continue
        name = _name(output)
        views = made.get(name)
        if views is None:
            if isinstance(output, Made):
                views = _make(output, results, before, layouts[name])
            else:
                views = _grow(output, boundary, results, stores, before, layouts[name])
            made[name] = views
        view = views[1] if output.kind == "value" else views[0]
        if view.axes is not output.layout and view.axes != output.layout:
            # The graph returns one tensor in several layouts, or one of a pair besides the pair.
            view = make_view(view.store, output.kind, view.length, view.start, None, output.layout)
        outputs.append(view)
    return tuple(outputs)


def _make(
    output: Made, results: Sequence[Any], before: Sequence[tuple[int, int]], layouts: _Layouts
) -> tuple[CompressedKV, CompressedKV]:
    keys, values, offsets, positions = results[output.first : output.first + 4]
    length, start = (0, 0) if output.past is None else before[output.past]
    end = start + length + _number(output.tokens, results)
    first = _start(output.cached, results, start, length, end)
    return wrap_prefill(keys, values, offsets, positions, end, first, layouts)


def _grow(
    output: Grown,
    boundary: Boundary,
    results: Sequence[Any],
    stores: Sequence[LayerStore],
    before: Sequence[tuple[int, int]],
    layouts: _Layouts,
) -> tuple[CompressedKV, CompressedKV]:
    length, start = before[output.past]
    end = stores[output.past].length if boundary.pasts[output.past].appends else start + length
    first = _start(output.cached, results, start, length, end)
    return wrap_grown(stores[output.past], end - first, first, layouts)


def _start(cached: CachedLength, results: Sequence[Any], start: int, length: int, end: int) -> int:
    """Return the position of the first slot that the caller keeps."""
    if cached == "all":
        return start
    return end - (length if cached == "as before" else _number(cached, results))


def _number(length: int | Returned, results: Sequence[Any]) -> int:
    if isinstance(length, int):
        return length
    assert length.index is not None  # constants stay plain integers
    return int(results[length.index])
