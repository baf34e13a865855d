"""Make a trained test bed wider, and let it tell keys apart by both of their words.

The retriever's keys are one token, the generators' two: ``amber ##-harbor``. A model that goes on from the retriever's
heads reads the second alone, and as two keys of a text seldom share it, training hardly ever tells it that this is
wrong. `widen` makes room; `match_first_words` sets the room up so that training has something to improve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from transformers import LlamaForCausalLM

from benchmarks.testbed.model import EMBEDDING, HEAD_DIM, build

__all__ = ["FIRST_WORD", "LONG_ROPE", "match_first_words", "widen"]

#: Low frequencies eight times lower, as in Llama 3.1: ten instead of seven of a head's 16 pairs then turn so little
#: over 1,000 tokens that they tell what a token is, rather than where.
LONG_ROPE: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
)
#: How far back a key's first word is where its value is asked for, and where the retriever's heads read a value from.
FIRST_WORD: Final = (2, 4)

_LONGEST: Final = 1024
#: Most that a pair of dimensions may turn over the longest text to count for what a token is.
_MOST_RADIANS: Final = 1.5
#: The constant feature, and how much of it queries and keys take at each of the highest frequencies.
_CONSTANT: Final = 0.3
_AMPLITUDES: Final = (4.0, 3.5, 3.0, 2.5, 2.0, 1.7)
#: How loudly the first word is brought, so that it stands beside what the retriever's own heads write.
_LOUD: Final = 0.7
#: How much a match of the first words counts. More makes chance likenesses of other words count, too.
_SHARP: Final = 1.2


@torch.no_grad()
def widen(network: LlamaForCausalLM, width: int, rope: Mapping[str, Any] = LONG_ROPE) -> LlamaForCausalLM:
    """Return a wider model whose old features are nearly what they were.

    Old weights keep their places, read old features alone and are all that writes to them; new heads and new features
    are random, with the spread of the old weights, and write to new features. Under the same rotary embedding, old
    features change by what the norms' means do. (Chen et al. 2016, arXiv:1511.05641, has the idea, made exact.)

    Args:
        network: A model as `benchmarks.testbed.model.build` returns it.
        width: The new width, at least the old one.
        rope: The new rotary embedding.

    Returns:
        A model with the other's weights in the first rows and columns of its own.
    """
    wider = build(network.config.vocab_size, width, rope)
    state = wider.state_dict()
    for name, weight in network.state_dict().items():
        if name == "lm_head.weight":  # The embedding itself.
            continue
        new = state[name]
        if weight.ndim == 1:
            # The root mean square that a norm divides by stays about the same: new features are as large as old ones.
            new[: len(weight)] = weight
            new[len(weight) :] = weight.mean()
            continue
        rows, columns = weight.shape
        new.normal_(std=weight.square().mean().sqrt().item())
        if name != EMBEDDING:
            new[:rows] = 0
        new[:rows, :columns] = weight
    wider.load_state_dict(state)
    return wider


@torch.no_grad()
def match_first_words(network: LlamaForCausalLM, old_width: int) -> None:
    """Let the heads of the second layer compare the first words of keys, as they do the last ones.

    ``amber ##-harbor is: 12 ##34``: two new heads of the first layer bring a key's first word to where its value is
    asked for and to where it is read from, and the queries and keys of the second layer's old heads get a common random
    projection of it. Training alone finds neither of the two: what isn't brought can't be matched, and nothing rewards
    bringing what isn't matched.

    A head looks at an offset if its query, the same for all tokens, is its key turned back by it: their product at a
    distance ``m`` is a sum of ``cos(f * (m - offset))`` over the rotary frequencies ``f``. A feature that is the same
    for all pieces makes such queries and keys.

    Args:
        network: A model that `widen` has just made wider by at least 64; changed in place.
        old_width: Its width before, which is also the place of the constant feature.
    """
    first: Any = network.model.layers[0].self_attn
    second: Any = network.model.layers[1].self_attn
    frequencies: torch.Tensor = network.model.rotary_emb.inv_freq
    half = HEAD_DIM // 2
    old_heads = old_width // HEAD_DIM
    # Two slots of new features: the first word where a value is asked for, and where it is read from.
    room = (network.config.hidden_size - old_width - 1) // 2
    slots = [slice(old_width + 1 + i * room, old_width + 1 + (i + 1) * room) for i in range(len(FIRST_WORD))]

    network.model.embed_tokens.weight[:, old_width] = _CONSTANT
    amplitudes = torch.tensor(_AMPLITUDES)
    high = torch.arange(len(_AMPLITUDES))
    spread = torch.randn(room, HEAD_DIM) * _LOUD
    # Both heads belong to the first new KV head and so write the same of a word.
    first.k_proj.weight[old_heads * HEAD_DIM + high, old_width] = amplitudes
    for head, (offset, slot) in enumerate(zip(FIRST_WORD, slots, strict=True), start=2 * old_heads):
        angles = offset * frequencies[high]
        first.q_proj.weight[head * HEAD_DIM + high, old_width] = amplitudes * angles.cos()
        first.q_proj.weight[head * HEAD_DIM + half + high, old_width] = -amplitudes * angles.sin()
        columns = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        first.o_proj.weight[old_width:, columns] = 0
        first.o_proj.weight[slot, columns] = spread

    slow = (frequencies * _LONGEST < _MOST_RADIANS).nonzero().flatten()
    slow = torch.cat([slow, slow + half])
    asked, held = slots
    for head in range(old_heads):
        common = torch.randn(len(slow), room) * _SHARP / math.sqrt(room)
        second.k_proj.weight[head * HEAD_DIM + slow, held] = common
        for query_head in (2 * head, 2 * head + 1):
            second.q_proj.weight[query_head * HEAD_DIM + slow, asked] = common
