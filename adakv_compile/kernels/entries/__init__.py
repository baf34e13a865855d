"""The op ``adakv::entries_v1``: contract in ``op``, plain PyTorch in ``reference``."""

from __future__ import annotations

from adakv_compile.kernels.entries.op import SPEC

__all__ = ["SPEC"]
