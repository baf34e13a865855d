"""What is compiled ahead of time: one kernel with the constants of one row of a tuning table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ARCHITECTURES", "Kernel"]

#: Capability and the shared memory that one program may use there, in bytes.
ARCHITECTURES: dict[tuple[int, int], int] = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (12, 0): 99 * 1024,
}


@dataclass(frozen=True)
class Kernel:
    """One compilation.

    Attributes:
        name: Kernel and what is special about these constants, as in ``"decode bf16 D128"``.
        function: The ``@triton.jit`` function.
        types: Triton's type of every argument that is not a constant, as in ``{"Q": "*bf16", "L": "i32"}``.
        constants: Values of the ``tl.constexpr`` parameters, and None for arguments that are absent.
        num_warps: As launched.
        num_stages: As launched.
        tensor_cores: Whether the code must hold tensor-core instructions.
        maxnreg: As launched; registers of a thread at most. None: the assembler decides.
    """

    name: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict[str, Any])
    num_warps: int = 4
    num_stages: int = 2
    tensor_cores: bool = False
    maxnreg: int | None = None
