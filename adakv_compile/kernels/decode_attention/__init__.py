"""The op ``adakv::decode_attention_v1``: contract in ``op``, plain PyTorch in ``reference``."""

from __future__ import annotations

from adakv_compile.kernels.decode_attention.op import SPEC

__all__ = ["SPEC"]
