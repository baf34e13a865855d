"""``nn.MultiheadAttention`` and its function in decoders that keep a cache of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adakv_compile
from adakv_compile import CompressedKV, Reason
from tests.backend.decoders import Cache, causal

OPTIONS: dict[str, Any] = {"budget": 12, "window": 4, "inner": "eager", "strict": True}
LENGTH, STEPS, WIDTH, HEADS = 40, 4, 64, 4


class _Decoder(nn.Module):
    """``forward(x, cache) -> (y, cache)`` with the weights of one ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.eval()

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, ``[B, T, 64]`` each."""
        assert self.layer.in_proj_weight is not None
        return F.linear(x, self.layer.in_proj_weight, self.layer.in_proj_bias).chunk(3, -1)


class _Static(_Decoder):
    """Hands cached keys and values ``[B * H, L, D]`` to the function as its static ones."""

    def __init__(self, *, need_weights: bool = False) -> None:
        super().__init__()
        self.need_weights = need_weights

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        batch, new, _ = x.shape
        k, v = (
            entries.unflatten(-1, (HEADS, -1)).transpose(1, 2).reshape(batch * HEADS, new, -1)
            for entries in self.projected(x)[1:]
        )
        if cache is not None:
            k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        rows = x.transpose(0, 1)
        # The function checks its mask against keys that it then doesn't use, so only a prompt can have one.
        mask = None if new == 1 else ~causal(new, new)
        layer = self.layer
        out, weights = F.multi_head_attention_forward(
            rows,
            rows,
            rows,
            WIDTH,
            HEADS,
            layer.in_proj_weight,
            layer.in_proj_bias,
            None,
            None,
            False,
            0.0,
            layer.out_proj.weight,
            layer.out_proj.bias,
            training=False,
            need_weights=self.need_weights,
            attn_mask=mask,
            static_k=k,
            static_v=v,
        )
        out = out.transpose(0, 1)
        return out if weights is None else out + weights.mean(-1, keepdim=True), (k, v)


class _Outside(_Decoder):
    """Uses the weights of the layer only, and caches what is projected before it is split, ``[B, L, 64]``."""

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        q, k, v = self.projected(x)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        mask = causal(q.shape[1], k.shape[1])
        q, keys, values = (entries.unflatten(-1, (HEADS, -1)).transpose(1, 2) for entries in (q, k, v))
        out = F.scaled_dot_product_attention(q, keys, values, mask)
        return self.layer.out_proj(out.transpose(1, 2).flatten(2)), (k, v)


class _Inputs(_Decoder):
    """Caches the layer's inputs, and has the layer project all of them at every call."""

    def __init__(self, *, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights

    def forward(self, x: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        whole = x if cache is None else torch.cat([cache, x], 1)
        mask = ~causal(x.shape[1], whole.shape[1])
        return self.layer(x, whole, whole, attn_mask=mask, need_weights=self.need_weights)[0], whole


def generate(model: Any, x: Tensor) -> tuple[list[Tensor], Any]:
    """Return the outputs of a prompt and of the steps after it, and the cache."""
    found, cache = list[Tensor](), None
    with torch.no_grad():
        for begin, end in ((0, LENGTH), *((i, i + 1) for i in range(LENGTH, LENGTH + STEPS))):
            out, cache = model(x[:, begin:end], cache)
            found.append(out)
    return found, cache


@pytest.mark.parametrize("model", [_Static(), _Outside()], ids=["static keys", "projected outside"])
def test_keys_and_values_that_the_decoder_caches_are_compressed(model: nn.Module) -> None:
    x = torch.randn(2, LENGTH + STEPS, WIDTH)
    expected, _ = generate(model, x)
    found, cache = generate(torch.compile(model, backend="adakv", dynamic=True, options=OPTIONS | {"budget": 200}), x)
    assert isinstance(cache[0], CompressedKV)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_both_forms_keep_the_same_entries() -> None:
    x = torch.randn(2, LENGTH + STEPS, WIDTH)
    (one, first), (other, second) = (
        generate(torch.compile(model, backend="adakv", dynamic=True, options=OPTIONS), x)
        for model in (_Static(), _Outside())
    )
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(first[0].head_lengths, second[0].head_lengths)
    assert (first[0].head_lengths.sum(1) == HEADS * (12 + STEPS)).all()


def reasons(model: nn.Module, *args: Any) -> set[Reason | None]:
    """Return what became of the attentions of one call."""
    options = {key: value for key, value in OPTIONS.items() if key != "strict"}
    sites = adakv_compile.explain(model, *args, options=options).sites
    return {None if site.refusal is None else site.refusal.reason for site in sites}


def test_weights_that_are_read_are_left_alone() -> None:
    assert reasons(_Static(need_weights=True), torch.randn(2, LENGTH, WIDTH)) == {Reason.SPELLED_OUT}


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_cache_of_inputs_is_left_alone(need_weights: bool) -> None:
    model, x = _Inputs(need_weights=need_weights), torch.randn(2, LENGTH + STEPS, WIDTH)
    with torch.no_grad():
        # All that a prompt gives back is what it was given.
        assert reasons(model, x[:, :LENGTH]) == {Reason.NO_CACHE}
        assert reasons(model, x[:, LENGTH:], x[:, :LENGTH]) == {Reason.CACHE_FORM}
    options = OPTIONS | {"strict": False}
    with pytest.warns(UserWarning, match="CACHE_FORM"):
        found, cache = generate(torch.compile(model, backend="adakv", dynamic=True, options=options), x)
    assert not isinstance(cache, CompressedKV)
    for ours, theirs in zip(found, generate(model, x)[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
