"""The op ``adakv::retain_v1``: contract in ``op``, plain PyTorch in ``reference``."""

from __future__ import annotations

from adakv_compile.kernels.retain.op import SPEC

__all__ = ["SPEC"]
