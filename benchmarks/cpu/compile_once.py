"""Compile one decoder in this process, a prompt's graph and a step's: ``python -m benchmarks.cpu.compile_once``.

Prints seconds as one line of JSON: of the first call with a prompt and with a token, and of the stages.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from typing import Any

import torch

from benchmarks.cpu.decoders import SMALL, TINY, build, compiled

__all__ = ["main"]


class _Stages(logging.Handler):
    """Adds up what the pipeline says that its stages took."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seconds: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "%s took %.3f s" and isinstance(record.args, tuple):
            stage, seconds = record.args
            self.seconds[str(stage)] = self.seconds.get(str(stage), 0.0) + float(str(seconds))


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=("adakv", "inductor"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    stages = _Stages()
    log = logging.getLogger("adakv_compile.pipeline")
    log.addHandler(stages)
    log.setLevel(logging.DEBUG)
    # What the first compilation of a process does once, whatever it compiles.
    torch.compile(torch.sin, dynamic=True)(torch.ones(100))
    model = build(dataclasses.replace(TINY if given.smoke else SMALL, layers=given.layers))
    options: dict[str, Any] = {"budget": 48 if given.smoke else 512} if given.backend == "adakv" else {}
    call = compiled(model, given.backend, **options)
    with torch.no_grad():
        begin = time.perf_counter()
        cache = call(torch.ones(1, 256, dtype=torch.long), use_cache=True).past_key_values
        middle = time.perf_counter()
        call(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        end = time.perf_counter()
    seconds = {"prompt": middle - begin, "step": end - middle, "both": end - begin, "stages": stages.seconds}
    sys.stdout.write(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main()
