"""How long compiling takes, with and without caches on the disk, stage by stage, and how that grows with the layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.cpu import curve
from benchmarks.cpu.run import PLAIN, Run, at_most
from benchmarks.process import ROOT

__all__ = ["run"]


def run(run: Run) -> None:
    """Compile in processes of their own, in turn, then follow the curve."""
    layers = 1 if run.smoke else 4
    cold: dict[str, list[dict[str, Any]]] = {"adakv": [], "inductor": []}
    warm: dict[str, list[dict[str, Any]]] = {"adakv": [], "inductor": []}
    for number in range(1 if run.smoke else 3):
        if number and not run.has_time(f"round {number + 1} of compilations", 150):
            break
        for backend in ("adakv", "inductor") if number % 2 == 0 else ("inductor", "adakv"):
            with tempfile.TemporaryDirectory() as folder:
                cold[backend].append(_once(run, backend, layers, folder))
                warm[backend].append(_once(run, backend, layers, folder))
    for what, times in (("cold", cold), ("warm", warm)):
        for backend, each in times.items():
            run.figure(f"{what}, {layers} layers, prompt and step: {backend}", "s", [one["both"] for one in each])
        over = [a["both"] / b["both"] for a, b in zip(times["adakv"], times["inductor"], strict=True)]
        target = at_most(1.15 if what == "cold" else 1.2)
        run.figure(f"{what}, {layers} layers: adakv over {PLAIN}", "x", over, PLAIN, target)
        for stage in times["adakv"][0]["stages"]:
            seconds = [one["stages"][stage] for one in times["adakv"]]
            run.figure(f"{what}, {layers} layers, stage {stage}", "s", seconds)
    _curve(run)


def _once(run: Run, backend: str, layers: int, caches: str) -> dict[str, Any]:
    """Compile in a new process whose caches are in a folder."""
    command = [sys.executable, "-m", "benchmarks.cpu.compile_once", backend, "--layers", str(layers)]
    done = subprocess.run(
        [*command, *(["--smoke"] if run.smoke else [])],
        cwd=Path.cwd() if (Path.cwd() / "benchmarks").exists() else ROOT,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches},
        capture_output=True,
        text=True,
        timeout=max(run.left, 0) + 30,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{backend}: exit status {done.returncode}: {done.stderr[-600:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _curve(run: Run) -> None:
    list(curve.rows((2,)))  # what is imported and set up once
    seen: list[dict[str, Any]] = []
    for layers in (2, 3) if run.smoke else curve.LAYERS:
        if not run.has_time(f"curve at {layers} layers", 0 if run.smoke else layers / 2):
            break
        for row in curve.rows((layers,)):
            seen.append(row)
            name = f"{row['graph']} of {layers} layers"
            run.figure(f"{name}: capture, analyse and rewrite", "s", row["total"], nodes=row["nodes"])
            run.figure(f"{name}: a layer", "ms", row["total"] / layers * 1e3)
    for graph in ("prompt", "decode"):
        rows = [row for row in seen if row["graph"] == graph]
        if len(rows) < 2:
            continue
        counts = [row["layers"] for row in rows]
        for stage in (*curve.STAGES, "total"):
            run.series("compile", f"{graph}: {stage}", counts, [[row[stage]] for row in rows])
        a_layer = [row["total"] / row["layers"] for row in rows]
        what = f"{graph}: a layer of {counts[-1]} over one of {counts[0]}"
        run.figure(what, "x", a_layer[-1] / a_layer[0], f"{counts[0]} layers")
