"""A random-weight model of Llama-3.1-8B's shape, twins that share its weights, full caches without a prefill."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import Attention, shapes
from benchmarks.models import twin

__all__ = ["build", "dynamic_cache", "static_cache", "twin", "weight_bytes"]


def build(run: Run) -> Any:
    """Return the model, made on the device in its dtype: nothing is read from a disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    attention = shapes(run.smoke)
    config = LlamaConfig(
        vocab_size=256 if run.smoke else 128_256,
        hidden_size=attention.query_heads * attention.dim,
        intermediate_size=96 if run.smoke else 14_336,
        num_hidden_layers=attention.layers,
        num_attention_heads=attention.query_heads,
        num_key_value_heads=attention.kv_heads,
        max_position_embeddings=2 * max(attention.contexts),
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(run.dtype)
    try:
        with run.device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def static_cache(run: Run, model: Any, attention: Attention, batch: int, context: int, room: int) -> Any:
    """Return a full cache of random entries at fixed addresses: a decode step's time does not depend on their values.

    Args:
        run: The part.
        model: For its configuration.
        attention: Its shapes.
        batch: Rows.
        context: Entries of each head.
        room: Entries to leave room for.
    """
    from transformers import StaticCache

    cache: Any = StaticCache(config=model.config, max_cache_len=context + room)
    cache.early_initialization(batch, attention.kv_heads, attention.dim, run.dtype, run.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    return cache


def dynamic_cache(run: Run, model: Any, attention: Attention, batch: int, context: int) -> Any:
    """Return a full cache of random entries that grows by copying, as transformers makes it by default."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    shape = (batch, attention.kv_heads, context, attention.dim)
    for layer in range(attention.layers):
        cache.update(*(torch.randn(shape, dtype=run.dtype, device=run.device) for _ in range(2)), layer)
    return cache


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes that a decode step reads of the weights: all but the embeddings, of which it needs a row."""
    embedding = model.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
    total = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return total - embedding.numel() * embedding.element_size()
