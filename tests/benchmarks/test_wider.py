"""A wider test bed computes what the narrow one did, and finds keys by their first words, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.testbed import model, wider

_SENTENCE = "One of the special magic numbers for {} is: {}."
_PAIRS = (("amber", "wise"), ("calm", "tiny"), ("proud", "lucky"), ("rusty", "smooth"), ("brave", "golden"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model.WEIGHTS / "0")


@pytest.fixture(scope="module")
def narrow(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    network = model.build(len(tokenizer))
    model.warm_start(network, tokenizer, 0)
    network.set_attn_implementation("eager")
    return network.eval()


def _wide(narrow: LlamaForCausalLM, width: int) -> LlamaForCausalLM:
    torch.manual_seed(1)
    network = wider.widen(narrow, width, model.RETRIEVER_ROPE).eval()
    network.set_attn_implementation("eager")
    return network


@torch.no_grad()
def _said(network: LlamaForCausalLM, ids: torch.Tensor) -> Any:
    return network(ids, output_hidden_states=True, output_attentions=True)


@pytest.mark.parametrize("width", [192, 256])
def test_old_features_are_nearly_what_they_were(narrow: LlamaForCausalLM, width: int) -> None:
    ids = torch.randint(4, narrow.config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(2))
    old, new = _said(narrow, ids).hidden_states, _said(_wide(narrow, width), ids).hidden_states
    torch.testing.assert_close(new[0][..., :128], old[0], atol=0, rtol=0)
    # The last one is normed, over all features.
    for before, after in zip(old[1:-1], new[1:-1], strict=True):
        assert after.shape[-1] == width
        alike = torch.nn.functional.cosine_similarity(after[..., :128], before, dim=-1)
        assert alike.mean() > 0.97


def test_two_heads_look_where_a_keys_first_word_is(narrow: LlamaForCausalLM, tokenizer: Any) -> None:
    network = _wide(narrow, 192)
    wider.match_first_words(network, 128)
    text = " ".join(_SENTENCE.format(f"{a}-harbor", 1234567 + i) for i, a in enumerate(x for p in _PAIRS for x in p))
    weights = _said(network, tokenizer(text, return_tensors="pt").input_ids).attentions[0][0]
    for head, offset in zip((8, 9), wider.FIRST_WORD, strict=True):
        looked = [weights[head].diagonal(-back).mean().item() for back in range(8)]
        assert max(looked) == looked[offset] > 0.5


def test_the_second_layer_tells_keys_apart_by_their_first_words(narrow: LlamaForCausalLM, tokenizer: Any) -> None:
    def preferred(network: LlamaForCausalLM) -> float:
        """Return how much more the old heads look at the right one of two values, both of a harbor."""
        more = 0.0
        for first, second in _PAIRS:
            told = [_SENTENCE.format(f"{name}-harbor", value) for name, value in ((first, 1234567), (second, 7654321))]
            for asked in (0, 1):
                text = f"{told[0]} {told[1]} {(first, second)[asked]}-harbor is:"
                ids = tokenizer(text, return_tensors="pt").input_ids
                looked = _said(network, ids).attentions[1][0, :8, -1].sum(0)
                # The second token of each value is where the retriever reads.
                places = [ids[0].tolist().index(tokenizer.convert_tokens_to_ids(piece)) for piece in ("##34", "##54")]
                more += looked[places[asked]].item() - looked[places[1 - asked]].item()
        return more / (2 * len(_PAIRS))

    network = _wide(narrow, 192)
    before = preferred(network)
    wider.match_first_words(network, 128)
    assert preferred(network) > before + 1.0
