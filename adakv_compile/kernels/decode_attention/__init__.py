"""The op ``adakv::decode_attention_v2``: contract in ``op``, plain PyTorch in ``reference``."""

from __future__ import annotations

from adakv_compile.kernels.decode_attention.op import CURSOR_SIZE, SPEC

__all__ = ["CURSOR_SIZE", "SPEC"]
