"""The op ``adakv::attend_v1``: contract in ``op``, plain PyTorch in ``reference``."""

from __future__ import annotations

from adakv_compile.kernels.attend.op import SPEC

__all__ = ["SPEC"]
