"""Measured answers: prompts read and compressed, then greedy decoding, one sequence or several at a time."""

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
from adakv_compile.evaluation.rows import Rows
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
        bytes_held: Bytes of the cache after the compression; its share of the batch's.
        bytes_dense: Bytes of a full one, without padding.
        peak_bytes: Most bytes allocated on the device while the batch was answered, the weights included; None on a
            CPU.
        compressed: Whether a layer's cache was compressed at all.
        prefill_seconds: Seconds of the call that reads what is compressed, of the whole batch, compilation apart.
        step_seconds: Mean seconds of a call with one token of every row, compilation apart; None if there was none.
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
        given = inspect.signature(model.forward).parameters
        # Logits of a long prompt take more memory than its cache.
        self._how: dict[str, Any] = {"use_cache": True, **({"logits_to_keep": 1} if "logits_to_keep" in given else {})}
        self._takes_positions = "position_ids" in given

    def check(self, prompt: Prompt, most: int) -> None:
        """Check that a prompt can be answered.

        Args:
            prompt: The prompt.
            most: Most tokens to generate.

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

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt], most: int, stop: Sequence[str] = ()) -> list[Answer]:
        """Read prompts and answer them greedily, each as if it were alone.

        What is compressed is read in one call. A question after it is read token by token: read at once it would be
        a further turn, which the backend compresses by the question's own queries. So the cache grows by the question.
        Shorter prompts and shorter questions are padded on the left and the padding is masked out.

        Args:
            prompts: The prompts, all checked; at least one.
            most: Most tokens to generate.
            stop: Texts whose last token ends the answer, too; with any, the first token is never an ending one.

        Returns:
            The answers, in order.
        """
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        ends = self._ends | {last for text in stop if (last := self._last_token(text)) is not None}
        watch = _Watch(self._device)
        rows = Rows(prompts, next(iter(sorted(ends)), 0), self._device)
        logits, cache = self._call(*rows.compressed(), None)
        prefill = watch.lap()
        after = cache_stats(cache)
        reading = watch.compiling
        watch.lap()
        watch.compiling = reading
        steps = 0
        for column in range(rows.longest_question):
            logits, cache = self._call(*rows.question(column), cache)
            steps += 1
        answers: list[list[int]] = [[] for _ in prompts]
        while True:
            if stop and not answers[0]:
                logits[:, list(ends)] = float("-inf")
            chosen = logits.argmax(-1).tolist()
            for told, token in zip(answers, chosen, strict=True):
                if not _is_over(told, ends, most):
                    told.append(token)
            if all(_is_over(told, ends, most) for told in answers):
                break
            logits, cache = self._call(*rows.told(chosen), cache)
            steps += 1
        decoding = watch.lap()
        at_end = cache_stats(cache)
        shared: dict[str, Any] = {
            "peak_bytes": torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
            "compressed": any(layer.compressed for layer in after.layers),
            "prefill_seconds": prefill,
            "step_seconds": decoding / steps if steps else None,
            "compiling_seconds": watch.compiling,
        }
        return [
            Answer(
                tokens=tuple(told[:-1] if told[-1] in ends else told),
                expected=_entries(after, row) + steps * sum(layer.head_lengths.shape[1] for layer in after.layers),
                held=_entries(at_end, row),
                **_after_compression(after, row, len(prompt.compressed), rows.padded_length),
                **shared,
            )
            for row, (prompt, told) in enumerate(zip(prompts, answers, strict=True))
        ]

    def _call(self, ids: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> tuple[torch.Tensor, Any]:
        """Return the logits ``[B, V]`` of the next tokens, and the cache.

        Args:
            ids: ``[B, T]``.
            mask: ``[B, L]`` int64, 1 for real tokens, all of them so far; None if all are.
            cache: What the call before returned.
        """
        given: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        if mask is not None:
            given["attention_mask"] = mask
            if self._takes_positions:
                given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self._model(input_ids=ids, **given, **self._how)
        return out.logits[:, -1], out.past_key_values

    def _last_token(self, text: str) -> int | None:
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids[-1] if ids else None


def _is_over(told: Sequence[int], ends: frozenset[int], most: int) -> bool:
    return bool(told) and (told[-1] in ends or len(told) == most)


def _after_compression(stats: CacheStats, row: int, length: int, padded: int) -> dict[str, Any]:
    """Return what a row of a cache holds: a prompt of ``length`` tokens, padded to ``padded``."""
    # The layers of a model with sliding windows may hold fewer tokens than the prompt has.
    tokens = [min(layer.logical_length, length) for layer in stats.layers]
    heads = [
        # Of a dense layer the padding counts as held.
        tuple(layer.head_lengths[row].tolist()) if layer.compressed else (count,) * layer.head_lengths.shape[1]
        for layer, count in zip(stats.layers, tokens, strict=True)
    ]
    batch = stats.layers[0].head_lengths.shape[0]
    return {
        "heads": tuple(heads),
        "kept": sum(map(sum, heads)),
        "dense": sum(len(some) * count for count, some in zip(tokens, heads, strict=True)),
        "bytes_held": stats.bytes_held // batch,
        "bytes_dense": stats.bytes_dense * length // (batch * padded),
    }


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: those of the generation configuration and the tokenizer's own."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = given if isinstance(given, (list, tuple)) else [given]
    return frozenset(token for token in (*ends, tokenizer.eos_token_id) if isinstance(token, int))


def _entries(stats: CacheStats, row: int) -> int:
    return sum(int(layer.head_lengths[row].sum()) for layer in stats.layers)
