"""The op ``adakv::lay_out_v1``: contract in ``op``, plain PyTorch in ``reference``."""

from __future__ import annotations

from adakv_compile.kernels.lay_out.op import SPEC

__all__ = ["SPEC"]
