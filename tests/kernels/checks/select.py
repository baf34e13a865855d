"""The selection keeps, bit for bit, what the portable one keeps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Final

import torch

from adakv_compile.kernels.select import SPEC
from adakv_compile.kernels.select.reference import pack
from adakv_compile.policy import Policy
from adakv_compile.policy import select as select_entries
from tests.kernels.checks.draw import Draw

__all__ = ["CHECKS"]


def _check(
    scores: torch.Tensor,
    policy: Policy,
    padding: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> None:
    """Compare the op with the portable implementation, which runs on the CPU: there it is exact to the last bit."""
    text = policy.encode()
    found = SPEC.overload_for("triton")(scores, padding, sliding_window, text)
    expected = SPEC.portable(scores.cpu(), None if padding is None else padding.cpu(), sliding_window, text)
    _equal(found, expected, f"{text}, scores {list(scores.shape)}, sliding window {sliding_window}")


def _equal(found: Any, expected: Any, what: str) -> None:
    for name, one, other in zip(("positions", "offsets"), found, expected, strict=True):
        assert one.dtype == torch.int32, f"{name} are {one.dtype}"
        assert one.is_contiguous(), f"{name} are not contiguous"
        assert torch.equal(one.cpu(), other), f"{name} differ: {what}\n{one.cpu()}\n{other}"


def _pick(draw: Draw, *choices: Any) -> Any:
    return choices[int(draw.integers(0, len(choices)))]


def _tied(draw: Draw, *shape: int, values: int = 5) -> torch.Tensor:
    """Return scores of few values, so that thresholds fall on ties."""
    return draw.integers(0, values, *shape).float() / values


def _ties(draw: Draw) -> None:
    for alpha in (0.0, 0.2, 1 / 3, 1.0):
        scores = _tied(draw, 2, 3, 131, values=_pick(draw, 2, 5))
        _check(scores, Policy(budget=_pick(draw, 9, 40), window=4, alpha=alpha, kernel_size=_pick(draw, 1, 3)))
    # Pooling spreads a single peak over a plateau.
    _check(draw.uniform(1, 4, 201) ** 8, Policy(budget=23, window=8, kernel_size=7))


def _pooling(draw: Draw) -> None:
    for pool in ("max", "avg"):
        for size in (1, 3, 7, 33):
            _check(draw.normal(1, 2, 99), Policy(budget=20, window=4, pool=pool, kernel_size=size))


def _methods(draw: Draw) -> None:
    for method in ("ada-snapkv", "snapkv", "ada-pyramid", "pyramidkv", "streamingllm"):
        for budget in (40, 0.3):
            layer = int(draw.integers(0, 3))
            policy = Policy(method=method, budget=budget, window=4, layer=layer, num_layers=3, beta=3)
            _check(draw.normal(1, 3, 130), policy)


def _unusual_numbers(draw: Draw) -> None:
    policies = [
        Policy(budget=20, window=4, pool="avg", kernel_size=3),
        Policy(budget=20, window=4, kernel_size=3),
        Policy(method="snapkv", budget=20, window=4, kernel_size=1),
    ]
    inf, nan = torch.inf, torch.nan
    with warnings.catch_warnings():
        # The interpreter computes with NumPy, which warns of infinities.
        warnings.simplefilter("ignore", RuntimeWarning)
        for policy in policies:
            scores = draw.normal(1, 3, 97)
            kind = draw.integers(0, 12, 1, 3, 97)
            for number, value in enumerate((nan, inf, -inf, 0.0, -0.0, 1e-42, -1e-42)):
                scores[kind == number] = value
            scores[:, 1] = nan
            _check(scores, policy)
        for value in (0.0, -0.0, -1.0, 3e38, nan, -inf):
            _check(torch.full((1, 2, 70), value, device=draw.device), _pick(draw, *policies))


def _short_rows(draw: Draw) -> None:
    for length in (1, 2, 4, 5, 12, 64, 65):
        for budget in (5, 0.5, 13):
            _check(_tied(draw, 1, 2, length), Policy(budget=budget, window=4, kernel_size=3))
    _check(draw.normal(1, 1, 1), Policy(budget=0.01, window=1))


def _shapes(draw: Draw) -> None:
    _check(draw.normal(2, 8, 77), Policy(budget=12, window=4))
    _check(_tied(draw, 1, 33, 66), Policy(budget=9, window=4, alpha=0.3))
    # More tiles than are counted at once.
    _check(_tied(draw, 1, 2, 650), Policy(budget=100, window=4, kernel_size=3))
    strided = draw.normal(90, 2, 3).permute(1, 2, 0)
    _check(strided, Policy(budget=12, window=4))
    _check(draw.normal(1, 2, 90, dtype=torch.bfloat16), Policy(budget=12, window=4))


def _skewed_heads(draw: Draw) -> None:
    scores = draw.uniform(2, 4, 150)
    scores[0, 2] += 1  # takes all that is not shared out evenly
    scores[1, 1] -= 1
    for alpha in (0.0, 0.2, 0.77):
        _check(scores, Policy(budget=50, window=4, alpha=alpha))


def _padding(draw: Draw) -> None:
    length = 101
    order = torch.arange(length, device=draw.device)
    real = int(draw.integers(1, length))
    left, right = order >= real, order < real
    holes = draw.uniform(length) < 0.7
    none = torch.zeros_like(left)
    few = order == real
    for policy in (
        Policy(budget=20, window=4, kernel_size=3),
        Policy(budget=20, window=4, pool="avg", kernel_size=7, alpha=0.0),
        Policy(method="ada-pyramid", budget=0.3, window=4, layer=2, num_layers=3, beta=3),
        Policy(method="snapkv", budget=33, window=4),
    ):
        padding = torch.stack([_pick(draw, left, right), holes, _pick(draw, none, few)])
        _check(_tied(draw, 3, 2, length, values=20), policy, padding)
    _check(_tied(draw, 2, 2, length), Policy(budget=20, window=4), holes[None])
    _check(_tied(draw, 2, 2, length), Policy(method="streamingllm", budget=20, window=4), holes[None])


def _sliding_windows(draw: Draw) -> None:
    for window in (1, 2, 40, 99, 100):
        padding = _pick(draw, None, draw.uniform(2, 99) < 0.7)
        _check(_tied(draw, 2, 2, 99), Policy(budget=_pick(draw, 9, 0.4), window=4), padding, window)


def _choose(draw: Draw) -> None:
    from adakv_compile.kernels.select.gpu import choose

    batch, num_heads, length = 2, 4, 120
    for policy in (
        Policy(budget=12, window=4),
        Policy(budget=12, window=4, alpha=0.0, pool="avg", kernel_size=5),
        Policy(budget=12, window=4, alpha=0.45, kernel_size=1),
        Policy(method="pyramidkv", budget=12, window=4, kernel_size=3),
        Policy(method="streamingllm", budget=12, window=4),
    ):
        scores = _tied(draw, batch, num_heads, length, values=30)
        # Heads hold different entries: one nearly none, one all.
        held = draw.uniform(batch, length, num_heads) < torch.tensor([0.0, 0.1, 0.6, 1.0], device=draw.device)
        valid = _pick(draw, held.mT, held.mT[:, 2:3], None)
        first_live = _pick(draw, 0, 17)
        protected_from = _pick(draw, 110, -1, length, draw.integers(90, 125, batch))
        total = _pick(draw, 60, 0, 10_000, draw.integers(0, 300, batch).int())
        slots = num_heads * length
        found = choose(
            policy, scores, slots, valid=valid, first_live=first_live, protected_from=protected_from, total=total
        )
        order = torch.arange(length)
        live = (order >= first_live).expand(batch, 1, length)
        protected = torch.as_tensor(protected_from).cpu().expand(batch)[:, None, None] <= order
        keep = select_entries(
            policy,
            scores.cpu(),
            live if valid is None else live & valid.cpu(),
            protected=protected,
            total=torch.as_tensor(total).cpu().expand(batch),
        )
        _equal(found, pack(keep, slots), f"{policy}, {first_live=}, {protected_from=}, {total=}, {valid=}")


def _same_bits(draw: Draw) -> None:
    scores = _tied(draw, 2, 4, 150)
    text = Policy(budget=30, window=4).encode()
    once = SPEC.overload_for("triton")(scores, None, None, text)
    again = SPEC.overload_for("triton")(scores, None, None, text)
    assert torch.equal(once[0], again[0]), "positions differ between two runs"
    assert torch.equal(once[1], again[1]), "offsets differ between two runs"


def _at_size(draw: Draw) -> None:
    """Many programs at once, which the interpreter can't show."""
    if draw.device.type != "cuda":
        return
    scores = _tied(draw, 2, 8, 131_071, values=1000)
    _check(scores, Policy(budget=0.2, window=32))
    _check(draw.normal(1, 8, 131_072).softmax(-1), Policy(budget=1024, window=32))
    _check(draw.normal(3, 32, 8_192).softmax(-1), Policy(budget=1024, window=32, pool="avg"))


CHECKS: Final[dict[str, Callable[[Draw], None]]] = {
    "ties": _ties,
    "pooling": _pooling,
    "methods": _methods,
    "unusual numbers": _unusual_numbers,
    "short rows": _short_rows,
    "shapes": _shapes,
    "skewed heads": _skewed_heads,
    "padding": _padding,
    "sliding windows": _sliding_windows,
    "choose": _choose,
    "same bits": _same_bits,
    "at size": _at_size,
}
