"""Which entries stay: the one selection behind prefill, chunked prefill and later turns."""

from __future__ import annotations

import torch

from adakv_compile.policy.allocate import head_budgets, uniform_budgets
from adakv_compile.policy.budget import layer_budget
from adakv_compile.policy.policy import Policy
from adakv_compile.policy.scores import pool_scores

__all__ = ["select", "streaming_mask", "top_mask"]

_INT32_MIN = -(1 << 31)
_INT32_MAX = (1 << 31) - 1


def select(
    policy: Policy,
    scores: torch.Tensor,
    valid: torch.Tensor | None = None,
    *,
    protected: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return which entries every head keeps.

    The protected entries stay; of the others, pooled scores pick the row's global best (Ada-KV,
    Algorithm 1), the counts of those per head are mixed with the uniform share
    (:func:`~adakv_compile.policy.allocate.head_budgets`), and each head keeps its best entries
    within its budget (Algorithm 2). With a hard safeguard the best of every head count as the best
    of all instead, and nothing is mixed. A row keeps exactly ``total`` entries. Ties go to the
    lower position, unless they go by the raw score first, and then to the lower head. Rows are
    independent of each other. Nothing here depends on the values of a tensor but values: no
    data-dependent shape, no host synchronisation.

    Args:
        policy: What to keep.
        scores: ``[B, H, L]``, raw (not pooled), computed in float32 whatever the model's dtype.
            The index along ``L`` stands for the position: it decides ties and who pools with whom.
            Heads that hold different entries may come packed (their neighbours are then the
            adjacent held entries) or at their logical positions (what was evicted is then not
            valid, and ties between heads are exact). NaN ranks lowest and does not spread.
        valid: Bool ``[B, H | 1, L]``, False where there is no entry that could be kept: padding on
            either side, or an entry out of reach of a sliding window. Pooling sees those as out of
            range. None: all are entries.
        protected: Bool ``[B, H | 1, L]``, entries that always stay (where valid) and are not pooled
            over. None: the last ``policy.window`` valid ones of every head. Not used by
            ``"streamingllm"``, which goes by order alone.
        total: Int ``[B]``, entries to keep over all heads of a row, the protected ones included;
            raised to their number and lowered to the number of valid entries where need be. None:
            the sum over the heads of :func:`~adakv_compile.policy.budget.layer_budget` of their
            number of valid entries.

    Returns:
        Bool ``[B, H, L]``.
    """
    batch, num_heads, length = scores.shape
    if valid is None:
        valid = torch.ones((batch, 1, length), dtype=torch.bool, device=scores.device)
    num_valid = valid.sum(-1).expand(batch, num_heads)
    if total is None:
        total = layer_budget(policy, num_valid).sum(-1)
    total = total.to(torch.int64).minimum(num_valid.sum(-1))
    if policy.method == "streamingllm":
        return streaming_mask(valid, uniform_budgets(total, num_valid), policy.sinks)
    if protected is None:
        protected = _latest(valid, policy.window)
    protected = (protected & valid).expand(scores.shape)
    candidates = valid & ~protected
    available = candidates.sum(-1)
    num_protected = protected.sum(-1)
    share = policy.uniform_share
    least = (share.numerator * total // (share.denominator * num_heads))[:, None] - num_protected
    total = (total - num_protected.sum(-1)).clamp(min=0)
    keys, raw = _rank_keys(policy, scores, candidates)
    if share == 1:
        return protected | top_mask(keys, uniform_budgets(total, available), raw)
    hard = policy.safeguard == "hard"
    ranked = keys
    if hard:
        ranked = keys.masked_fill(top_mask(keys, least.clamp(min=0).minimum(available), raw), _INT32_MAX)
    # Position-major, so that ties go to the lower position and then to the lower head.
    best = top_mask(_by_position(ranked), total, None if raw is None else _by_position(raw))
    counts = best.view(batch, length, num_heads).sum(1)
    budgets = counts if hard else head_budgets(policy, counts, total, available)
    return protected | top_mask(keys, budgets, raw)


def streaming_mask(valid: torch.Tensor, budgets: torch.Tensor, sinks: int) -> torch.Tensor:
    """Return what StreamingLLM keeps: the first ``sinks`` valid entries of a head and the latest.

    Args:
        valid: Bool ``[B, H | 1, L]``.
        budgets: Int64 ``[B, H]``, entries to keep per head, at most its valid ones.
        sinks: Entries to keep at the start; a smaller budget keeps only sinks.

    Returns:
        Bool ``[B, H, L]``.
    """
    first = budgets.clamp(max=sinks)[..., None]
    rank = valid.cumsum(-1)
    latest = rank[..., -1:] - rank < budgets[..., None] - first
    return valid & ((rank <= first) | latest)


def top_mask(keys: torch.Tensor, counts: torch.Tensor, ties: torch.Tensor | None = None) -> torch.Tensor:
    """Return the ``counts`` largest keys along the last dimension, ties to the lower index.

    A radix selection: four histograms of eight bits each. On CPU it is several times as fast as
    sorting, and unlike ``topk`` it takes every row's own count without reading it on the host.

    Args:
        keys: Int32 ``[..., N]``.
        counts: Int64 ``[...]``, from 0 to ``N``.
        ties: Int32 ``[..., N]``, above its minimum wherever a key may be taken: of equal keys those
            with the largest are taken, and only what is equal in both goes by the index.

    Returns:
        Bool ``[..., N]``, exactly ``counts`` True in every row.
    """
    missing = counts[..., None]
    bins = torch.zeros((*counts.shape, 256), dtype=torch.int32, device=keys.device)
    digits = (keys >> 24) + 128
    active = torch.ones_like(keys)
    threshold = torch.zeros_like(missing)
    for shift in (24, 16, 8, 0):
        if shift != 24:
            digits = (keys >> shift) & 255
            active = (keys >> (shift + 8) == threshold).to(torch.int32)
        histogram = bins.scatter_add(-1, digits.to(torch.int64), active)
        reached = histogram.flip(-1).cumsum(-1).flip(-1)
        # The largest digit that as many keys as are missing reach; the keys above it are taken.
        digit = (reached >= missing).sum(-1, keepdim=True) - 1
        missing = missing - (reached - histogram).gather(-1, digit)
        threshold = (digit - 128 if shift == 24 else threshold * 256 + digit).to(torch.int32)
    equal = keys == threshold
    if ties is None:
        return (keys > threshold) | (equal & (equal.cumsum(-1) <= missing))
    return (keys > threshold) | (equal & top_mask(ties.masked_fill(~equal, _INT32_MIN), missing[..., 0]))


def _latest(valid: torch.Tensor, count: int) -> torch.Tensor:
    """Return the last ``count`` True entries along the last dimension (all if there are fewer)."""
    rank = valid.cumsum(-1)
    return valid & (rank[..., -1:] - rank < count)


def _by_position(keys: torch.Tensor) -> torch.Tensor:
    """Return ``[B, H, L]`` as ``[B, L * H]``."""
    return keys.mT.reshape(keys.shape[0], -1)


def _rank_keys(
    policy: Policy, scores: torch.Tensor, candidates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return int32 keys that order by pooled score, then NaN, then what is no candidate; and those of raw scores."""
    scores = scores.to(torch.float32)
    counted = candidates & ~scores.isnan()
    outside = -torch.inf if policy.pool == "max" else 0.0
    pooled = pool_scores(scores.masked_fill(~counted, outside), kind=policy.pool, kernel_size=policy.kernel_size)
    keys = _ordered(pooled).masked_fill(~counted | pooled.isnan(), _INT32_MIN + 1)
    raw = _ordered(scores).masked_fill(~counted, _INT32_MIN + 1) if policy.ties == "score" else None
    return keys.masked_fill(~candidates, _INT32_MIN), raw


def _ordered(scores: torch.Tensor) -> torch.Tensor:
    """Return float32 numbers as int32 ones of the same order."""
    bits = scores.masked_fill(scores == 0, 0.0).view(torch.int32)  # -0.0 ties with 0.0
    # Floats order as sign and magnitude; flipping the negative ones makes that two's complement.
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
