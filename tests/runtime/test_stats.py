"""What `cache_stats` finds, and what it counts."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from adakv_compile.runtime.stats import cache_stats
from tests.runtime.dense import Conversation, conversation


class Layer:
    """A layer of a cache object."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values


class Cache:
    """A cache object with layers and a reference to itself."""

    def __init__(self, *layers: Layer) -> None:
        self.layers = list(layers)
        self.owner = self


@dataclass
class Output:
    """A model output."""

    logits: torch.Tensor
    past_key_values: Any
    attentions: Any = None


class Attention(nn.Module):
    """A module that owns its cache."""

    def __init__(self, talk: Conversation) -> None:
        super().__init__()
        self.proj = nn.Conv2d(2, 2, 3)
        self.k_cache, self.v_cache = talk.key, talk.value


WHERE: dict[str, Callable[[Conversation], object]] = {
    "tuple": lambda talk: ((talk.key, talk.value),),
    "dict": lambda talk: {"layer": [{"keys": talk.key, "values": talk.value}]},
    "object": lambda talk: Cache(Layer(talk.key, talk.value)),
    "output": lambda talk: Output(torch.ones(1, 2, 3), Cache(Layer(talk.key, talk.value))),
    "ordered output": lambda talk: OrderedDict(past_key_values=Cache(Layer(talk.key, talk.value))),
    "module": lambda talk: nn.Sequential(nn.Linear(2, 2), Attention(talk)),
    "parallel lists": lambda talk: {"key_cache": [talk.key], "value_cache": [talk.value]},
}


@pytest.mark.parametrize("where", WHERE)
def test_compressed_layers_are_found_and_paired(where: str) -> None:
    talk = conversation()
    stats = cache_stats(WHERE[where](talk))
    (layer,) = stats.layers
    assert layer.compressed
    assert layer.logical_length == 17
    assert torch.equal(layer.head_lengths, talk.held.sum(-1))
    assert layer.bytes_held == stats.bytes_held == talk.key.store.nbytes_held
    assert layer.bytes_dense == stats.bytes_dense == talk.key.nbytes_dense + talk.value.nbytes_dense
    assert stats.ratio == stats.bytes_held / stats.bytes_dense


def test_dense_layers_beside_compressed_ones_keep_their_order() -> None:
    first, third = conversation(0), conversation(1)
    dense = torch.ones(2, 3, 17, 8)
    cache = Cache(Layer(first.key, first.value), Layer(dense, dense.clone()), Layer(third.key, third.value))
    stats = cache_stats(cache)
    assert [layer.compressed for layer in stats.layers] == [True, False, True]
    assert stats.layers[1].bytes_held == stats.layers[1].bytes_dense == 2 * dense.nbytes
    assert torch.equal(stats.layers[1].head_lengths, torch.full((2, 3), 17))
    page = str(stats).splitlines()
    assert page[0].startswith("KV cache: 2 of 3 layers compressed")
    assert page[3].endswith("dense")
    assert len(page) == 5
    data = json.loads(stats.json())
    assert data["bytes_held"] == stats.bytes_held
    assert data["layers"][0]["head_lengths"] == first.held.sum(-1).tolist()


def test_legacy_tuples_pair_keys_and_values_in_turn() -> None:
    talk = conversation()
    cross = torch.ones(2, 3, 5, 8)
    stats = cache_stats(((torch.ones(2, 3, 17, 8), torch.ones(2, 3, 17, 8), cross, cross + 1), (talk.key, talk.value)))
    assert [(layer.compressed, layer.logical_length) for layer in stats.layers] == [(False, 17), (False, 5), (True, 17)]


def test_a_layer_is_counted_once() -> None:
    talk = conversation()
    older = talk.key.detach(), talk.value.detach()
    grown = torch.cat([talk.key, torch.ones(2, 3, 2, 8).double()], 2)
    stats = cache_stats([older, (talk.key, talk.value), Cache(Layer(talk.key, talk.value))])
    assert len(stats.layers) == 1
    assert cache_stats([talk.key, grown, talk.value]).layers[0].logical_length == 19


def test_other_tensors_are_not_caches() -> None:
    weights = tuple(torch.ones(2, 3, 4, 17) for _ in range(4))
    talk = conversation()
    output = Output(torch.ones(2, 3, 17, 8), ((talk.key, talk.value),), attentions=weights)
    assert len(cache_stats(output).layers) == 1


@pytest.mark.parametrize("nothing", [None, 3, "text", [], torch.ones(2, 3, 4, 5), nn.Linear(2, 2), {"a": [1, (2,)]}])
def test_nothing_found(nothing: object) -> None:
    with pytest.raises(ValueError, match=r"no KV cache found in .*use_cache=True"):
        cache_stats(nothing)
