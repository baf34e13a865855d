"""Libraries for a prompt's attention are called with the right layout, mask and scale, and chosen by what they serve.

The packages themselves need a GPU: stand-ins with their signatures, computing in plain PyTorch, take their places.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from adakv_compile.kernels.prefill_attention import BACKENDS, Request, best_backend
from tests.kernels.tolerances import assert_near

OP = torch.ops.adakv.prefill_attention_v1
CUDA = torch.device("cuda", 0)
LEFT, RIGHT = 0, 1


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention in float64, and the log-sum-exp of its logits."""
    group = query.shape[1] // key.shape[1]
    key, value = (entries.double().repeat_interleave(group, 1) for entries in (key, value))
    logits = query.double() @ key.mT * scale
    order = torch.arange(key.shape[2])
    seen = order <= order[:, None]
    if window is not None:
        seen &= order > order[:, None] - window
    logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    return_attn_probs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Stand in for the package's function: ``[B, T, H, D]``."""
    assert causal
    assert return_attn_probs
    assert softmax_scale is not None
    assert window_size[RIGHT] == (-1 if window_size[LEFT] < 0 else 0)
    window = None if window_size[LEFT] < 0 else window_size[LEFT] + 1
    out, lse = attention(*(rows.transpose(1, 2) for rows in (q, k, v)), softmax_scale, window)
    return out.transpose(1, 2).to(q.dtype), lse.float(), None


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """Stand in for PyTorch 2.11's function, whose right window of 0 means causal: ``[total, H, D]``."""
    assert window_size[RIGHT] == 0
    assert scale is not None
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == int(cu_seq_q.diff().max())
    window = None if window_size[LEFT] < 0 else window_size[LEFT] + 1
    parts = [
        attention(*(rows[a:b].transpose(0, 1)[None] for rows in (query, key, value)), scale, window)[0]
        for a, b in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True)
    ]
    return torch.cat([part[0].transpose(0, 1) for part in parts]).to(query.dtype)


def varlen_attn_with_groups(*args: Any, enable_gqa: bool = False, **kwargs: Any) -> torch.Tensor:
    """Stand in for PyTorch 2.13's function, which wants to be told of grouped heads."""
    assert enable_gqa == (args[0].shape[1] != args[1].shape[1])
    return varlen_attn(*args, **kwargs)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


def inputs(group: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query = torch.randn(2, 21, 2 * group, 16, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(2, 21, 2, 16, dtype=dtype).transpose(1, 2) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    ("backend", "window"),
    [("cudnn", None), *((backend, window) for backend in ("flash-attn", "varlen") for window in (None, 1, 7, 100))],
)
def test_a_backend_computes_causal_attention(backend: str, group: int, window: int | None) -> None:
    query, key, value = inputs(group)
    expected, sums = attention(query, key, value, 0.3, window)
    out, lse = OP(query, key, value, 0.3, window, backend)
    assert_near(out, expected, torch.float32)
    if BACKENDS[backend].gives_lse:
        assert_near(lse, sums, torch.float32)
    else:
        assert lse.shape == (2, 2 * group, 0)
    torch.library.opcheck(OP.default, (query, key, value, 0.3, window, backend))


def test_grouped_heads_where_pytorch_must_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn_with_groups)
    for group in (1, 3):
        query, key, value = inputs(group)
        expected, _ = attention(query, key, value, 0.3, 5)
        assert_near(OP(query, key, value, 0.3, 5, "varlen")[0], expected, torch.float32)


def test_half_precision_and_layout() -> None:
    query, key, value = inputs(dtype=torch.bfloat16)
    out, lse = OP(query, key, value, 0.3, None, "flash-attn")
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert out.transpose(1, 2).is_contiguous()
    assert_near(out, attention(query, key, value, 0.3, None)[0], torch.bfloat16)


def request(**changes: Any) -> Request:
    given: dict[str, Any] = {"device": CUDA, "dtype": torch.bfloat16, "key_dim": 128, "value_dim": 128}
    return Request(**{**given, "sliding_window": None, **changes})


@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        ("sdpa", {"sliding_window": 4}, "no sliding window"),
        ("flash-attn", {"device": torch.device("cpu")}, "not CUDA"),
        ("flash-attn", {"dtype": torch.float32}, "neither bfloat16 nor float16"),
        ("varlen", {"value_dim": 64}, "keys of 128 and values of 64"),
        ("varlen", {"key_dim": 320, "value_dim": 320}, "320 is above 256"),
        ("varlen", {"key_dim": 36, "value_dim": 36}, "36 is above 256 or no multiple of 8"),
    ],
)
def test_what_a_backend_does_not_serve(
    backend: str, changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, (9, 0))
    why = BACKENDS[backend].why_not(request(**changes))
    assert why is not None
    assert reason in why
    assert BACKENDS["model"].why_not(request(**changes)) is None


def test_the_best_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, (9, 0))
    assert best_backend(request()) == "sdpa"
    assert best_backend(request(dtype=torch.float32)) == "sdpa"
    assert best_backend(request(sliding_window=64)) == "flash-attn"
    assert best_backend(request(sliding_window=64, dtype=torch.float32)) == "model"
    assert best_backend(request(device=torch.device("cpu"))) == "model"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert best_backend(request(sliding_window=64)) == "varlen"
    _pretend(monkeypatch, (7, 5))
    assert best_backend(request(sliding_window=64)) == "model"


def test_an_operator_of_the_graph_is_not_called_by_the_op() -> None:
    with pytest.raises(ValueError, match="backend 'sdpa' is an operator of the graph"):
        OP(*inputs(), 0.3, None, "sdpa")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", "flash-attn", "varlen"])
@pytest.mark.parametrize("window", [None, 100])
def test_the_real_library(backend: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    given = [tensor.cuda() for tensor in inputs(dtype=torch.bfloat16)]
    key = given[1]
    why = BACKENDS[backend].why_not(Request(key.device, key.dtype, 16, 16, window))
    if why is not None:
        pytest.skip(why)
    out, _ = OP(*given, 0.3, window, backend)
    assert_near(out.cpu(), attention(*(tensor.cpu() for tensor in given), 0.3, window)[0], torch.bfloat16)


def _pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Let there be a GPU, as far as tables go; the stand-in for flash-attn has no spec that could be found."""
    from adakv_compile.kernels import _support
    from adakv_compile.kernels.prefill_attention import backends

    monkeypatch.setattr(backends, "target_of", lambda device: _support.Target(capability, 132))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
