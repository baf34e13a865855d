"""The op dialect that rewritten graphs call; importing this package registers all of it.

One folder per op: ``op.py`` is the contract (schema, fake kernel, table), ``reference.py`` the implementation in plain
PyTorch, which runs on any device and is what faster kernels are tested against.
"""

from __future__ import annotations

from adakv_compile.kernels import compact, decode_attention, extend, observe, select

__all__ = ["compact", "decode_attention", "extend", "observe", "select"]
