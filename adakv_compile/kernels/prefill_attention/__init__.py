"""The op ``adakv::prefill_attention_v1``: contract in ``op``, the libraries that compute it in ``backends``."""

from __future__ import annotations

from adakv_compile.kernels.prefill_attention.backends import BACKENDS, Request, best_backend
from adakv_compile.kernels.prefill_attention.op import SPEC

__all__ = ["BACKENDS", "SPEC", "Request", "best_backend"]
