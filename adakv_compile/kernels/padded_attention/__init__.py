"""The op ``adakv::padded_attention_v1``: contract in ``op``, PyTorch's own attention in ``reference``."""

from __future__ import annotations

from adakv_compile.kernels.padded_attention.op import SPEC

__all__ = ["SPEC"]
