"""How the stages of a compilation grow with the layers of a model.

The models are narrow, and the inner compiler is ``eager``: what is timed is this package's own work and Dynamo's, none
of Inductor's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

import adakv_compile
from benchmarks.cpu.decoders import build, many_layers

__all__ = ["LAYERS", "STAGES", "rows"]

LAYERS: Final = (4, 8, 16, 32, 80)
STAGES: Final = ("capture", "analyse", "rewrite")


def rows(layers: Sequence[int] = LAYERS) -> Iterator[dict[str, Any]]:
    """Yield one row for each graph, prompt and decode step, of a decoder with each number of layers.

    A row holds the number of layers, the graph, its nodes, the seconds of each stage and of all three, and those of the
    whole call with both graphs, Dynamo's share included.

    Raises:
        RuntimeError: An attention was not compressed.
    """
    for count in layers:
        model = build(many_layers(count))
        ids = torch.ones(1, 64, dtype=torch.long)
        torch.compiler.reset()
        begin = time.perf_counter()
        report = adakv_compile.explain(model, ids, use_cache=True, options={"budget": 40, "window": 8})
        whole = time.perf_counter() - begin
        for name, graph in zip(("prompt", "decode"), report.graphs, strict=True):
            if not all(site.compressed for site in graph.sites) or len(graph.sites) != count:
                raise RuntimeError(f"{count} layers: not every attention is compressed\n{report}")
            stages = {stage: graph.seconds[stage] for stage in STAGES}
            total = sum(stages.values())
            yield {"layers": count, "graph": name, "nodes": graph.nodes, **stages, "total": total, "call": whole}
