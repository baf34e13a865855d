"""The peers, in their own environment: requests come as lines of JSON on standard input, answers go to standard output.

Run as a file, with nothing of this project to import. One cache lives at a time: ``open`` reads a prompt and evicts,
``feed`` appends given tokens one by one, ``decode`` appends the model's own.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

__all__ = ["Peer", "main", "peak_of"]

_PACKAGES: Final = ("torch", "transformers", "kvpress", "optimum-quanto")


class Peer:
    """A decoder under the presses of kvpress and the caches of transformers."""

    def __init__(self) -> None:
        self.model: Any = None
        self.cache: Any = None
        self.next = 0
        self.position = 0

    def hello(self) -> dict[str, Any]:
        """Return the versions of what computes here."""
        found: dict[str, str] = {"python": sys.version.split()[0]}
        for package in importlib.metadata.distributions():
            name = package.metadata["Name"]
            if name in _PACKAGES:
                found[name] = package.version
        return {"versions": found}

    def load(self, model: str, threads: int) -> dict[str, Any]:
        """Load a Hugging Face folder.

        Args:
            model: The folder.
            threads: Threads that PyTorch may use.
        """
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        return {"parameters": sum(parameter.numel() for parameter in self.model.parameters())}

    def open(self, prompt: Sequence[int], way: Mapping[str, Any], watch: bool = False) -> dict[str, Any]:
        """Read a prompt with a new cache.

        Args:
            prompt: Its tokens.
            way: ``kind`` (``"dynamic"``, ``"quantized"``, ``"snapkv"`` or ``"adakv"``) and what that kind takes.
            watch: Find out what is kept, which takes time and memory of its own: not where these are measured.

        Returns:
            The positions that every head of every layer kept (None where nothing is evicted, or without ``watch``), the
            seconds, and the bytes.
        """
        self.cache = QuantizedCache("quanto", self.model.config) if way["kind"] == "quantized" else DynamicCache()
        ids = torch.tensor([prompt])
        kept: list[list[list[int]]] | None = None
        begin = time.perf_counter()
        if way["kind"] in ("dynamic", "quantized"):
            logits = self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits
            seconds = time.perf_counter() - begin
        else:
            press, seen = self._press(way, len(prompt), watch)
            with press(self.model):
                logits = self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits
            seconds = time.perf_counter() - begin
            kept = self._kept(way["kind"], seen, len(prompt)) if watch else None
        self.next, self.position = int(logits[0, -1].argmax()), len(prompt)
        return {"kept": kept, "seconds": seconds, **self.held()}

    def held(self) -> dict[str, Any]:
        """Return the bytes of the cache, and those of what tells masked entries from others."""
        layers = [getattr(layer.self_attn, "masked_key_indices", None) or () for layer in self.model.model.layers]
        return {
            "cache_bytes": sum(_bytes(vars(layer)) for layer in self.cache.layers),
            "index_bytes": sum(_bytes(list(indices)) for indices in layers),
        }

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
            tokens.append(self.next)
            begin = time.perf_counter()
            self._step(self.next)
            seconds.append(time.perf_counter() - begin)
        return {"tokens": tokens, "seconds": seconds, **self.held()}

    def peak(self, prompt: Sequence[int], way: Mapping[str, Any], count: int) -> dict[str, Any]:
        """Return the most bytes that PyTorch had allocated at once while reading a prompt and decoding."""
        self.cache = None
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.open(prompt, way)
            self.decode(count)
        return {
            "peak_bytes": peak_of(profile),
            "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        }

    @torch.no_grad()
    def _step(self, token: int) -> None:
        # A shrunken cache no longer says where the text is: kvpress's own pipeline gives the position, too.
        out = self.model(
            torch.tensor([[token]]),
            past_key_values=self.cache,
            position_ids=torch.tensor([[self.position]]),
            logits_to_keep=1,
        )
        self.next, self.position = int(out.logits[0, -1].argmax()), self.position + 1

    def _press(self, way: Mapping[str, Any], length: int, watch: bool) -> tuple[Any, list[Tensor]]:
        """Return a press that keeps ``budget`` entries per head, and what it will have kept if it prunes.

        Only with ``watch``: else the press is exactly that of kvpress.
        """
        seen: list[Tensor] = []
        presses: Any = importlib.import_module("kvpress")
        inner = presses.SnapKVPress

        class Watched(inner):
            """The press itself; only what it returns is looked at."""

            def compress(self, module: nn.Module, hidden: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
                pruned: tuple[Tensor, Tensor] = super().compress(module, hidden, keys, *rest)
                seen.append(_rows(pruned[0], keys))
                return pruned

        # Half an entry more: the press rounds length * (1 - ratio) down.
        ratio = 1 - (way["budget"] + 0.5) / length
        kind = Watched if watch else inner
        snapkv = kind(compression_ratio=ratio, window_size=way["window"], kernel_size=way["kernel"])
        if way["kind"] == "snapkv":
            return snapkv, seen
        return presses.AdaKVPress(snapkv, **{k: way[k] for k in ("alpha_safeguard",) if k in way}), seen

    def _kept(self, kind: str, seen: Sequence[Tensor], length: int) -> list[list[list[int]]]:
        if kind == "snapkv":
            return [positions.sort(-1).values.tolist() for positions in seen]
        heads = self.model.config.num_key_value_heads
        kept: list[list[list[int]]] = []
        for layer in self.model.model.layers:
            keep = torch.ones(1, heads, length, dtype=torch.bool)
            if layer.self_attn.masked_key_indices is not None:
                keep[layer.self_attn.masked_key_indices] = False
            kept.append([head.nonzero().flatten().tolist() for head in keep[0]])
        return kept


def _rows(pruned: Tensor, keys: Tensor) -> Tensor:
    """Return ``[H, n]``: where every pruned key stood. Rotated keys of different positions are never equal."""
    same = (pruned[0, :, :, None] == keys[0, :, None]).all(-1)
    return same.to(torch.int8).argmax(-1)


def _bytes(obj: Any) -> int:
    """Return the bytes of all tensors in a nest of containers, those inside quantised tensors included."""
    if isinstance(obj, Tensor):
        flatten = getattr(obj, "__tensor_flatten__", None)
        if flatten is not None:
            names: Sequence[str] = flatten()[0]
            return sum(_bytes(getattr(obj, name)) for name in names)
        return obj.untyped_storage().nbytes()
    if isinstance(obj, Mapping):
        return sum(_bytes(value) for value in obj.values())
    return sum(_bytes(value) for value in obj) if isinstance(obj, (list, tuple)) else 0


def peak_of(profile: Any) -> int:
    """Return the highest sum of the allocations and releases of a profile, in order of time."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    """Answer requests until the input ends."""
    # Libraries that print would break the protocol: what they print goes to the standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = Peer()
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        do: Callable[..., dict[str, Any]] = getattr(peer, request.pop("do"))
        try:
            with torch.no_grad():
                answer = do(**request)
        except Exception as error:  # noqa: BLE001  # the other side records it and goes on
            answer = {"error": f"{type(error).__name__}: {error}"[:600]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
