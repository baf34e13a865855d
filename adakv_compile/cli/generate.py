"""One measured generation: chunks of the prompt, tokens as they come, times with compilation apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TextStreamer

from adakv_compile import _torch
from adakv_compile.cli.errors import CommandError
from adakv_compile.cli.loading import Loaded
from adakv_compile.runtime.stats import CacheStats, cache_stats

__all__ = ["Run", "Settings", "agreement", "generate"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to generate.

    Attributes:
        max_new_tokens: Most tokens to generate.
        temperature: 0 for greedy decoding, else the temperature of sampling.
        seed: Seed of sampling.
        chunk: Longest part of a prompt in tokens that the model is given at once; 0 for no limit.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """What one generation gave, and what it took.

    Attributes:
        label: Kind of cache.
        tokens: Generated token ids.
        text: The same, decoded.
        chunks: Calls that read the prompt.
        first_token: Seconds from the call to the first token, compilation apart.
        per_token: Median seconds of a further token, compilation apart; None if there was none.
        compiling: Seconds of compilation.
        stats: What the cache held at the end.
    """

    label: str
    tokens: tuple[int, ...]
    text: str
    chunks: int
    first_token: float
    per_token: float | None
    compiling: float
    stats: CacheStats


@dataclass
class _Clock:
    """Times of events, with the seconds spent compiling until then."""

    marks: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])

    def mark(self) -> None:
        self.marks.append((time.perf_counter(), _torch.seconds_compiling()))

    def compiling(self) -> float:
        return self.marks[-1][1] - self.marks[0][1]

    def steps(self) -> list[float]:
        """Return the seconds between consecutive marks without those of compilation."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [(later - sooner) - (after - before) for (sooner, before), (later, after) in pairs]


class _Streamer(TextStreamer):
    """Hands text on as it becomes whole words, and marks the time of every token."""

    def __init__(self, tokenizer: Any, clock: _Clock, write: Callable[[str], None], begin: Callable[[], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._clock, self._write, self._begin = clock, write, begin

    def put(self, value: torch.Tensor) -> None:
        # The first value is the prompt; tokens are on the CPU already, so the device has finished them.
        if not self.next_tokens_are_prompt:
            if len(self._clock.marks) == 1:
                self._begin()
            self._clock.mark()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


def generate(
    loaded: Loaded,
    ids: torch.Tensor,
    settings: Settings,
    label: str,
    *,
    write: Callable[[str], None],
    read: Callable[[int], None],
    begin: Callable[[], None],
) -> Run:
    """Generate once with the model as it is compiled now.

    A prompt longer than ``settings.chunk`` is given in parts. Under ``backend="adakv"`` each part is compressed when it
    has been read, by its own last queries.

    Args:
        loaded: The model.
        ids: Prompt ``[1, T]``.
        settings: How to generate.
        label: Kind of cache, for the result.
        write: Gets the text as it comes.
        read: Gets the number of prompt tokens read so far, before the last part.
        begin: Called when the first token is there.

    Returns:
        The tokens and the measurements.

    Raises:
        CommandError: The model returned no KV cache, or the device has not enough memory.
    """
    length = ids.shape[1]
    chunk = settings.chunk or length
    stops = [*range(chunk, length, chunk), length]
    how: dict[str, Any] = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": True}
    sample = {"do_sample": True, "temperature": settings.temperature} if settings.temperature else {}
    clock, cache = _Clock(), None
    torch.manual_seed(settings.seed)
    try:
        clock.mark()
        for stop in stops[:-1]:
            cache = _call(loaded, ids[:, :stop], cache, **how, max_new_tokens=1).past_key_values
            read(stop)
        streamer = _Streamer(loaded.tokenizer, clock, write, begin)
        last = {**how, **sample, "max_new_tokens": settings.max_new_tokens, "streamer": streamer}
        out = _call(loaded, ids, cache, **last)
    except torch.OutOfMemoryError as error:
        raise CommandError(
            f"{loaded.device} has not enough memory for this prompt of {length:,} tokens; use a smaller "
            "--prefill-chunk or --dtype bfloat16"
        ) from error
    tokens = tuple(out.sequences[0, length:].tolist())
    steps = clock.steps()
    return Run(
        label=label,
        tokens=tokens,
        text=loaded.tokenizer.decode(tokens, skip_special_tokens=True),
        chunks=len(stops),
        first_token=steps[0],
        per_token=statistics.median(steps[1:]) if len(steps) > 1 else None,
        compiling=clock.compiling(),
        stats=_stats(loaded, out.past_key_values),
    )


def _call(loaded: Loaded, ids: torch.Tensor, cache: Any, **how: Any) -> Any:
    past = {} if cache is None else {"past_key_values": cache}
    return loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **past, **how)


def _stats(loaded: Loaded, cache: Any) -> CacheStats:
    try:
        return cache_stats(cache)
    except ValueError as error:
        kind = type(loaded.model).__name__
        raise CommandError(f"{loaded.name!r} ({kind}) returned no KV cache; there is nothing to compress") from error


def agreement(one: Run, other: Run) -> int | None:
    """Return the index of the first token that differs, or None if all are the same."""
    if one.tokens == other.tokens:
        return None
    pairs = zip(one.tokens, other.tokens, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.tokens), len(other.tokens)))
