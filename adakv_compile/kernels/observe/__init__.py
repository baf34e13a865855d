"""The op ``adakv::observe_v3``: contract in ``op``, plain PyTorch in ``reference``."""

from __future__ import annotations

from adakv_compile.kernels.observe.op import SPEC

__all__ = ["SPEC"]
