"""Compilation of one kernel for one architecture on a machine without a GPU, and what the code looks like.

Needs a process in which Triton was imported with ``TRITON_INTERPRET`` unset: interpreted functions can't be compiled.
"""
# Triton's compiler has no types.
# pyright: basic, reportCallIssue=false

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError

from benchmarks.aot.kernel import ARCHITECTURES, Kernel

__all__ = ["Report", "compile_for"]

MAX_REGISTERS: Final = 255
TENSOR_CORES: Final = {"mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What became of one kernel on one architecture.

    Attributes:
        registers: Of a thread.
        spilled: Bytes of a thread's registers that are stored to and loaded from memory.
        stack: Bytes of a thread's stack.
        shared: Bytes of shared memory of a program.
        tensor_cores: Kinds of tensor-core instructions in the code.
        seconds: Spent on the compilation.
        broken: The rules that the code breaks, in words.
    """

    registers: int
    spilled: int
    stack: int
    shared: int
    tensor_cores: tuple[str, ...]
    seconds: float
    broken: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def compile_for(kernel: Kernel, capability: tuple[int, int]) -> Report:
    """Compile a kernel and check what came out against the rules."""
    start = time.perf_counter()
    try:
        compiled = _compile(kernel, capability)
    except (CompilationError, RuntimeError) as error:
        *_, reason = str(error).strip().splitlines() or [type(error).__name__]
        return Report(0, 0, 0, 0, (), time.perf_counter() - start, (f"does not compile: {reason}",))
    registers, stack = _usage(compiled.asm["cubin"])
    # Spilled registers live on the stack: without one there is nothing to ask the assembler again.
    spilled = _spilled(compiled.asm["ptx"]) if stack else 0
    found = tuple(name for name, pattern in TENSOR_CORES.items() if re.search(pattern, compiled.asm["ptx"]))
    shared, limit = compiled.metadata.shared, ARCHITECTURES[capability]
    broken: list[str] = []
    if registers > MAX_REGISTERS:
        broken.append(f"{registers} registers, above {MAX_REGISTERS}")
    if spilled:
        broken.append(f"{spilled} bytes of registers spilled")
    if shared > limit:
        broken.append(f"{shared} bytes of shared memory, above {limit}")
    if kernel.tensor_cores and not found:
        broken.append("no tensor-core instruction")
    return Report(registers, spilled, stack, shared, found, time.perf_counter() - start, tuple(broken))


def _compile(kernel: Kernel, capability: tuple[int, int]) -> Any:
    names = kernel.function.arg_names
    if missing := [name for name in names if name not in kernel.constants and name not in kernel.types]:
        raise ValueError(f"{kernel.name}: no type or constant for {', '.join(missing)}")
    if unknown := sorted({*kernel.types, *kernel.constants}.difference(names)):
        raise ValueError(f"{kernel.name}: {kernel.function.__name__} has no argument {', '.join(unknown)}")
    # A type may say that the number is a multiple of 16, as in "i32:16"; pointers of PyTorch's allocator always are.
    signature = {
        name: "constexpr" if name in kernel.constants else kernel.types[name].partition(":")[0] for name in names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in kernel.constants and (signature[name].startswith("*") or kernel.types[name].endswith(":16"))
    }
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    if kernel.maxnreg is not None:
        options["maxnreg"] = kernel.maxnreg
    return triton.compile(
        ASTSource(fn=kernel.function, signature=signature, constexprs=kernel.constants, attrs=aligned),
        target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
        options=options,
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of stack of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(
            [_TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    if match is None:
        raise RuntimeError(f"cuobjdump -res-usage shows no registers:\n{shown}")
    return int(match[1]), int(match[2])


def _spilled(ptx: str) -> int:
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None  # PTX without a target can't have been assembled
    shown = ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        # Some versions of Triton have an assembler of their own for the newest architectures.
        for tool in ("ptxas", "ptxas-blackwell"):
            if not (_TOOLS / tool).exists():
                continue
            done = subprocess.run(
                [_TOOLS / tool, "-v", f"--gpu-name={target[1]}", file.name, "-o", "/dev/null"],
                capture_output=True,
                text=True,
                check=False,
            )
            shown = done.stderr
            if done.returncode == 0:
                return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", shown)))
    raise RuntimeError(f"ptxas failed on {target[1]}:\n{shown}")
