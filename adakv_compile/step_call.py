"""The call boundary of a decode step, where every past is appended to and given back: what runs once for each token.

It does what :func:`adakv_compile.call.bind` does, for one kind of graph, and decides nothing at a call that the graph
decides: a layer's two views are looked at, the parts of its store are gathered, and two new views are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from adakv_compile.runtime.boundary import join
from adakv_compile.runtime.compressed import CompressedKV, make_view
from adakv_compile.runtime.store import LayerStore

__all__ = ["Layer", "Step", "bind_step"]


@dataclass(frozen=True, slots=True)
class Layer:
    """A past in ``[B, Hkv, L, D]``, keys and values apart.

    Attributes:
        key: Index of the argument that holds the keys.
        value: Index of the argument that holds the values.
        appends: Tokens that the graph appends.
        drops_oldest: Whether the graph tells apart entries that a sliding cache has dropped.
    """

    key: int
    value: int
    appends: int
    drops_oldest: bool


@dataclass(frozen=True, slots=True)
class Step:
    """How arguments and results of a step's compiled graph relate to those of the model's.

    Attributes:
        layers: The pasts.
        inputs: Where each argument of the compiled graph is in the parts of each layer's store, in the order of
            ``STORE_TENSORS``, followed by what the caller passes.
        outputs: Where each output is in the layers' new views, keys and values in turn, followed by ``constants`` and
            the compiled graph's results.
        constants: Outputs that are always the same.
    """

    layers: tuple[Layer, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: tuple[object, ...]


def bind_step(
    step: Step,
    graph_for: Callable[[Sequence[LayerStore]], Callable[..., Sequence[Any]]],
    fallback: Callable[..., Sequence[Any]],
    is_as_assumed: Callable[[Sequence[Any]], bool] | None,
    fewest_entries: int,
) -> Callable[..., Sequence[Any]]:
    """Return the callable that Dynamo will run.

    Args:
        step: How to translate arguments and results.
        graph_for: Returns the compiled graph for some stores.
        fallback: The graph as the model wrote it.
        is_as_assumed: Whether the arguments are what the graph was made for, apart from the caches.
        fewest_entries: Kept entries that the compiled graph was made for at least.
    """
    # Plain tuples: a step reads all of it, and an attribute costs as much as a check.
    pasts = tuple((layer.key, layer.value, layer.appends, layer.drops_oldest) for layer in step.layers)
    constants, pick_inputs, pick_outputs = step.constants, _picker(step.inputs), _picker(step.outputs)

    def run(*args: Any) -> Sequence[Any]:
        if is_as_assumed is not None and not is_as_assumed(args):
            return fallback(*args)
        stores: list[LayerStore] = []
        for key_at, value_at, appends, drops_oldest in pasts:
            key, value = args[key_at], args[value_at]
            if not (type(key) is CompressedKV and type(value) is CompressedKV) or (key.start and not drops_oldest):
                return fallback(*args)
            store = join(key, value, appends)
            if store.entries < fewest_entries:
                return fallback(*args)
            stores.append(store)
        source: list[Any] = []
        for store in stores:
            source += store.parts
        source += args
        finished = False
        try:
            results = graph_for(stores)(*pick_inputs(source))
            finished = True
        finally:
            if not finished:
                # Some layers may have appended already: their device cursors must say again what the host says.
                for store in stores:
                    store.rewind()
        made: list[Any] = []
        for (key_at, _, appends, _), store in zip(pasts, stores, strict=True):
            store.tail_length += appends
            start = args[key_at].start
            length = store.prefix_length + store.tail_length - start
            made.append(make_view(store, "key", length, start))
            made.append(make_view(store, "value", length, start))
        made += constants
        made += results
        return pick_outputs(made)

    return run


def _picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return a function that picks the elements at ``indices``, as a tuple however many they are."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda source: tuple(source[index] for index in indices)
