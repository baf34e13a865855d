"""Eviction policies: score, allocate, select; pure functions composed by :func:`select`."""

from __future__ import annotations

from adakv_compile.policy.allocate import head_budgets, uniform_budgets
from adakv_compile.policy.budget import keeps_all, layer_budget, layer_capacity
from adakv_compile.policy.policy import Gqa, Method, Policy, Pool
from adakv_compile.policy.scores import HIDDEN_LOGIT, pool_scores, window_scores
from adakv_compile.policy.select import select

__all__ = [
    "HIDDEN_LOGIT",
    "Gqa",
    "Method",
    "Policy",
    "Pool",
    "head_budgets",
    "keeps_all",
    "layer_budget",
    "layer_capacity",
    "pool_scores",
    "select",
    "uniform_budgets",
    "window_scores",
]
