"""What the common sizes don't fit, one line a type: other settings, numbers of layers, ways to build."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["EXCEPTIONS", "LAYERS", "NO_PADDING", "PREFIX"]

#: How many layers, where two don't hold one of each kind.
LAYERS: Final[dict[str, int]] = {
    "gemma3n": 4,
    "gemma3n_text": 4,
    "gemma4": 4,
    "gemma4_text": 4,
    "gemma4_unified": 4,
    "gemma4_unified_text": 4,
    "mllama": 4,
    "nemotron_h": 4,
    "zamba": 4,
    "zamba2": 4,
}

_BOTH: Final[dict[str, Any]] = {"layer_types": ["sliding_attention", "full_attention"]}
_HYBRID: Final[dict[str, Any]] = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA: Final[dict[str, Any]] = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 16}
_DELTA: Final[dict[str, Any]] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_TOWER: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_DECODER: Final[dict[str, Any]] = {"decoder": {"num_codebooks": 1, "pad_token_id": 0}}
_SHARED: Final[dict[str, Any]] = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 16,
}

#: Settings beside or instead of the common ones; ``...`` leaves one to its default.
EXCEPTIONS: Final[dict[str, dict[str, Any]]] = {
    "afmoe": _BOTH,
    "axk1": {"num_key_value_heads": 4},
    "axk2": {"num_key_value_heads": 4},
    "bailing_hybrid": {"num_key_value_heads": 4, **_HYBRID},
    "bamba": {"attn_layer_indices": [1], **_MAMBA},
    "cohere2": _BOTH,
    "cohere2_moe": _BOTH,
    "blt": {
        "encoder_hash_byte_group_vocab": 500,
        "encoder_config": _TOWER,
        "decoder_config": _TOWER,
        "global_config": _TOWER,
        "patcher_config": _TOWER,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cpmant": {"dim_head": 16, "dim_ff": 96},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "deepseek_v32": {"num_key_value_heads": 4},
    "dots3_note": {
        "vision_config": {**_TOWER, "adapter_in_dim": 32, "adapter_out_dim": 64, "mlp_layer_types": ["dense"]},
        "audio_config": {**_TOWER, "adapter_input_size": 32, "adapter_out_dim": 64, "downsample_hidden_size": 32},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "exaone4": _BOTH,
    "exaone_moe": _BOTH,
    "gemma3_text": _BOTH,
    "gemma3n_text": {**_SHARED, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {**_SHARED, "global_head_dim": 16},
    "gemma4_unified_text": {**_SHARED, "global_head_dim": 16},
    "fuyu": {
        "text_config": {
            "model_type": "persimmon",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 97,
            "max_position_embeddings": 512,
        }
    },
    "gemma3": {"vision_config": {"model_type": "siglip_vision_model", **_TOWER}},
    "gemma4": {"vision_config": _TOWER, "audio_config": _TOWER},
    "gemma4_unified": {"vision_config": _TOWER, "audio_config": _TOWER},
    "git": {"vision_config": _TOWER},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 24},
    "got_ocr2": {
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 97,
            "max_position_embeddings": 512,
        },
        "vision_config": {**_TOWER, "image_size": 64, "mlp_dim": 64, "output_channels": 16},
    },
    "granitemoehybrid": {**_HYBRID, **_MAMBA},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_key_value_heads": 4, "linear_head_dim": 16, "linear_num_heads": 4, **_HYBRID},
    "kolibri1": _BOTH,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_key_value_heads": 4},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"num_key_value_heads": 4},
    "moss_transcribe_diarize": {
        "audio_config": _TOWER,
        "text_config": {
            "model_type": "qwen3",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 97,
            "max_position_embeddings": 512,
        },
    },
    "musicgen": _DECODER,
    "musicgen_melody": _DECODER,
    "mpt": {"use_cache": True},
    "olmo3": _BOTH,
    "qwen3_5_moe_text": {**_HYBRID, **_DELTA},
    "qwen3_5_text": {**_HYBRID, **_DELTA},
    "qwen3_next": {**_HYBRID, **_DELTA},
    "phi4_multimodal": {
        "vision_config": {**_TOWER, "image_size": 28, "crop_size": 28},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
    },
    "qwen4_exp_text": {
        **_HYBRID,
        **_DELTA,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 24},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 64]},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"num_key_value_heads": 4},
    "zamba": {"layer_types": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 4, "chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1},
}

#: Types that take no padding mask, or that compute something else with one.
#: git: its prompt hides the padding, but its steps attend to it.
NO_PADDING: Final = frozenset({"cpmant", "git"})

#: Tokens that a type puts before every prompt by itself.
PREFIX: Final[dict[str, int]] = {"cpmant": 32}
