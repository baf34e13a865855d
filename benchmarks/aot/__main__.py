"""``python -m benchmarks.aot``: compile the shipped tuning tables for every architecture and check the code.

Needs no GPU. Exits with 1 if any kernel spills registers, needs more than the architecture has, or lacks the
tensor-core instructions that it should use.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from adakv_compile.kernels._support import interpreting
from benchmarks.aot.kernel import ARCHITECTURES, Kernel
from tests.kernels.checks import OPS

__all__ = ["main"]

HEADERS = ("op", "kernel", "arch", "registers", "spilled", "shared", "tensor cores", "seconds", "breaks")


def _identity(kernel: Kernel, capability: tuple[int, int]) -> tuple[Any, ...]:
    """Return what makes two compilations the same."""
    parts = (kernel.types, kernel.constants)
    named = tuple(tuple(sorted((name, repr(value)) for name, value in part.items())) for part in parts)
    return (capability, id(kernel.function), *named, kernel.num_warps, kernel.num_stages, kernel.maxnreg)


def _rows(ops: list[str], architectures: list[tuple[int, int]]) -> list[dict[str, Any]]:
    # Not before the environment is set: Triton reads it when it is imported.
    from benchmarks.aot.compiler import Report, compile_for

    rows: list[dict[str, Any]] = []
    known: dict[tuple[Any, ...], Report] = {}
    for capability in architectures:
        for op in ops:
            for kernel in import_module(f"benchmarks.aot.{op}").kernels(capability):
                key = _identity(kernel, capability)
                if key in known:
                    continue
                known[key] = report = compile_for(kernel, capability)
                rows.append(
                    {
                        "op": op,
                        "kernel": kernel.name,
                        "arch": f"{capability[0]}.{capability[1]}",
                        "shared_limit": ARCHITECTURES[capability],
                        "wants_tensor_cores": kernel.tensor_cores,
                    }
                    | report.as_dict()
                )
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    shared = f"{row['shared'] / 1024:.1f}/{row['shared_limit'] // 1024} KiB"
    broken = "; ".join(row["broken"])
    numbers = (row["registers"], row["spilled"], shared, "+".join(row["tensor_cores"]), f"{row['seconds']:.1f}")
    return [row["op"], row["kernel"], row["arch"], *map(str, numbers), broken]


def _text(rows: list[dict[str, Any]]) -> str:
    lines = [list(HEADERS), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(map(str.ljust, line, widths)) for line in lines)
    return "\n".join(map(str.rstrip, padded))


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = [list(HEADERS), ["---"] * len(HEADERS), *map(_cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _architecture(text: str) -> tuple[int, int]:
    known = {f"{major}.{minor}": (major, minor) for major, minor in ARCHITECTURES}
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
    return known[text]


def main(arguments: list[str] | None = None) -> int:
    """Compile, print a table, and return the exit status."""
    if interpreting():
        sys.stderr.write("benchmarks.aot: TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it\n")
        return 2
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument("--arch", nargs="+", type=_architecture, default=list(ARCHITECTURES), help="as in 9.0")
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    options = parser.parse_args(arguments)
    # Before version 3.10 the default of this setting warns that it will change.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="adakv-aot-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        rows = _rows(options.op, options.arch)
    import triton

    broken = sum(bool(row["broken"]) for row in rows)
    seconds = time.perf_counter() - start
    summary = f"{len(rows)} kernels, {broken} break a rule; Triton {triton.__version__}; {seconds:.0f} s"
    sys.stdout.write(f"{_text(rows)}\n\n{summary}\n")
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(f"Triton {triton.__version__}\n\n{_markdown(rows)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
