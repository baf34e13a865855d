"""The call boundary of graphs that write to preallocated buffers: which store stands in for them, if any.

Everything here is looked at on the host before the compiled graph runs, because Dynamo guards on none of it. A position
that is held in a tensor is read: on an accelerator that waits once per call. Whatever does not fit, the dense graph
serves, which is always right: the buffers hold every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from adakv_compile.runtime.side import SideStore, attach, attached, forget
from adakv_compile.runtime.store import LayerStore

__all__ = ["Buffer", "Consecutive", "Fact", "Number", "Place", "Position", "Shows", "bind_buffers"]

_FEWEST_ENTRIES: Final = 2
_HIDDEN: Final = -1e4


@dataclass(frozen=True, slots=True)
class Number:
    """An integer that the host knows: a sum of integer arguments and sizes of arguments.

    Attributes:
        constant: The constant term.
        terms: Factor, index of the argument, and the dimension of it, None for the argument itself.
    """

    constant: int
    terms: tuple[tuple[int, int, int | None], ...] = ()

    def value(self, args: Sequence[Any]) -> int:
        """Return the number in a call."""
        found = self.constant
        for factor, index, dim in self.terms:
            found += factor * int(args[index] if dim is None else args[index].shape[dim])
        return found


@dataclass(frozen=True, slots=True)
class Position:
    """A position in the sequence: a number, or a number and an element of an argument.

    Attributes:
        number: What is added.
        tensor: Index of the argument, None if there is none.
        element: Where the element is.
    """

    number: Number
    tensor: int | None = None
    element: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """Where the caller gets a buffer: an argument that is written to, or an output.

    Attributes:
        argument: Index of the argument, None for a buffer that the graph makes.
        output: The output, None for an argument.
    """

    argument: int | None
    output: int | None = None


@dataclass(frozen=True, slots=True)
class Consecutive:
    """An integer argument ``[T]`` counts up in steps of one, from zero or more."""

    index: int


@dataclass(frozen=True, slots=True)
class Shows:
    """A mask argument ``[B or 1, 1, T, R]`` shows column ``c`` to query ``t`` if ``c <= t + position``, padding apart.

    Padding is what the last query is not shown. Nothing is asked of queries that are padding.
    """

    index: int
    position: Position


Fact = Consecutive | Shows


@dataclass(frozen=True, slots=True)
class Buffer:
    """A layer's two buffers.

    Attributes:
        key: The buffer of keys.
        value: The buffer of values.
        slots: Tokens that they have room for.
        rows: Rows of the batch.
        tokens: Tokens of the call.
        position: Where the first of them is written.
        same: What must be the same position: where the values are written, what the mask lets the first query see.
        facts: What must hold of other arguments.
        past: Which past of the boundary the store is, for a step that continues one.
        first: Index of the first of four results, for a prompt that makes one: keys, values, offsets and positions.
    """

    key: Place
    value: Place
    slots: Number
    rows: Number
    tokens: Number
    position: Position
    same: tuple[Position, ...]
    facts: tuple[Fact, ...]
    past: int | None = None
    first: int | None = None


class _Numbers:
    """The positions of one call; every element is read once."""

    def __init__(self, elements: Sequence[tuple[int, tuple[int, ...]]], args: Sequence[Any]) -> None:
        self._args = args
        tensors = [args[index][element] for index, element in elements]
        if len(tensors) > 1 and tensors[0].device.type != "cpu":
            # One wait instead of one for each layer.
            values = torch.stack([tensor.to(torch.int64) for tensor in tensors]).tolist()
        else:
            values = [tensor.item() for tensor in tensors]
        self._values: dict[tuple[int, tuple[int, ...]], int] = dict(zip(elements, values, strict=True))

    @property
    def are_positions(self) -> bool:
        """Whether none is negative, which would count from the end."""
        return all(value >= 0 for value in self._values.values())

    def of(self, position: Position) -> int:
        found = position.number.value(self._args)
        return found if position.tensor is None else found + self._values[position.tensor, position.element]


def _holds(fact: Fact, tokens: int, args: Sequence[Any], numbers: _Numbers) -> bool:
    tensor = args[fact.index]
    if isinstance(fact, Shows):
        return _shows(tensor, tokens, numbers.of(fact.position))
    counted = torch.arange(len(tensor), device=tensor.device, dtype=tensor.dtype)
    return torch.equal(tensor, counted + tensor[:1])


def _shows(mask: Tensor, tokens: int, first: int) -> bool:
    if mask.dtype.is_floating_point:
        # A number between "hidden" and "seen" is neither.
        if not bool(((mask == 0) | (mask <= _HIDDEN)).all()):
            return False
        mask = mask == 0
    seen = mask[:, 0]
    columns = torch.arange(seen.shape[-1], device=mask.device)
    queries = torch.arange(first, first + tokens, device=mask.device)[:, None]
    real = seen[:, -1:] & (columns < first + tokens)
    expected = (columns <= queries) & real
    counted = real[:, 0, first : first + tokens, None]
    # A last query that is shown nothing would say that all of its row is padding.
    known = real.any(-1).all() & (real == seen[:, -1:]).all()
    return bool(known & ((seen == expected) | ~counted).all())


def bind_buffers(
    buffers: Sequence[Buffer],
    getters: Sequence[Callable[[Sequence[Any], Sequence[LayerStore]], Any]],
    graph_for: Callable[[Sequence[LayerStore]], Callable[..., Sequence[Any]]],
    fallback: Callable[..., Sequence[Any]],
    outputs_of: Callable[[Sequence[Any]], tuple[Any, ...]],
    is_as_assumed: Callable[[Sequence[Any]], bool],
) -> Callable[..., Sequence[Any]]:
    """Return the callable that Dynamo will run.

    Args:
        buffers: All buffers of the graph.
        getters: Return an input of the compiled graph from the arguments and the stores of the pasts.
        graph_for: Returns the compiled graph for some stores.
        fallback: The graph as the model wrote it, on dense buffers.
        outputs_of: Turns the compiled graph's results into the outputs.
        is_as_assumed: Whether the tensors of the model are those that the graph was made for.
    """
    positions = [position for buffer in buffers for position in _positions(buffer)]
    elements = tuple(dict.fromkeys((p.tensor, p.element) for p in positions if p.tensor is not None))
    facts = tuple(dict.fromkeys(fact for buffer in buffers for fact in buffer.facts))

    def run(*args: Any) -> Sequence[Any]:
        numbers = _Numbers(elements, args)
        fits = numbers.are_positions and all(_fits(buffer, args, numbers) for buffer in buffers)
        fits = fits and is_as_assumed(args)
        fits = fits and all(_holds(fact, buffers[0].tokens.value(args), args, numbers) for fact in facts)
        sides = _opened(buffers, args, numbers) if fits else None
        if sides is None:
            _forget(buffers, args)
            return fallback(*args)
        stores = [side.store for side in sides]
        for store in stores:
            store.reserve(1)
        finished = False
        try:
            results = graph_for(stores)(*[get(args, stores) for get in getters])
            finished = True
        finally:
            if not finished:
                for store in stores:
                    store.rewind()
                _forget(buffers, args)
        for store in stores:
            store.advance(1)
        outputs = outputs_of(results)
        for buffer in buffers:
            key, value = _tensor(buffer.key, args, outputs), _tensor(buffer.value, args, outputs)
            if buffer.first is not None:
                keys, values, offsets, kept = results[buffer.first : buffer.first + 4]
                length = numbers.of(buffer.position) + buffer.tokens.value(args)
                attach(key, value, LayerStore.sealed(keys, values, offsets, kept, length))
            else:
                assert buffer.past is not None
                sides[buffer.past].seal(key, value)
        return outputs

    return run


def _positions(buffer: Buffer) -> list[Position]:
    inside = [fact.position for fact in buffer.facts if isinstance(fact, Shows)]
    return [buffer.position, *buffer.same, *inside]


def _fits(buffer: Buffer, args: Sequence[Any], numbers: _Numbers) -> bool:
    """Whether the tokens are written inside of the buffer, where the mask has them."""
    first = numbers.of(buffer.position)
    inside = 0 <= first <= buffer.slots.value(args) - buffer.tokens.value(args)
    return inside and all(numbers.of(other) == first for other in buffer.same)


def _opened(buffers: Sequence[Buffer], args: Sequence[Any], numbers: _Numbers) -> list[SideStore] | None:
    """Return the stores of the buffers that a step continues, None if one has none that fits."""
    found: list[SideStore] = []
    for buffer in buffers:
        if buffer.past is None:
            continue
        side = attached(_tensor(buffer.key, args, ()), _tensor(buffer.value, args, ()))
        if side is None:
            return None
        store = side.store
        if store.length != numbers.of(buffer.position) or store.batch != buffer.rows.value(args):
            return None
        if store.keys.shape[1] < _FEWEST_ENTRIES:
            return None
        found.append(side)
    return found


def _tensor(place: Place, args: Sequence[Any], outputs: Sequence[Any]) -> Tensor:
    if place.argument is not None:
        return args[place.argument]
    assert place.output is not None  # a buffer is one or the other
    return outputs[place.output]


def _forget(buffers: Sequence[Buffer], args: Sequence[Any]) -> None:
    for buffer in buffers:
        if buffer.key.argument is not None:
            forget(args[buffer.key.argument])
