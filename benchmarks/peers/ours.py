"""This backend and the full cache, in this process, asked the same things as the peers' worker."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import adakv_compile
from adakv_compile.backend import adakv
from benchmarks.peers import worker

__all__ = ["Ours"]

_KINDS: Final = ("dynamic", "snapkv", "ada-snapkv")


@dataclass
class Ours:
    """Models of one configuration; like the worker, it has one cache at a time.

    Attributes:
        checkpoint: Hugging Face folder of the model.
        options: Options of the backend besides method and budget.
    """

    checkpoint: Path
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        self._models: dict[str, Any] = {}
        self._cache: Any = None
        self._run: Callable[..., Any] = self._none_open
        self._next = 0

    def reset(self) -> None:
        """Forget all compiled models; Dynamo gives up on code that it has compiled for eight of them."""
        self._models, self._cache, self._run = {}, None, self._none_open
        gc.collect()
        torch.compiler.reset()

    @torch.no_grad()
    def open(self, prompt: Sequence[int], way: Mapping[str, Any], watch: bool = False) -> dict[str, Any]:
        """Read a prompt with a new cache.

        Args:
            prompt: Its tokens.
            way: ``kind`` (``"dynamic"``, ``"snapkv"`` or ``"ada-snapkv"``), ``budget``, ``window`` and ``kernel``.
            watch: Find out what is kept.

        Returns:
            The positions that every head of every layer kept (None for the full cache, or without ``watch``), the
            seconds, and the bytes.

        Raises:
            RuntimeError: A layer was left uncompressed.
        """
        self._cache = None
        self._run = self._model(way)
        begin = time.perf_counter()
        out = self._run(torch.tensor([prompt]), past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - begin
        self._cache, self._next = out.past_key_values, int(out.logits[0, -1].argmax())
        kept = _kept(self._cache) if watch and way["kind"] != "dynamic" else None
        return {"kept": kept, "seconds": seconds, **self.held()}

    def held(self) -> dict[str, Any]:
        """Return the bytes of the cache, and those of positions and offsets."""
        stats = adakv_compile.cache_stats(self._cache)
        views = [layer.keys for layer in self._cache.layers]
        index = sum(view.store.bookkeeping_bytes for view in views if isinstance(view, adakv_compile.CompressedKV))
        return {"cache_bytes": stats.bytes_held - index, "index_bytes": index}

    def feed(self, tokens: Sequence[int]) -> dict[str, Any]:
        """Append given tokens one by one, each behind whatever was chosen before."""
        for token in tokens:
            self._step(token)
        return {}

    def decode(self, count: int) -> dict[str, Any]:
        """Append ``count`` greedy tokens; return them and the seconds of every step. The first is known already."""
        tokens: list[int] = []
        seconds: list[float] = []
        for _ in range(count):
            tokens.append(self._next)
            begin = time.perf_counter()
            self._step(self._next)
            seconds.append(time.perf_counter() - begin)
        return {"tokens": tokens, "seconds": seconds, **self.held()}

    def peak(self, prompt: Sequence[int], way: Mapping[str, Any], count: int) -> dict[str, Any]:
        """Return the most bytes that PyTorch had allocated at once while reading a prompt and decoding."""
        self.open(prompt, way)  # compiles
        self.decode(2)
        self._cache = None
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.open(prompt, way)
            self.decode(count)
        return {"peak_bytes": worker.peak_of(profile)}

    @torch.no_grad()
    def _step(self, token: int) -> None:
        out = self._run(torch.tensor([[token]]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._next = out.past_key_values, int(out.logits[0, -1].argmax())

    def _model(self, way: Mapping[str, Any]) -> Any:
        name = repr(sorted(way.items()))
        if name not in self._models:
            if way["kind"] not in _KINDS:
                raise ValueError(f"no kind {way['kind']!r}; there are {', '.join(_KINDS)}")
            network: Any = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32).eval()
            if way["kind"] != "dynamic":
                own = {"method": way["kind"], "budget": way["budget"], "window": way["window"]}
                own |= {"kernel_size": way["kernel"]}
                network.compile(backend=adakv, options={**self.options, **own}, dynamic=True)
            self._models[name] = network
        return self._models[name]

    @staticmethod
    def _none_open(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no prompt was read yet")


def _kept(cache: Any) -> list[list[list[int]]]:
    layers: list[list[list[int]]] = []
    for layer in cache.layers:
        if not isinstance(layer.keys, adakv_compile.CompressedKV):
            raise RuntimeError("a layer was left uncompressed; run `adakv explain` to see why")
        heads = layer.keys.store.offsets.shape[1] - 1
        layers.append([layer.keys.positions(0, head).tolist() for head in range(heads)])
    return layers
