"""Build the test bed's decoder, on the weights of the bundled retriever where they fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.retriever import model as retriever
from benchmarks.retriever import vocabulary as known
from benchmarks.testbed import tokenizer as pieces

__all__ = [
    "EMBEDDING",
    "HEAD_DIM",
    "MAX_LENGTH",
    "RETRIEVER_ROPE",
    "WEIGHTS",
    "build",
    "save",
    "warm_start",
]

#: Longest context of the training.
MAX_LENGTH: Final = 2048

EMBEDDING: Final = "model.embed_tokens.weight"
HEAD_DIM: Final = 32
_RETRIEVER_WIDTH: Final = 128
RETRIEVER_ROPE: Final[Mapping[str, Any]] = MappingProxyType({"rope_type": "default"})

WEIGHTS: Final = Path(__file__).parent / "weights"


def build(size: int, width: int = _RETRIEVER_WIDTH, rope: Mapping[str, Any] = RETRIEVER_ROPE) -> LlamaForCausalLM:
    """Return the model with random weights.

    Args:
        size: Pieces of the vocabulary.
        width: Width of the residual stream, a multiple of 32; there is a KV head for every 32, and two query heads for
            each KV head.
        rope: Rotary position embedding as `transformers.LlamaConfig` takes it, but for its base.

    Returns:
        4 layers; with the defaults, they are those of the bundled retriever.
    """
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=2 * width // HEAD_DIM,
        num_key_value_heads=width // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": retriever.ROPE_THETA, **rope},
        bos_token_id=pieces.BOS,
        eos_token_id=pieces.EOS,
        pad_token_id=pieces.PAD,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config)


def warm_start(network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Start from the bundled retriever, whose heads already find what they are asked for.

    All weights but the embedding are taken as they are. A word that the retriever knows keeps its row; the other rows
    are drawn with the mean and the covariance of the retriever's keys, values or filler, whichever part the piece
    will play.

    Args:
        network: As `build` returns it; changed in place.
        tokenizer: Its tokenizer.
        seed: Seed of the rows that are drawn.
    """
    source = retriever.load()
    table = source.state_dict()[EMBEDDING].double().numpy()
    rng = np.random.default_rng(seed)
    rows = np.empty((len(tokenizer), table.shape[1]))
    spread = {
        part: (table[part.ids].mean(0), np.linalg.cholesky(np.cov(table[part.ids].T) + 1e-6 * np.eye(table.shape[1])))
        for part in (known.NAMES, known.VALUES, known.FILLER)
    }
    for number, piece in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        plain = piece.removeprefix("##").removeprefix("-")
        if piece == "##.":
            rows[number] = table[known.END]
            continue
        if not piece.startswith("##") and plain in known.WORDS:
            rows[number] = table[known.WORDS.index(plain)]
            continue
        part = known.NAMES if piece.startswith("##-") else known.FILLER
        if len(plain) <= 2 and plain.isalnum():
            part = known.VALUES
        mean, factor = spread[part]
        rows[number] = mean + factor @ rng.standard_normal(table.shape[1])
    state = source.state_dict()
    for name in (EMBEDDING, "lm_head.weight"):
        state[name] = torch.from_numpy(rows).float()
    network.load_state_dict(state)


def save(network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights, configuration and tokenizer as a Hugging Face folder.

    Args:
        network: The model.
        tokenizer: Its tokenizer.
        folder: Where to write; created if absent.
    """
    network.generation_config = GenerationConfig(
        bos_token_id=pieces.BOS, eos_token_id=pieces.EOS, pad_token_id=pieces.PAD
    )
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
