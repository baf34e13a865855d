"""How many entries a layer keeps: one formula for ints, SymInts and tensors, no state."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from adakv_compile.policy.policy import Policy

__all__ = ["keeps_all", "layer_budget", "layer_capacity"]

Length = TypeVar("Length", int, torch.SymInt, torch.Tensor)
# Inside, the kinds mix freely (an int and a tensor give a tensor), which no annotation of ours
# could follow.
_Size = Any


def layer_budget(policy: Policy, length: Length) -> Length:
    """Return the entries that a layer keeps per KV head, window included.

    A length no longer than the budget is kept whole. The pyramid (PyramidKV; Ada-KV, section 4)
    gives layer ``l`` of ``n`` a linear share between ``hi`` (first layer) and ``2 * base - hi``
    (last), where ``base`` is the mean without the window. A layer and its mirror image average to
    ``base``, so rounding the first half to the nearest integer and mirroring it makes the layers
    sum to ``n * base`` exactly and never increase with depth. (The reference code truncates the
    step, which overdraws the budget by up to 11 %, and latches on the first prompt.)

    Args:
        policy: The layer's policy.
        length: Logical length in tokens: an int, a SymInt (no guard is added), or an integer tensor
            of any shape.

    Returns:
        Entries per KV head, of the kind (and shape) of ``length``; at most ``length``.
    """
    nominal: _Size = _nominal(policy, length)
    if not policy.pyramid or policy.num_layers == 1:
        return _least(length, nominal)
    base = nominal - policy.window
    # No layer keeps more than there is: what the first layers cannot use goes to the last ones.
    # (The maximum keeps ``above`` from going negative, where integer divisions may disagree.)
    available = _greatest(length, nominal) - policy.window
    above: _Size = _least(available, 2 * base - base // policy.beta) - base
    steps = policy.num_layers - 1
    depth = min(policy.layer, steps - policy.layer)
    # Distance from the mean: 2 * above * (1/2 - depth / steps), rounded to the nearest integer.
    distance = above - (4 * above * depth + steps) // (2 * steps)
    share = base + distance if policy.layer == depth else base - distance
    return _least(length, share + policy.window)


def layer_capacity(policy: Policy, length: Length) -> Length:
    """Return the most entries per KV head that a row of at most ``length`` tokens keeps.

    The maximum of :func:`layer_budget` over all lengths up to ``length`` (for pyramids with a float
    budget, at most one entry more). It differs from ``layer_budget(policy, length)`` only in the
    upper layers of a pyramid: they keep a short row whole, and of a long row less than that.

    Args:
        policy: The layer's policy.
        length: Largest logical length of a row, in tokens.

    Returns:
        Entries per KV head, of the kind of ``length``; at least ``layer_budget(policy, length)``.
    """
    budget = layer_budget(policy, length)
    if not policy.pyramid or 2 * policy.layer < policy.num_layers:
        return budget
    if policy.share is None:
        return _greatest(budget, _least(length, int(policy.budget)))
    # Flooring ``share * length`` can make one token more cost an upper layer one entry, never two.
    return _least(length, _greatest(budget + 1, policy.floor))


def keeps_all(policy: Policy, length: int) -> bool:
    """Say whether every row of at most ``length`` tokens is kept whole, whatever the scores are.

    Up to the layers' mean budget nothing is evicted in any of them, pyramid or not, and what holds for a length holds
    for all shorter ones.

    Args:
        policy: The layer's policy.
        length: Largest logical length of a row, in tokens.
    """
    return length <= _nominal(policy, length)


def _nominal(policy: Policy, length: _Size) -> _Size:
    """Mean budget of the layers, not yet limited by the length."""
    share = policy.share
    if share is None:
        return int(policy.budget)
    return _greatest(length * share.numerator // share.denominator, policy.floor)


def _least(left: _Size, right: _Size) -> _Size:
    if isinstance(left, torch.Tensor):
        return torch.clamp(left, max=right)
    return torch.sym_min(left, right)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]


def _greatest(left: _Size, right: _Size) -> _Size:
    if isinstance(left, torch.Tensor):
        return torch.clamp(left, min=right)
    return torch.sym_max(left, right)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
