"""A small configuration for every causal language model type of transformers: common sizes, and exceptions as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.zoo.exceptions import EXCEPTIONS, LAYERS

__all__ = ["CHUNK", "SLIDING", "TYPES", "VOCAB", "small_config"]

VOCAB: Final = 97
#: Longer than the small budget, shorter than the prompts.
SLIDING: Final = 24

#: Chunks of attention within them: longer than the small budget, shorter than the prompts.
CHUNK: Final = 32

#: Every type in the mapping, in alphabetical order.
TYPES: Final = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

#: What a size is called, in any decoder; set where a type's configuration has a field of the name. No size lies where
#: the lengths of the prompts are.
SIZES: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "lru_width"], 64),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim"], 96),
    **dict.fromkeys(["intermediate_size_mlp", "d_inner", "dense_intermediate_size"], 96),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "v_head_dim", "qk_nope_head_dim", "q_lora_rank", "kv_lora_rank"], 16),
    **dict.fromkeys(["rotary_dim", "qk_rope_head_dim"], 8),
    "qk_head_dim": 24,
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 512),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    "num_experts_per_tok": 2,
    **dict.fromkeys(["n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"], 1),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
#: Names of the number of layers.
_DEPTHS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")


def small_config(model_type: str) -> PretrainedConfig:
    """Return a small configuration of a type.

    Raises:
        Exception: Whatever the type's configuration raises about sizes that don't go together.
    """
    settings = _settings(CONFIG_MAPPING[model_type], LAYERS.get(model_type, 2), EXCEPTIONS.get(model_type, {}))
    config = AutoConfig.for_model(model_type, **settings)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _settings(config: type[PretrainedConfig], layers: int, exceptions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for a small configuration of a class, those of configurations inside it included."""
    fields = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    sizes = {**SIZES, **dict.fromkeys(_DEPTHS, layers)}
    settings = {name: value for name, value in sizes.items() if name in fields}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    windows = {"sliding_window": SLIDING, "attention_chunk_size": CHUNK}
    settings |= {name: window for name, window in windows.items() if isinstance(defaults.get(name), int)}
    if "kv_lora_rank" in fields and "head_dim" in fields:
        # In multi-head latent attention this is the part of a head that is rotated.
        settings["head_dim"] = sizes["qk_rope_head_dim"]
    for inside, inner in config.sub_configs.items():
        if inner is not AutoConfig and inside.startswith(("text", "decoder", "attn", "ffn")):
            settings[inside] = _settings(inner, layers, EXCEPTIONS.get(inner.model_type, {}))
    return _merged(settings, exceptions)


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``settings`` with ``changes``, dictionaries merged; a change to ``...`` removes a setting."""
    merged = dict(settings)
    for name, value in changes.items():
        old = merged.get(name)
        if value is ...:
            merged.pop(name, None)
        else:
            merged[name] = _merged(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return merged
