"""Checks of ``adakv::observe_v3``: against a dense softmax in float64, and against the portable op."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch

from adakv_compile.kernels import Kernels
from adakv_compile.kernels.observe.op import SPEC
from adakv_compile.policy import Gqa, Policy
from tests.kernels.checks.draw import Draw
from tests.kernels.tolerances import assert_near

__all__ = ["CHECKS"]


def _inputs(
    draw: Draw,
    batch: int,
    num_heads: int,
    group: int,
    count: int,
    length: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    query = draw.normal(batch, num_heads * group, count, head_dim, dtype=dtype)
    return query * 2, draw.normal(batch, num_heads, length, head_dim, dtype=dtype)


def _observe(
    kernels: Kernels,
    query: torch.Tensor,
    key: torch.Tensor,
    padding: torch.Tensor | None,
    lse: torch.Tensor | None,
    scale: float,
    sliding_window: int | None,
    policy: str,
    *,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Call one implementation of the op, without what a check does not name."""
    operator = SPEC.overload_for(kernels)
    return operator(query, key, mask, padding, lse, sinks, scale, sliding_window, softcap, policy)


_triton, _portable = functools.partial(_observe, "triton"), functools.partial(_observe, "portable")


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    padding: torch.Tensor | None,
    scale: float,
    sliding_window: int | None,
    window: int,
    gqa: Gqa,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 scores ``[B, Hkv, L]`` and the log-sum-exps ``[B, Hq, T]`` of all queries, on the CPU."""
    query, key = query.cpu().double(), key.cpu().double()
    batch, num_heads, length, _ = key.shape
    count, group = query.shape[2], query.shape[1] // num_heads
    real = torch.ones(batch, length, dtype=torch.bool) if padding is None else padding.cpu().expand(batch, length)
    places = torch.arange(length - count, length)[:, None]
    columns = torch.arange(length)
    visible = columns <= places
    if sliding_window is not None:
        visible &= columns > places - sliding_window
    logits = query @ key.repeat_interleave(group, 1).mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        visible, mask = torch.tensor(True), mask.cpu()[..., mask.shape[3] - length :]
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
        logits = logits.masked_fill(logits < -1e38, -torch.inf)
    logits = logits.masked_fill(~(visible & real[:, None, None]), -torch.inf)
    sums = logits.logsumexp(-1)
    total = sums if sinks is None else torch.logaddexp(sums, sinks.cpu().double()[:, None])
    weights = (logits - total.masked_fill(total == -torch.inf, 0.0)[..., None]).exp()

    taken = min(window, count, length)
    counted = real[:, length - taken :]
    weights = weights[:, :, count - taken :].masked_fill(~counted[:, None, :, None], 0.0)
    per_head = weights.sum(2) / counted.sum(1).clamp(min=1)[:, None, None]
    grouped = per_head.unflatten(1, (num_heads, group))
    return grouped.amax(2) if gqa == "max" else grouped.mean(2), sums


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    padding: torch.Tensor | None = None,
    *,
    window: int = 32,
    sliding_window: int | None = None,
    scale: float | None = None,
    gqa: tuple[Gqa, ...] = ("mean", "max"),
    given: tuple[bool, ...] = (False, True),
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> None:
    """Compare with both oracles, with sums of the attention and without."""
    scale = key.shape[3] ** -0.5 if scale is None else scale
    for reduction in gqa:
        policy = Policy(budget=window + 16, window=window, gqa=reduction).encode()
        rest = {"mask": mask, "sinks": sinks, "softcap": softcap}
        oracle, sums = _dense(query, key, padding, scale, sliding_window, window, reduction, mask, sinks, softcap)
        portable = _portable(query, key, padding, None, scale, sliding_window, policy, **rest)
        for lse in (sums.float().to(key.device) if with_sums else None for with_sums in given):
            scores = _triton(query, key, padding, lse, scale, sliding_window, policy, **rest)
            assert scores.dtype == torch.float32, f"scores are {scores.dtype}"
            assert scores.is_contiguous(), f"scores have strides {scores.stride()}"
            # All that follows the products is float32, whatever the dtype of the inputs.
            assert_near(scores.cpu(), oracle, torch.float32)
            assert_near(scores.cpu(), portable.cpu().double(), torch.float32)


def _dtypes(draw: Draw) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _check(*_inputs(draw, 2, 1, 4, 45, 171, 64, dtype))


def _head_dims(draw: Draw) -> None:
    for head_dim in (8, 32, 80, 96, 112, 128, 256):
        for dtype in (torch.bfloat16, torch.float32):
            _check(*_inputs(draw, 1, 2, 2, 40, 101, head_dim, dtype), gqa=("max",), given=(False,))


def _groups(draw: Draw) -> None:
    for group in (1, 2, 3, 5, 6, 7, 8, 16, 24):
        _check(*_inputs(draw, 1, 1, group, 37, 97, 32, torch.bfloat16), given=(False,))


def _windows(draw: Draw) -> None:
    """From one query to windows of several blocks, and calls shorter than the window."""
    for window, count, length in ((1, 9, 50), (5, 9, 50), (33, 70, 80), (100, 150, 110), (130, 130, 130), (64, 3, 77)):
        for group in (1, 3):
            _check(*_inputs(draw, 1, 1, group, count, length, 32), window=window, given=(False,))
    _check(*_inputs(draw, 1, 1, 1, 300, 310, 32), window=1024, gqa=("max",))


def _lengths(draw: Draw) -> None:
    """Lengths around the edges of tiles, down to one key; more queries than keys."""
    for count, length in ((1, 1), (1, 40), (2, 31), (20, 33), (64, 64), (40, 127), (33, 129), (50, 20), (9, 2)):
        _check(*_inputs(draw, 1, 2, 2, count, length, 32), given=(False,))


def _sliding(draw: Draw) -> None:
    for sliding_window in (1, 7, 64, 150):
        _check(*_inputs(draw, 1, 1, 3, 60, 150, 32), sliding_window=sliding_window)


def _padding(draw: Draw) -> None:
    """Left, right, scattered and complete padding, a row of its own for each or one for all."""
    query, key = _inputs(draw, 5, 1, 3, 50, 140, 32)
    padding = torch.ones(5, 140, dtype=torch.bool)
    padding[0, :61] = False
    padding[1, -7:] = False
    padding[2, draw.choice(70, 140)] = False
    padding[3] = False
    padding[4, :139] = False
    _check(query, key, padding.to(draw.device))
    _check(query, key, padding[2:3].to(draw.device), sliding_window=50, given=(False,))
    wide = torch.zeros(5, 280, dtype=torch.bool)
    wide[:, ::2] = padding
    _check(query, key, wide.to(draw.device)[:, ::2], window=70, gqa=("max",))


def _soft_caps_and_sinks(draw: Draw) -> None:
    """Caps below and above the logits, sinks of every size and none, rows that make one block and several."""
    for group, window, dtype in ((2, 16, torch.float32), (3, 40, torch.bfloat16), (1, 80, torch.float16)):
        query, key = _inputs(draw, 2, 2, group, 90, 140, 32, dtype)
        padding = draw.uniform(2, 140) < 0.7
        for index, (softcap, shift) in enumerate(((0.1, None), (5.0, 0.0), (1e4, 80.0), (None, -80.0))):
            sinks = None if shift is None else draw.normal(2 * group, dtype=dtype) * 2 + shift
            if sinks is not None and shift == 0.0:
                sinks[::2] = -torch.inf
            given, gqa = (index % 2 == 1,), ("max",) if index < 2 else ("mean",)
            _check(query, key, window=window, softcap=softcap, sinks=sinks, given=given, gqa=gqa)
            if index % 2:
                _check(query, key, padding, window=window, softcap=softcap, sinks=sinks, gqa=gqa, sliding_window=60)


def _masks(draw: Draw) -> None:
    """Masks of every broadcast shape and kind, in place of the rules; rows that make one block and several."""
    for group, window, count, length in ((2, 16, 50, 140), (3, 40, 60, 130), (1, 80, 90, 100), (2, 9, 5, 70)):
        query, key = _inputs(draw, 2, 2, group, count, length, 32)
        padding = draw.uniform(2, length) < 0.7
        for index, (shape, columns) in enumerate((("111", 0), ("bht", 7), ("b1t", 9), ("1h1", 0))):
            sizes = [size if letter in shape else 1 for letter, size in zip("bht", (2, 2 * group, count), strict=True)]
            mask = draw.uniform(*sizes, length + columns) < 0.6
            if index % 2:
                mask = (draw.normal(*mask.shape) * 2).masked_fill(~mask, -torch.inf)
            given = (index < 2,)
            _check(query, key, window=window, mask=mask, sliding_window=3, given=given, gqa=("mean",))
            _check(query, key, padding, window=window, mask=mask, given=given, gqa=("max",))
    strided = draw.normal(2, length, count, 4).permute(0, 3, 2, 1).to(torch.float16)
    _check(query, key, window=9, mask=strided, softcap=2.0, sinks=draw.normal(4))
    everything = torch.ones(1, 1, length, count, dtype=torch.bool, device=draw.device).mT
    _check(query, key, window=9, mask=everything)
    hidden = everything.clone()
    hidden[:, :, -3:] = False
    _check(query, key, window=9, mask=hidden, sinks=torch.full((4,), -torch.inf, device=draw.device))
    lowest = torch.where(draw.uniform(*everything.shape) < 0.5, 0.0, torch.finfo(torch.float32).min)
    for row in (-1, -4):  # one query of the window sees nothing else, one a single key
        lowest[:, :, row] = torch.finfo(torch.float32).min
    lowest[:, :, -4, 3] = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        _check(query, key, window=9, mask=lowest.to(draw.device, dtype), given=(False,))


def _padding_holds_nan(draw: Draw) -> None:
    """Queries, keys and sums of padding are NaN, and nothing of it shows."""
    for head_dim, group, window in ((32, 3, 20), (80, 1, 90)):
        query, key = _inputs(draw, 2, 2, group, 100, 130, head_dim)
        padding = torch.ones(2, 130, dtype=torch.bool)
        padding[0, :117] = False
        padding[1, 121:] = False
        padding = padding.to(draw.device)
        scale = head_dim**-0.5
        causal = torch.ones(100, 130, dtype=torch.bool, device=draw.device).tril(30)[None, None]
        for gqa in ("mean", "max"):
            policy = Policy(budget=256, window=window, gqa=gqa).encode()
            oracle, sums = _dense(query, key, padding, scale, None, window, gqa)
            bad_key = key.masked_fill(~padding[:, None, :, None], torch.nan)
            bad_query = query.masked_fill(~padding[:, None, 30:, None], torch.nan)
            bad_sums = sums.float().to(draw.device).masked_fill(~padding[:, None, 30:], torch.nan)
            for lse in (None, bad_sums):
                scores = _triton(bad_query, bad_key, padding, lse, scale, None, policy)
                assert_near(scores.cpu(), oracle, torch.float32)
                scores = _triton(bad_query, bad_key, padding, lse, scale, None, policy, mask=causal)
                assert_near(scores.cpu(), oracle, torch.float32)


def _not_a_number(draw: Draw) -> None:
    """A NaN or infinite logit that is seen makes its head's scores NaN, as in the portable op, and no other head's."""
    for group, window in ((2, 16), (3, 32), (1, 80)):
        for poison in (torch.nan, torch.inf):
            query, key = _inputs(draw, 1, 4, group, 90, 110, 32)
            query[0, 0, -3] = poison
            query[0, group, 0] = poison  # before the window
            key[0, 2, 70, 5] = poison
            key[0, 3, -1] = poison
            for gqa in ("mean", "max"):
                policy = Policy(budget=256, window=window, gqa=gqa).encode()
                expected = _portable(query, key, None, None, 0.2, None, policy).cpu()
                with warnings.catch_warnings():
                    # NumPy's, whose maximum the interpreter uses.
                    warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
                    scores = _triton(query, key, None, None, 0.2, None, policy).cpu()
                assert expected[0, 0].isnan().all(), "the case holds no NaN"
                assert torch.equal(scores.isnan(), expected.isnan()), f"NaN differ: G={group}, W={window}, {gqa}"
                assert_near(scores.nan_to_num(), expected.nan_to_num().double(), torch.float32)


def _strides(draw: Draw) -> None:
    """Tokens before heads, slices, every other element, keys of one batch row for all, sums of other strides."""
    query = draw.normal(2, 60, 4, 40).transpose(1, 2)
    key = draw.normal(2, 200, 2, 40).transpose(1, 2)[:, :, 30:133]
    _check(query, key, gqa=("mean",))
    _check(query[..., ::2], key[..., ::2], gqa=("mean",), given=(False,))
    _check(query.mT.contiguous().mT, key, gqa=("max",), given=(False,))
    _check(query, key[:1].expand(2, -1, -1, -1), gqa=("max",), given=(False,))
    _, sums = _dense(query, key, None, 0.2, None, 32, "mean")
    policy = Policy(budget=256).encode()
    contiguous = sums.float().to(draw.device)
    strided = contiguous.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    scores = _triton(query, key, None, contiguous, 0.2, None, policy)
    assert torch.equal(scores, _triton(query, key, None, strided, 0.2, None, policy)), (
        "strides of lse change the result"
    )


def _large_logits(draw: Draw) -> None:
    """Logits far beyond what exp can take, of both signs."""
    query, key = _inputs(draw, 1, 2, 2, 40, 130, 32)
    shift = torch.zeros(32, device=draw.device)
    shift[0] = 20.0
    query[:, :, :, 0] = 8.0
    for sign in (1.0, -1.0):
        _check(query, key + sign * shift, scale=2.0)


def _nothing_to_observe(draw: Draw) -> None:
    """No queries, no batch rows, no keys, or a policy that needs no scores."""
    policy = Policy(budget=64).encode()
    for batch, count, length in ((2, 0, 40), (0, 5, 40), (1, 5, 0)):
        query, key = _inputs(draw, batch, 2, 2, count, length, 32)
        scores = _triton(query, key, None, None, 0.2, None, policy)
        assert scores.shape == (batch, 2, length), f"scores have shape {list(scores.shape)}"
        assert not scores.any(), "scores of nothing are not 0"
    query, key = _inputs(draw, 1, 2, 2, 5, 40, 32)
    streaming = Policy(method="streamingllm", budget=64).encode()
    assert not _triton(query * torch.nan, key, None, None, 0.2, None, streaming).any(), "streamingllm has scores"


def _repeatable(draw: Draw) -> None:
    """The same bits again, and from memory that held NaN."""
    query, key = _inputs(draw, 2, 2, 4, 50, 300, 64, torch.bfloat16)
    policy = Policy(budget=64, gqa="max").encode()
    first = _triton(query, key, None, None, 0.125, None, policy)
    freed = [torch.full((2, 2, 300), torch.nan, device=draw.device) for _ in range(8)]
    del freed
    assert torch.equal(first, _triton(query, key, None, None, 0.125, None, policy)), "other bits"


CHECKS: dict[str, Callable[[Draw], None]] = {
    "dtypes": _dtypes,
    "head_dims": _head_dims,
    "groups": _groups,
    "windows": _windows,
    "lengths": _lengths,
    "sliding": _sliding,
    "padding": _padding,
    "soft_caps_and_sinks": _soft_caps_and_sinks,
    "masks": _masks,
    "padding_holds_nan": _padding_holds_nan,
    "not_a_number": _not_a_number,
    "strides": _strides,
    "large_logits": _large_logits,
    "nothing_to_observe": _nothing_to_observe,
    "repeatable": _repeatable,
}
