"""The decoder families that must work: small random models of transformers' own classes, and one that is nobody's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

__all__ = ["FAMILIES", "PlainDecoder", "build"]

VOCAB = 97


@dataclass(frozen=True)
class Family:
    """How to build a small model of a type: its configuration beyond the common sizes.

    ``interface`` tells whether transformers can be given another attention function for it.
    """

    model_type: str
    num_kv_heads: int
    extra: dict[str, Any]
    gpt_names: bool = False
    attention: str = "sdpa"
    interface: bool = True


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", 2, {}),
    "qwen2": Family("qwen2", 2, {}),
    "qwen3": Family("qwen3", 2, {"head_dim": 16}),
    "mistral": Family("mistral", 2, {"sliding_window": None}),
    "mistral-sliding": Family("mistral", 2, {"sliding_window": 40}),
    "phi3": Family("phi3", 2, {"pad_token_id": 0}),
    "gemma": Family("gemma", 1, {"head_dim": 16}),
    "olmo2": Family("olmo2", 2, {}),
    "granite": Family("granite", 2, {"attention_multiplier": 0.2}),
    "cohere": Family("cohere", 2, {}),
    "starcoder2": Family("starcoder2", 2, {"sliding_window": None}),
    "stablelm": Family("stablelm", 2, {}),
    "gpt2": Family("gpt2", 4, {}, gpt_names=True),
    "gpt_neox": Family("gpt_neox", 4, {}),
    # Attention written out with matmul and softmax.
    "llama-eager": Family("llama", 2, {}, attention="eager"),
    "mistral-sliding-eager": Family("mistral", 2, {"sliding_window": 40}, attention="eager"),
    "gptj": Family("gptj", 4, {"rotary_dim": 8}, gpt_names=True, attention="eager", interface=False),
    "opt": Family("opt", 4, {"ffn_dim": 96, "word_embed_proj_dim": 64}),
}


def build(name: str, *, layers: int = 2, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a small random model in evaluation mode, its weights spread enough for attention to be uneven."""
    family = FAMILIES[name]
    sizes: dict[str, Any]
    if family.gpt_names:
        sizes = {"n_embd": 64, "n_layer": layers, "n_head": 4, "n_positions": 512}
    else:
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": family.num_kv_heads,
            "max_position_embeddings": 512,
        }
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    settings = {**special, **sizes, **family.extra, **overrides}
    config = AutoConfig.for_model(family.model_type, vocab_size=VOCAB, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=family.attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)
    return model


class PlainDecoder(nn.Module):
    """A decoder from nobody's library: keys and values are plain attributes, positions are learned, one file."""

    def __init__(self, layers: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 64, length: int = 512) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.tokens = nn.Embedding(VOCAB, dim)
        self.places = nn.Embedding(length, dim)
        self.queries = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers))
        self.pairs = nn.ModuleList(nn.Linear(dim, 2 * kv_heads * self.head_dim, bias=False) for _ in range(layers))
        self.mixers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.key_caches: list[Tensor | None] = [None] * layers
        self.value_caches: list[Tensor | None] = [None] * layers

    def reset(self) -> None:
        """Start a new conversation."""
        self.key_caches = [None] * len(self.key_caches)
        self.value_caches = [None] * len(self.value_caches)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits ``[B, T, vocabulary]`` of the new tokens ``ids [B, T]``."""
        batch, new = ids.shape
        first = self.key_caches[0]
        seen = 0 if first is None else first.shape[2]
        hidden = self.tokens(ids) + self.places(torch.arange(seen, seen + new))
        visible = torch.arange(seen + new) <= torch.arange(seen, seen + new)[:, None]
        for i, (query, pair, mixer) in enumerate(zip(self.queries, self.pairs, self.mixers, strict=True)):
            q = query(hidden).view(batch, new, self.heads, self.head_dim).transpose(1, 2)
            k, v = pair(hidden).view(batch, new, 2 * self.kv_heads, self.head_dim).transpose(1, 2).chunk(2, dim=1)
            past_k, past_v = self.key_caches[i], self.value_caches[i]
            k = k if past_k is None else torch.cat([past_k, k], dim=2)
            v = v if past_v is None else torch.cat([past_v, v], dim=2)
            self.key_caches[i], self.value_caches[i] = k, v
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
            hidden = hidden + mixer(out.transpose(1, 2).reshape(batch, new, -1))
        return F.linear(hidden, self.tokens.weight)


def greedy(step: Callable[[Tensor], Tensor], ids: Tensor, count: int) -> Tensor:
    """Decode ``count`` tokens greedily with a stateful ``step``; return them, ``[B, count]``."""
    found: list[Tensor] = []
    with torch.no_grad():
        for _ in range(count):
            ids = step(ids)[:, -1].argmax(-1, keepdim=True)
            found.append(ids)
    return torch.cat(found, dim=1)
