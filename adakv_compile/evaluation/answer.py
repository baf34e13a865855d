"""One measured answer: a prompt read and compressed, then greedy decoding, one sequence at a time."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adakv_compile import _torch
from adakv_compile.evaluation.errors import EvaluationError
from adakv_compile.evaluation.prompts import Prompt
from adakv_compile.runtime.stats import CacheStats, cache_stats

__all__ = ["Answer", "Answerer", "positions_of"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated, and what it took.

    Attributes:
        tokens: Generated token ids, without the one that ended the answer.
        heads: Entries that every head of every layer kept of what was compressed.
        kept: Entries of all heads after the compression.
        dense: Entries of all heads that a full cache has then.
        held: Entries of all heads at the end.
        expected: Entries of all heads at the end if nothing was evicted again.
        bytes_held: Bytes of the cache after the compression.
        bytes_dense: Bytes of a full one.
        peak_bytes: Most bytes allocated on the device while answering, the weights included; None on a CPU.
        compressed: Whether a layer's cache was compressed at all.
        prefill_seconds: Seconds of the call that reads what is compressed, compilation apart.
        step_seconds: Mean seconds of a call with one token, compilation apart; None if there was none.
        compiling_seconds: Seconds of compilation.
    """

    tokens: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    kept: int
    dense: int
    held: int
    expected: int
    bytes_held: int
    bytes_dense: int
    peak_bytes: int | None
    compressed: bool
    prefill_seconds: float
    step_seconds: float | None
    compiling_seconds: float


def positions_of(model: Any) -> int | None:
    """Return the longest text that a model of transformers takes, in tokens; None if its configuration tells none."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


class _Watch:
    """Seconds between laps, those of compilation apart."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.compiling = 0.0
        self._mark = self._now()

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), _torch.seconds_compiling()

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        (before, compiled_before), (now, compiled) = self._mark, self._now()
        self._mark = now, compiled
        self.compiling += compiled - compiled_before
        return max(0.0, now - before - (compiled - compiled_before))


class Answerer:
    """Answers prompts with a model as it is compiled at the time.

    Args:
        model: A causal language model of transformers in evaluation mode.
        tokenizer: Its tokenizer.
        device: Where it runs.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._device = device
        self._positions = positions_of(model)
        self._ends = _ends(model, tokenizer)
        # Logits of a long prompt take more memory than its cache.
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._how: dict[str, Any] = {"use_cache": True, **({"logits_to_keep": 1} if last_only else {})}

    @torch.no_grad()
    def answer(self, prompt: Prompt, most: int, stop: Sequence[str] = ()) -> Answer:
        """Read a prompt and answer it greedily.

        What is compressed is read in one call. A question after it is read token by token: read at once it would be
        a further turn, which the backend compresses by the question's own queries. So the cache grows by the question.

        Args:
            prompt: The prompt.
            most: Most tokens to generate.
            stop: Texts whose last token ends the answer, too; with any, the first token is never an ending one.

        Returns:
            The answer.

        Raises:
            EvaluationError: The prompt is empty, or longer than the model with its answer.
        """
        if not prompt.compressed:
            raise EvaluationError("there is nothing to read before the question: the prompt is empty")
        if self._positions is not None and prompt.tokens + most > self._positions:
            raise EvaluationError(
                f"the prompt has {prompt.tokens:,} tokens and the answer up to {most:,}, but the model has "
                f"{self._positions:,} positions"
            )
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        ends = self._ends | {last for text in stop if (last := self._last_token(text)) is not None}
        watch = _Watch(self._device)
        logits, cache = self._call(prompt.compressed, None)
        prefill = watch.lap()
        after = cache_stats(cache)
        reading = watch.compiling
        watch.lap()
        watch.compiling = reading
        steps = 0
        for token in prompt.question:
            logits, cache = self._call((token,), cache)
            steps += 1
        tokens: list[int] = []
        while True:
            if stop and not tokens:
                logits[list(ends)] = float("-inf")
            tokens.append(int(logits.argmax()))
            if tokens[-1] in ends or len(tokens) == most:
                break
            logits, cache = self._call((tokens[-1],), cache)
            steps += 1
        decoding = watch.lap()
        if tokens[-1] in ends:
            tokens.pop()
        return Answer(
            tokens=tuple(tokens),
            heads=tuple(tuple(layer.head_lengths[0].tolist()) for layer in after.layers),
            kept=_entries(after),
            dense=sum(layer.head_lengths.shape[1] * layer.logical_length for layer in after.layers),
            held=_entries(cache_stats(cache)),
            expected=_entries(after) + steps * sum(layer.head_lengths.shape[1] for layer in after.layers),
            bytes_held=after.bytes_held,
            bytes_dense=after.bytes_dense,
            peak_bytes=torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
            compressed=any(layer.compressed for layer in after.layers),
            prefill_seconds=prefill,
            step_seconds=decoding / steps if steps else None,
            compiling_seconds=watch.compiling,
        )

    def _call(self, ids: Sequence[int], cache: Any) -> tuple[torch.Tensor, Any]:
        """Return the logits ``[V]`` of the next token, and the cache."""
        given = {} if cache is None else {"past_key_values": cache}
        out = self._model(input_ids=torch.tensor([ids], device=self._device), **given, **self._how)
        return out.logits[0, -1], out.past_key_values

    def _last_token(self, text: str) -> int | None:
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids[-1] if ids else None


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: those of the generation configuration and the tokenizer's own."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = given if isinstance(given, (list, tuple)) else [given]
    return frozenset(token for token in (*ends, tokenizer.eos_token_id) if isinstance(token, int))


def _entries(stats: CacheStats) -> int:
    return sum(int(layer.head_lengths.sum()) for layer in stats.layers)
