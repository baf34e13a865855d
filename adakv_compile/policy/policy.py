"""What to keep: the policy of one attention layer, and its text form for ops to carry."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Final, Literal, get_args

__all__ = ["Gqa", "Method", "Policy", "Pool", "Safeguard", "Ties"]

Method = Literal["ada-snapkv", "snapkv", "ada-pyramid", "pyramidkv", "streamingllm"]
Pool = Literal["max", "avg"]
Gqa = Literal["mean", "max"]
Safeguard = Literal["soft", "hard"]
Ties = Literal["position", "score"]

# Shares are exact rationals, so that sizes computed on ints, on SymInts and on int64 tensors are
# the same number. The bound keeps ``share * length`` far inside int64 for any length, and reads
# 0.3333333333333333 as one third.
_MAX_DENOMINATOR: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Policy:
    """The eviction policy of one attention layer.

    Attributes:
        method: ``"ada-snapkv"`` and ``"ada-pyramid"`` share a layer's budget over its heads
            adaptively (Ada-KV, Algorithm 2); ``"snapkv"`` and ``"pyramidkv"`` uniformly; the
            pyramids give lower layers more; ``"streamingllm"`` keeps the first and the latest
            tokens.
        budget: Entries per KV head averaged over heads and layers, observation window included
            (``int``), or that share of the logical length (``float`` in (0, 1)).
        window: Observation window in tokens: the last queries score every entry and their own
            entries stay.
        pool: Pooling of the scores along the sequence.
        kernel_size: Odd width of that pooling in entries.
        alpha: Share of a layer's budget that is spread uniformly over its heads, in [0, 1]: the
            meaning of the reference code, which is the opposite of the formula printed in the
            paper.
        safeguard: ``"soft"`` mixes that share with what the heads win, as the reference code does; ``"hard"`` lets
            the heads compete for everything, each of them sure of ``alpha`` of a uniform budget.
        ties: Which of several entries with one pooled score stay: those at the lower ``"position"``, or those with
            the higher raw ``"score"``.
        beta: Steepness of the pyramid: the last layer keeps about ``1 / beta`` of the mean besides
            the window.
        gqa: How the scores of the query heads that share a KV head are reduced.
        sinks: First tokens that ``"streamingllm"`` always keeps.
        layer: Index of this layer among the compressed ones.
        num_layers: Number of compressed layers.

    Raises:
        ValueError: A value that no cache can satisfy, such as a budget that does not exceed what is
            always kept.
    """

    method: Method = "ada-snapkv"
    budget: int | float = 1024
    window: int = 32
    pool: Pool = "max"
    kernel_size: int = 7
    alpha: float = 0.2
    safeguard: Safeguard = "soft"
    ties: Ties = "position"
    beta: int = 20
    gqa: Gqa = "mean"
    sinks: int = 4
    layer: int = 0
    num_layers: int = 1

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("method", self.method, get_args(Method)),
            ("pool", self.pool, get_args(Pool)),
            ("gqa", self.gqa, get_args(Gqa)),
            ("safeguard", self.safeguard, get_args(Safeguard)),
            ("ties", self.ties, get_args(Ties)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
        for name, value, low in (
            ("window", self.window, 1),
            ("kernel_size", self.kernel_size, 1),
            ("beta", self.beta, 1),
            ("sinks", self.sinks, 0),
        ):
            if value < low:
                raise ValueError(f"{name} is {value}; it must be at least {low}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}; it must be odd, so that pooling is centred")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it must lie in [0, 1]")
        if not 0 <= self.layer < self.num_layers:
            raise ValueError(f"layer is {self.layer} of num_layers={self.num_layers}; give 0 to {self.num_layers - 1}")
        if isinstance(self.budget, float):
            if not 0 < self.budget < 1:
                raise ValueError(f"budget is {self.budget}; a float is a share of the length and lies in (0, 1)")
        elif self.budget < self.floor:
            what = f"sinks={self.sinks}" if self.method == "streamingllm" else f"window={self.window}"
            raise ValueError(
                f"budget is {self.budget} but {what} entries of every head are always kept; give at least {self.floor}"
            )

    @property
    def adaptive(self) -> bool:
        """Whether the heads of a layer compete for its budget."""
        return self.method in ("ada-snapkv", "ada-pyramid")

    @property
    def pyramid(self) -> bool:
        """Whether lower layers get more than higher ones."""
        return self.method in ("ada-pyramid", "pyramidkv")

    @property
    def floor(self) -> int:
        """Smallest budget of a head: what is always kept (the window, or the sinks) and one more entry."""
        return (self.sinks if self.method == "streamingllm" else self.window) + 1

    @property
    def uniform_share(self) -> Fraction:
        """Exact uniform share: ``alpha`` for the adaptive methods, 1 for the others."""
        return _rational(self.alpha) if self.adaptive else Fraction(1)

    @property
    def share(self) -> Fraction | None:
        """Exact share of the length that a float ``budget`` means, ``None`` for an int."""
        return _rational(self.budget) if isinstance(self.budget, float) else None

    def encode(self) -> str:
        """Return the canonical text form, ``"method=ada-snapkv;budget=1024;..."``."""
        values = dataclasses.replace(self, alpha=float(self.alpha))
        return ";".join(f"{field.name}={getattr(values, field.name)}" for field in dataclasses.fields(self))

    @staticmethod
    def decode(text: str) -> Policy:
        """Return the policy that :meth:`encode` wrote.

        Args:
            text: A text form; every field must be named exactly once.

        Raises:
            ValueError: The text does not name each field once, or a value does not parse.
        """
        return _decode(text)


@lru_cache(maxsize=1024)
def _decode(text: str) -> Policy:
    names = [field.name for field in dataclasses.fields(Policy)]
    pairs = [part.partition("=") for part in text.split(";")]
    if [name for name, _, _ in pairs] != names:
        raise ValueError(f"not an encoded policy: {text!r}; expected the fields {', '.join(names)}, in this order")
    given = {name: value for name, _, value in pairs}
    try:
        return Policy(
            method=given["method"],  # pyright: ignore[reportArgumentType]  # checked when built
            budget=int(given["budget"]) if given["budget"].isdecimal() else float(given["budget"]),
            window=int(given["window"]),
            pool=given["pool"],  # pyright: ignore[reportArgumentType]
            kernel_size=int(given["kernel_size"]),
            alpha=float(given["alpha"]),
            safeguard=given["safeguard"],  # pyright: ignore[reportArgumentType]
            ties=given["ties"],  # pyright: ignore[reportArgumentType]
            beta=int(given["beta"]),
            gqa=given["gqa"],  # pyright: ignore[reportArgumentType]
            sinks=int(given["sinks"]),
            layer=int(given["layer"]),
            num_layers=int(given["num_layers"]),
        )
    except ValueError as error:
        raise ValueError(f"not an encoded policy: {text!r}: {error}") from error


@lru_cache(maxsize=1024)
def _rational(value: float) -> Fraction:
    return Fraction(str(value)).limit_denominator(_MAX_DENOMINATOR)
