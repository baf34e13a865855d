"""The user's options: one frozen dataclass, validated once, hashable by value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, get_args

from adakv_compile.errors import OptionsError, hint
from adakv_compile.kernels import KERNELS, Kernels
from adakv_compile.kernels.prefill_attention import BACKENDS
from adakv_compile.policy.policy import Gqa, Method, Policy, Pool, Safeguard, Ties

__all__ = ["INNER_COMPILERS", "Options"]

INNER_COMPILERS: Final = ("inductor", "aot_eager", "eager")
_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "method": get_args(Method),
    "pool": get_args(Pool),
    "gqa": get_args(Gqa),
    "safeguard": get_args(Safeguard),
    "ties": get_args(Ties),
    "kernels": KERNELS,
    "attention": ("auto", *BACKENDS),
    "inner": INNER_COMPILERS,
}
# Inclusive bounds of the plain integer options; ``None`` is unbounded.
_INTEGERS: Final[dict[str, tuple[int, int | None]]] = {
    "window": (1, None),
    "kernel_size": (1, None),
    "beta": (1, None),
    "sinks": (0, None),
}


@dataclass(frozen=True, slots=True)
class Options:
    """What ``torch.compile(..., backend="adakv", options={...})`` accepts.

    Attributes:
        method: ``"ada-snapkv"``, ``"snapkv"``, ``"ada-pyramid"``, ``"pyramidkv"`` or ``"streamingllm"``.
        budget: Entries kept per KV head and layer on average, observation window included (``int``), or that share
            of the prompt (``float`` in (0, 1)).
        window: Observation window in tokens: the last queries of a prompt, which score every entry; their own
            entries are always kept.
        pool: Pooling of the scores along the sequence, ``"max"`` or ``"avg"``.
        kernel_size: Odd width of that pooling in tokens.
        alpha: Safeguard: the share of the budget that is spread uniformly over the heads. 1 is the uniform method,
            0 the pure global top-B (Ada-KV, Algorithm 2, with the meaning of the reference code).
        safeguard: ``"soft"``: that share is mixed with what the heads win, as in the paper's reference code.
            ``"hard"``: the heads compete for the whole budget, each of them sure of that share.
        ties: Which of several entries with one pooled score stay: those at the lower ``"position"``, or those with
            the higher raw ``"score"``.
        beta: Steepness of the pyramid (PyramidKV): the smallest layer budget is about ``1 / beta`` of the mean.
        gqa: How the scores of the query heads that share a KV head are reduced, ``"mean"`` or ``"max"``.
        sinks: First tokens that StreamingLLM always keeps.
        kernels: Who computes the ops: ``"auto"`` (Triton's kernels on CUDA devices, the fast portable path on CPUs),
            ``"triton"`` or ``"portable"``. What Triton does not serve falls back, with a reason in the report.
        attention: Who computes the attention of a prompt whose mask is proved causal: ``"auto"``, ``"model"`` (the
            operator and mask that the model calls), ``"sdpa"`` (PyTorch's, without a mask), ``"cudnn"``,
            ``"flash-attn"`` or ``"varlen"``.
        strict: Raise instead of leaving an attention with a KV cache uncompressed.
        inner: Compiler of the rewritten graph: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        inductor: Settings handed to Inductor as configuration patches, as sorted ``(name, value)`` pairs.

    Raises:
        OptionsError: A value has a wrong type or is out of range.
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
    kernels: Kernels = "auto"
    attention: str = "auto"
    strict: bool = False
    inner: str = "inductor"
    inductor: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        for name, (low, high) in _INTEGERS.items():
            _check_integer(name, getattr(self, name), low, high)
        if not self.kernel_size % 2:
            raise OptionsError(f"option 'kernel_size' is {self.kernel_size}; it must be odd, to be centred")
        alpha: object = self.alpha
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
            raise OptionsError(f"option 'alpha' is {alpha!r}; it must be a number from 0 (global) to 1 (uniform)")
        strict: object = self.strict
        if not isinstance(strict, bool):
            raise OptionsError(f"option 'strict' is {strict!r}; it must be True or False")
        self._check_budget()

    def _check_budget(self) -> None:
        budget: object = self.budget
        if isinstance(budget, float):
            if not 0 < budget < 1:
                raise OptionsError(
                    f"option 'budget' is {budget!r}; a float is a share of the prompt and must lie strictly between "
                    "0 and 1; give an int for a number of entries"
                )
            return
        _check_integer("budget", budget, 1, None)
        if self.method == "streamingllm":
            if self.budget <= self.sinks:
                raise OptionsError(
                    f"option 'budget' is {budget!r} but sinks={self.sinks} tokens are always kept; give a budget of "
                    f"at least {self.sinks + 1}"
                )
        elif self.budget < self.window + 1:
            raise OptionsError(
                f"option 'budget' is {budget!r} but the observation window of {self.window} tokens is always kept; "
                f"give a budget of at least {self.window + 1} or a smaller window"
            )

    @classmethod
    def parse(cls, mode: str | None, options: Mapping[str, object] | None) -> Options:
        """Validate what ``torch.compile`` passes on.

        Args:
            mode: A mode of ``torch.compile``; its Inductor settings are used for the rewritten graph.
            options: The user's dictionary; copied, never kept. ``"inductor"`` may hold a dictionary of Inductor
                settings.

        Returns:
            The frozen options.

        Raises:
            OptionsError: An unknown name (the nearest one is suggested), a wrong type or a value out of range.
        """
        given = dict(options or {})
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                raise OptionsError(f"unknown option {name!r}{hint(name, names)} Known options: {', '.join(names)}")
        inductor = given.pop("inductor", ())
        if isinstance(inductor, Mapping):
            inductor = tuple(sorted(inductor.items()))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        if not isinstance(inductor, tuple):
            raise OptionsError(f"option 'inductor' is {inductor!r}; it must be a dictionary of Inductor settings")
        if any(pair[0] == "freezing" for pair in inductor):
            raise OptionsError(
                "option 'inductor' holds 'freezing', which Dynamo must know before it traces; set "
                "torch._inductor.config.freezing before compiling instead"
            )
        if mode is not None and mode != "default":
            inductor = (("mode", mode), *inductor)
        try:
            return cls(**given, inductor=inductor)  # type: ignore[arg-type]
        except TypeError as error:  # an unhashable or incomparable value reached a check
            raise OptionsError(f"an option has a wrong type: {error}") from error

    def policy(self, layer: int, num_layers: int) -> Policy:
        """Return what to keep in layer ``layer`` of ``num_layers`` compressed layers."""
        return Policy(
            method=self.method,
            budget=self.budget,
            window=self.window,
            pool=self.pool,
            kernel_size=self.kernel_size,
            alpha=self.alpha,
            safeguard=self.safeguard,
            ties=self.ties,
            beta=self.beta,
            gqa=self.gqa,
            sinks=self.sinks,
            layer=layer,
            num_layers=num_layers,
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    allowed = ", ".join(map(repr, choices))
    raise OptionsError(f"option {name!r} is {value!r}{hint(value, choices)} Allowed: {allowed}")


def _check_integer(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionsError(f"option {name!r} is {value!r} of type {type(value).__name__}; it must be an int")
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise OptionsError(f"option {name!r} is {value}; it must be {limit}")
