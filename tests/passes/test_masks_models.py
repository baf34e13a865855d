"""The masks of transformers' own decoders, captured by Dynamo during ``generate``: every step of every layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from adakv_compile import _torch
from adakv_compile.passes.masks import MaskKind, MaskProof, MaskProver
from adakv_compile.passes.nodes import arg, shape_of
from adakv_compile.symbolic.evaluate import evaluate_proof

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = 6


@dataclass(frozen=True)
class Seen:
    """One attention of one captured graph."""

    queries: int | torch.SymInt
    keys: int | torch.SymInt
    proof: MaskProof

    @property
    def is_self_causal(self) -> bool:
        return self.proof.is_self_causal(self.queries, self.keys)


class Spy:
    """A backend that proves the masks and runs the graph, checking each proof against the mask of each call."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.checked = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        mode = _torch.fake_mode_of_this_compile()
        assert mode is not None
        placeholders = gm.graph.find_nodes(op="placeholder")
        fakes = [n.meta.get("example_value", e) for n, e in zip(placeholders, example_inputs, strict=True)]
        module, _, _ = _torch.capture(gm, fakes, mode)
        prover, checks = MaskProver(module.graph), []
        for site in module.graph.find_nodes(
            op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
        ):
            mask, causal = arg(site, 3, "attn_mask"), bool(arg(site, 5, "is_causal", False))
            queries, keys = shape_of(site.args[0])[2], shape_of(site.args[1])[2]
            proof = prover.prove(mask, is_causal=causal, q_len=queries, kv_len=keys)
            self.seen.append(Seen(queries, keys, proof))
            if mask is not None and proof.proved:
                checks.append((mask, site.args[0], proof))
        runner = _Checker(module, fakes, checks, self)
        return runner.run_and_check(gm)


class _Checker(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, fakes: list[Any], checks: list[Any], spy: Spy) -> None:
        super().__init__(module)
        self.fakes, self.checks, self.spy = fakes, checks, spy
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[n.name] = result.clone()
        return result

    def run_and_check(self, gm: fx.GraphModule) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            # On copies: the graph may change its inputs.
            self.run(*copy.deepcopy(args))
            symbols = {
                str(fake): real for fake, real in zip(self.fakes, args, strict=True) if isinstance(fake, torch.SymInt)
            }
            for fake, real in zip(self.fakes, args, strict=True):
                if isinstance(real, Tensor):
                    named = zip(fake.shape, real.shape, strict=True)
                    symbols.update({str(s): size for s, size in named if isinstance(s, torch.SymInt)})
            for mask, query, proof in self.checks:
                shape = (self.values[query.name].shape[0], *self.values[mask.name].shape[-2:])
                proved = evaluate_proof(proof, shape, self.values, symbols)
                real = self.values[mask.name]
                assert torch.equal(proved, real.expand(proved.shape))
                self.spy.checked += 1
            return gm.forward(*args)

        return call


def tiny(model_type: str, **extra: Any) -> nn.Module:
    config = AutoConfig.for_model(model_type, **{**SIZES, **extra})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def generate(model: nn.Module, *, padded: bool, lengths: tuple[int, ...] = (4, 10), **kwargs: Any) -> Spy:
    spy = Spy()
    model.compile(backend=spy)
    for length in lengths:
        ids = torch.randint(2, 61, (2, length))
        mask = torch.ones_like(ids)
        if padded:
            mask[0, :3] = 0
        with torch.no_grad():
            model.generate(ids, attention_mask=mask if padded else None, max_new_tokens=5, do_sample=False, **kwargs)
    return spy


CAUSAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "gpt_neox": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("model_type", CAUSAL)
def test_padded_batches_are_proved(model_type: str) -> None:
    spy = generate(tiny(model_type, **CAUSAL[model_type]), padded=True)
    assert len(spy.seen) >= 3  # prefill, decode, and decode at any length
    for seen in spy.seen:
        assert seen.proof.kind is MaskKind.CAUSAL, seen.proof.reason
        assert seen.is_self_causal
        assert seen.proof.padding is not None
        assert seen.proof.padding.holder is not None
    assert any(isinstance(seen.keys, torch.SymInt) for seen in spy.seen)
    assert spy.checked >= 8


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unpadded_prompts_have_no_mask_or_one_of_ones() -> None:
    spy = generate(tiny("llama"), padded=False)
    assert all(seen.is_self_causal for seen in spy.seen)
    # transformers 5.17 hands a mask over under compilation, 5.23 none.
    (masked,) = {seen.proof.padding is not None for seen in spy.seen}
    assert not masked or tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
    kinds = {MaskKind.CAUSAL} if masked else {MaskKind.CAUSAL, MaskKind.FULL}
    assert {seen.proof.kind for seen in spy.seen} == kinds


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sliding_windows_are_proved(padded: bool) -> None:
    """Before and after the window is full: then the cache's first column is no longer position zero."""
    spy = generate(tiny("mistral", sliding_window=WINDOW), padded=padded)
    assert all(seen.is_self_causal for seen in spy.seen), [str(seen.proof) for seen in spy.seen]
    windows = [seen.proof.window for seen in spy.seen if seen.proof.kind is MaskKind.SLIDING_WINDOW]
    assert windows
    assert set(windows) == {WINDOW}
    if padded:
        offsets = [seen.proof.padding.column_offset for seen in spy.seen if seen.proof.padding is not None]
        assert len(offsets) == len(spy.seen)
        assert any(offset != 0 for offset in offsets)
        assert spy.checked >= 8


def test_a_static_cache_counts_in_a_tensor() -> None:
    """Causal from a position that only the device knows: told as such, and not as self-causal."""
    model = tiny("llama")
    spy = Spy()
    model.compile(backend=spy)
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids = torch.randint(2, 61, (2, 5))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert spy.seen
    for seen in spy.seen:
        assert not seen.is_self_causal or seen.keys == seen.queries
        if seen.proof.proved and seen.queries == 1:
            why = seen.proof.why_not_self_causal(seen.queries, seen.keys) or ""
            assert "read from a tensor" in why


def test_a_refusal_names_the_users_line() -> None:
    spy = Spy()

    @torch.compile(backend=spy)
    def attend(q: Tensor) -> Tensor:
        keep = torch.rand(q.shape[2], q.shape[2]) > 0.5  # the culprit
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=keep)

    with torch.no_grad():
        attend(torch.randn(1, 1, 4, 8))
    (seen,) = spy.seen
    assert seen.proof.kind is MaskKind.UNPROVEN
    assert seen.proof.where is not None
    assert "# the culprit" in seen.proof.where.code
