"""Ada-KV (arXiv 2407.11550), Algorithms 1 and 2, as plain loops over lists: slow, exact, to read.

Follows the paper but where its released code differs, which decides: ``alpha`` is the share of the
budget that is uniform (the paper prints the opposite), and the scores are averaged over the window
first, then over the query group, then pooled. What both leave open is fixed as this project does:
budgets are exact (largest remainder, ties to the lower head), and equal scores go to the lower
position, then to the lower head. One batch row, all heads of one layer. Imports nothing of ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

__all__ = [
    "algorithm_1",
    "algorithm_2",
    "mix",
    "observe",
    "pool",
    "pyramid_layers",
    "streaming",
    "uniform",
]

Matrix = Sequence[Sequence[float]]


def observe(
    queries: Sequence[Matrix],
    keys: Sequence[Matrix],
    scale: float,
    visible: Sequence[Sequence[bool]],
    counted: Sequence[bool],
    group_reduction: str,
) -> list[list[float]]:
    """Algorithm 2, lines 1 to 3 without the pooling: scores ``[Hkv][L]``.

    Args:
        queries: ``[Hq][W][D]``, the window's queries.
        keys: ``[Hkv][L][D]``.
        scale: Factor on the logits.
        visible: ``[W][L]``, which key a query may see.
        counted: ``[W]``, which queries are tokens rather than padding.
        group_reduction: ``"mean"`` or ``"max"`` over the query heads of a KV head.
    """
    group = len(queries) // len(keys)
    result: list[list[float]] = []
    for head, head_keys in enumerate(keys):
        members: list[list[float]] = []
        for query_head in range(head * group, (head + 1) * group):
            mean = [0.0] * len(head_keys)
            for row, query in enumerate(queries[query_head]):
                if not counted[row]:
                    continue
                weights = [
                    math.exp(scale * sum(a * b for a, b in zip(query, key, strict=True)))
                    if visible[row][column]
                    else 0.0
                    for column, key in enumerate(head_keys)
                ]
                total = sum(weights)
                for column, weight in enumerate(weights):
                    mean[column] += weight / total / sum(counted) if total else 0.0
            members.append(mean)
        columns = zip(*members, strict=True)
        result.append([sum(c) / group if group_reduction == "mean" else max(c) for c in columns])
    return result


def pool(scores: Sequence[float], kind: str, kernel_size: int) -> list[float]:
    """Pool the scores of a head's candidates, stride 1; beyond the ends there is nothing."""
    reach = kernel_size // 2
    pooled: list[float] = []
    for center in range(len(scores)):
        neighbours = scores[max(0, center - reach) : center + reach + 1]
        pooled.append(max(neighbours) if kind == "max" else sum(neighbours) / kernel_size)
    return pooled


Rank = tuple[float, float]
"""Of a candidate: its pooled score, and what decides between equal ones before the position does."""


def algorithm_1(total: int, scores: Sequence[dict[int, Rank]]) -> list[int]:
    """Return how many of the layer's ``total`` best candidates fall in each head.

    Args:
        total: Budget of the layer.
        scores: For each head, position to rank.
    """
    ranking = sorted(
        (-score, -tie, position, head)
        for head, of_head in enumerate(scores)
        for position, (score, tie) in of_head.items()
    )
    counts = [0] * len(scores)
    for *_, head in ranking[:total]:
        counts[head] += 1
    return counts


def best_of_head(of_head: dict[int, Rank], count: int) -> list[int]:
    """Return the positions of a head's ``count`` best candidates."""
    return sorted(of_head, key=lambda position: (-of_head[position][0], -of_head[position][1], position))[:count]


def uniform(total: int, available: Sequence[int]) -> list[int]:
    """Deal ``total`` entries to the heads in turn, passing over those that have no more."""
    budgets = [0] * len(available)
    while sum(budgets) < total:
        for head, room in enumerate(available):
            if budgets[head] < room and sum(budgets) < total:
                budgets[head] += 1
    return budgets


