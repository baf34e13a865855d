"""The op ``adakv::extend_v2``: contract in ``op``, plain PyTorch in ``reference``."""

from __future__ import annotations

from adakv_compile.kernels.extend.op import SPEC

__all__ = ["SPEC"]
