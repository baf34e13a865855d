"""The paper's theorems 3.1 to 3.3: the loss is below the bound, and adaptive bounds are lowest."""

from __future__ import annotations

import itertools

import pytest
import torch

from adakv_compile.policy import Policy, select


def attention(seed: int, num_heads: int, length: int, sharpness: float) -> torch.Tensor:
    """Return the weights ``[h, n]`` of one query; heads differ in how concentrated they are."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_heads, length, generator=generator, dtype=torch.float64)
    steep = torch.rand(num_heads, 1, generator=generator, dtype=torch.float64) * sharpness
    return (logits * steep).softmax(-1)


def keep_for(weights: torch.Tensor, budget: int, window: int, alpha: float) -> torch.Tensor:
    """Return what is kept when the scores are the weights themselves."""
    policy = Policy(budget=budget, window=window, kernel_size=1, alpha=alpha)
    return select(policy, weights[None].float())[0]


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("sharpness", [0.5, 3.0, 10.0])
def test_loss_is_within_the_bound(alpha: float, sharpness: float) -> None:
    """``||y - y^||_1 <= 2hC - 2C * sum(kept attention)``, ``C = max_i ||V_i W_i^O||_inf``."""
    num_heads, length, head_dim, dim = 6, 80, 8, 48
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        weights = attention(seed, num_heads, length, sharpness)
        values = torch.randn(num_heads, length, head_dim, generator=generator, dtype=torch.float64)
        output = torch.randn(num_heads, head_dim, dim, generator=generator, dtype=torch.float64)
        projected = values @ output  # V_i W_i^O
        constant = projected.abs().sum(-1).max()
        keep = keep_for(weights, budget=20, window=4, alpha=alpha)
        kept = weights * keep
        full = torch.einsum("hn,hnd->d", weights, projected)
        evicted = torch.einsum("hn,hnd->d", kept / kept.sum(-1, keepdim=True), projected)
        loss = (full - evicted).abs().sum()
        bound = 2 * num_heads * constant - 2 * constant * kept.sum()
        assert 0 < loss <= bound


@pytest.mark.parametrize("sharpness", [0.5, 3.0, 10.0])
def test_adaptive_bound_is_never_above_the_uniform_one(sharpness: float) -> None:
    gains = 0
    for seed in range(50):
        weights = attention(seed, 6, 80, sharpness)
        retained = [
            (weights * keep_for(weights, budget=20, window=4, alpha=alpha)).sum() for alpha in (1.0, 0.5, 0.2, 0.0)
        ]
        # Float32 scores may swap weights that are equal to within their rounding.
        for less, more in itertools.pairwise(retained):
            assert more >= less - 1e-6
        gains += bool(retained[-1] > retained[0] + 1e-3)
    assert gains > 40


def test_global_top_is_the_best_of_all_allocations() -> None:
    """Theorem 3.3 by trying every allocation of 6 entries to 3 heads of 7."""
    for seed in range(10):
        weights = attention(seed, 3, 8, 5.0)
        candidates = weights[:, :-1].sort(descending=True).values
        best = max(
            sum(float(candidates[head, :count].sum()) for head, count in enumerate(split))
            for split in itertools.product(range(7), repeat=3)
            if sum(split) == 6
        )
        keep = keep_for(weights, budget=3, window=1, alpha=0.0)
        assert float((weights * keep)[:, :-1].sum()) == pytest.approx(best, abs=1e-7)