def mix(alpha: Fraction, uniform_budgets: Sequence[int], counts: Sequence[int]) -> list[int]:
    """The safeguard, ``alpha * uniform + (1 - alpha) * counts``, rounded by largest remainder."""
    exact = [alpha * share + (1 - alpha) * count for share, count in zip(uniform_budgets, counts, strict=True)]
    budgets = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda head: (budgets[head] - exact[head], head))
    for head in by_remainder[: sum(counts) - sum(budgets)]:
        budgets[head] += 1
    return budgets


def algorithm_2(
    scores: Matrix,
    valid: Sequence[Sequence[bool]],
    *,
    total: int,
    window: int,
    alpha: Fraction,
    pool_kind: str,
    kernel_size: int,
    safeguard: str = "soft",
    ties: str = "position",
) -> list[set[int]]:
    """Return the positions that every head keeps.

    Args:
        scores: ``[H][L]``, not pooled.
        valid: ``[H][L]``, False where there is no entry.
        total: Entries to keep over all heads, window included.
        window: The last entries of every head, always kept.
        alpha: Uniform share.
        pool_kind: ``"max"`` or ``"avg"``.
        kernel_size: Width of the pooling.
        safeguard: ``"hard"``: no mixture; of each head the best count first, up to ``alpha`` of its uniform share.
        ties: ``"score"``: of equal pooled scores the higher raw one comes first.
    """
    entries = [[p for p, real in enumerate(of_head) if real] for of_head in valid]
    total = min(total, sum(map(len, entries)))
    kept = [set(of_head[-window:]) for of_head in entries]
    candidates: list[dict[int, Rank]] = []
    for head, of_head in enumerate(entries):
        positions = of_head[:-window]
        pooled = pool([scores[head][p] for p in positions], pool_kind, kernel_size)
        raw = [scores[head][p] if ties == "score" else 0.0 for p in positions]
        candidates.append(dict(zip(positions, zip(pooled, raw, strict=True), strict=True)))
    sure = [max(0, math.floor(alpha * total / len(entries)) - len(of_head)) for of_head in kept]
    total -= sum(map(len, kept))  # line 4
    if safeguard == "hard" and alpha < 1:
        first: list[dict[int, Rank]] = [
            of_head | dict.fromkeys(best_of_head(of_head, least), (math.inf, 0.0))
            for of_head, least in zip(candidates, sure, strict=True)
        ]
        budgets = algorithm_1(max(0, total), first)
        return [of_head | {*best_of_head(*rest)} for of_head, *rest in zip(kept, candidates, budgets, strict=True)]
    counts = algorithm_1(total, candidates)  # line 5
    even = uniform(total, [len(of_head) for of_head in candidates])
    budgets = mix(alpha, even, counts)  # line 6
    for head, of_head in enumerate(candidates):  # lines 7 and 8
        kept[head].update(best_of_head(of_head, budgets[head]))
    return kept


def streaming(valid: Sequence[Sequence[bool]], *, total: int, sinks: int) -> list[set[int]]:
    """StreamingLLM: the first tokens and the last, as many in every head as it has."""
    entries = [[p for p, real in enumerate(of_head) if real] for of_head in valid]
    budgets = uniform(min(total, sum(map(len, entries))), [len(of_head) for of_head in entries])
    kept: list[set[int]] = []
    for of_head, budget in zip(entries, budgets, strict=True):
        first = of_head[: min(sinks, budget)]
        rest = of_head[len(first) :]
        kept.append({*first, *rest[len(rest) - (budget - len(first)) :]})
    return kept


def pyramid_layers(budget: int, window: int, beta: int, num_layers: int, length: int) -> list[Fraction]:
    """PyramidKV's budgets before rounding: on a line whose mean is ``budget``, window included."""
    if length <= budget:
        return [Fraction(length)] * num_layers
    base = budget - window
    lowest = base // beta
    highest = 2 * base - lowest
    if highest > length - window:
        highest = length - window
        lowest = 2 * base - highest
    if num_layers == 1:
        return [Fraction(budget)]
    step = Fraction(highest - lowest, num_layers - 1)
    return [window + highest - layer * step for layer in range(num_layers)]
