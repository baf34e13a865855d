"""FlashAttention's calls are compressed where their arguments mean attention to the past, and left alone elsewhere."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adakv_compile
from adakv_compile import CompressedKV, Reason
from adakv_compile.report import Refusal
from tests.backend.decoders import Cache, OneLayer, causal
from tests.backend.flash import Flash, Packed, TorchPacked, sparse_forward

OPTIONS: dict[str, Any] = {"budget": 12, "window": 4, "inner": "eager"}
LENGTH, STEPS = 40, 3
CALLS = ((0, LENGTH), *((i, i + 1) for i in range(LENGTH, LENGTH + STEPS)), (LENGTH + STEPS, LENGTH + STEPS + 5))

MEANT: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "causal by its window": {"window_size": (-1, 0)},
    "a scale of its own": {"causal": True, "softmax_scale": 0.1},
    "a soft cap": {"causal": True, "softcap": 2.0},
    "a sliding window": {"causal": True, "window_size": (23, 0)},
    "causal wins over a window to the right": {"causal": True, "window_size": (-1, 5)},
}


def run(model: Any, x: Tensor) -> tuple[list[Tensor], list[Cache]]:
    """Return the outputs of a prompt, of steps and of a second prompt, and the cache after each."""
    found, caches = list[Tensor](), list[Cache]()
    with torch.no_grad():
        for begin, end in CALLS:
            out, cache = model(x[:, begin:end], caches[-1] if caches else None)
            found.append(out)
            caches.append(cache)
    return found, caches


@pytest.mark.parametrize("name", MEANT)
def test_a_budget_longer_than_the_text_changes_nothing(name: str) -> None:
    model, x = Flash(**MEANT[name]), torch.randn(2, CALLS[-1][1], 64)
    expected, _ = run(model, x)
    options = OPTIONS | {"budget": 200, "strict": True}
    found, caches = run(torch.compile(model, backend="adakv", dynamic=True, options=options), x)
    if "window" not in name:
        assert isinstance(caches[-1][0], CompressedKV)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Plain(OneLayer):
    """What :class:`Flash` means, by the operator that other tests hold against dense attention."""

    def __init__(self, window: int | None, scale: float | None) -> None:
        super().__init__(self._visible)
        self.window, self.scale = window, scale

    def _visible(self, new: int, total: int) -> Tensor:
        seen = causal(new, total)
        if self.window is None:
            return seen
        return seen & (torch.arange(total) >= torch.arange(total - new, total)[:, None] - self.window)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.mask(q.shape[2], k.shape[2])
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=self.scale, enable_gqa=True)


@pytest.mark.parametrize(
    ("name", "window", "scale"),
    [
        ("causal", None, None),
        ("causal by its window", None, None),
        ("a scale of its own", None, 0.1),
        ("a sliding window", 23, None),
    ],
)
def test_a_small_budget_keeps_and_reads_what_the_plain_operator_does(
    name: str, window: int | None, scale: float | None
) -> None:
    x, options = torch.randn(2, CALLS[-1][1], 64), OPTIONS | {"strict": True}
    found, caches = run(torch.compile(Flash(**MEANT[name]), backend="adakv", dynamic=True, options=options), x)
    expected, plain = run(torch.compile(Plain(window, scale), backend="adakv", dynamic=True, options=options), x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for (keys, _), (others, _) in zip(caches, plain, strict=True):
        assert isinstance(keys, CompressedKV)
        assert isinstance(others, CompressedKV)
        assert torch.equal(keys.head_lengths, others.head_lengths)


def test_a_prompt_stays_the_call_that_the_model_made() -> None:
    model, x = Flash(causal=True), torch.randn(2, LENGTH, 64)
    with torch.no_grad():
        found, cache = torch.compile(model, backend="adakv", options=OPTIONS | {"strict": True})(x)
        assert torch.equal(found, model(x)[0])
    assert isinstance(cache[0], CompressedKV)


OTHER: dict[str, tuple[dict[str, Any], Reason]] = {
    "everything is visible": ({}, Reason.MASK_NOT_CAUSAL),
    "one token of the future": ({"window_size": (-1, 1)}, Reason.MASK_NOT_CAUSAL),
    "a window without an end": ({"window_size": (23, -1)}, Reason.MASK_UNPROVEN),
    "slopes": ({"causal": True, "alibi_slopes": torch.full((4,), 0.1)}, Reason.OPERATOR),
    "its log-sum-exp is used": ({"causal": True, "return_lse": True}, Reason.OPERATOR),
}


def refusal(model: nn.Module, *args: Any) -> Refusal:
    """Return why a prompt is left alone."""
    report = adakv_compile.explain(model, *args, options=OPTIONS)
    (site,) = report.graphs[0].sites
    assert site.refusal is not None
    return site.refusal


@pytest.mark.parametrize("name", OTHER)
def test_what_means_something_else_is_left_alone(name: str) -> None:
    given, reason = OTHER[name]
    model, x = Flash(**given), torch.randn(2, LENGTH, 64)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        assert refusal(model, x).reason is reason
        found, cache = torch.compile(model, backend="adakv", options=OPTIONS)(x)
        assert torch.equal(found, model(x)[0])
    assert not isinstance(cache[0], CompressedKV)


def test_dropout_is_left_alone() -> None:
    why = refusal(Flash(causal=True, dropout_p=0.1), torch.randn(2, LENGTH, 64))
    assert why.reason is Reason.OPERATOR
    assert "dropout_p=0.1" in why.detail


class Fork(OneLayer):
    """Attends with an operator of the same name that means something else."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.25, True, 8).transpose(1, 2)


def test_a_fork_by_the_same_name_is_left_alone() -> None:
    why = refusal(Fork(), torch.randn(2, LENGTH, 64))
    assert why.reason is Reason.OPERATOR
    assert "_flash_attn_forward" in why.detail


@pytest.mark.parametrize("model", [Packed(), Packed(into=True)], ids=["returned", "written into a buffer"])
def test_packed_sequences_are_left_alone(model: Packed) -> None:
    x, starts = torch.randn(LENGTH, 64), torch.tensor([0, 15, LENGTH], dtype=torch.int32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        why = refusal(model, x, starts)
        assert why.reason is Reason.PACKED
        assert "cu_seqlens_q" in why.detail
        found, cache = torch.compile(model, backend="adakv", options=OPTIONS)(x, starts)
        assert torch.equal(found, model(x, starts)[0])
    assert not isinstance(cache[0], CompressedKV)


def test_the_varlen_operator_of_pytorch_is_left_alone() -> None:
    compiled = torch.compile(TorchPacked(), backend="adakv", options=OPTIONS)
    starts = torch.tensor([0, 15, LENGTH], dtype=torch.int32)
    # PyTorch has it on GPUs only: that its own call is what fails shows that the graph is the model's.
    with (
        pytest.warns(UserWarning, match=r"PACKED(.|\n)*cu_seq_q"),
        pytest.raises(NotImplementedError, match="_flash_attention_forward"),
        torch.no_grad(),
    ):
        compiled(torch.randn(LENGTH, 64), starts)
