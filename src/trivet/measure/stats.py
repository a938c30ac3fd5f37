"""Estimates with honest uncertainty, without torch or numpy.

wilson     95% interval of a share k/n (Wilson 1927): behaves at 0, at 1 and for small n
bootstrap  interval of a mean over questions, each answered n times: questions are drawn anew,
           because answers to one question are not independent
pass@k     1 - C(n-c, k) / C(n, k): unbiased (Chen et al., arXiv 2107.03374)
maj@k      share of size-k subsets of the answers whose majority is right, ties shared evenly
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations

Z = 1.959963984540054  # of a two-sided 95% interval
SUBSETS = 2000  # maj@k looks at all subsets up to this many, else at this many drawn ones


def wilson(right: float, count: int, z: float = Z) -> tuple[float, float]:
    """Interval of the share right/count. Raises ValueError unless 0 <= right <= count, count > 0."""
    if count <= 0 or not 0 <= right <= count:
        raise ValueError(f"a share needs 0 <= right <= count and count > 0, got {right} of {count}")
    p, shrink = right / count, 1 + z * z / count
    middle = (p + z * z / (2 * count)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low = 0.0 if right == 0 else max(0.0, middle - half)  # exact at the ends, where rounding is not
    return low, 1.0 if right == count else min(1.0, middle + half)


def bootstrap(per_question: Sequence[float], seed: int = 0, draws: int = 1000) -> tuple[float, float]:
    """95% percentile interval of the mean, drawing questions with replacement."""
    if not per_question:
        raise ValueError("no questions")
    rng, n = random.Random(seed), len(per_question)
    means = sorted(math.fsum(rng.choices(per_question, k=n)) / n for _ in range(draws))
    return means[round(0.025 * (draws - 1))], means[round(0.975 * (draws - 1))]


def pass_at(k: int, count: int, right: int) -> float:
    """Chance that at least one of k answers, drawn from `count` with `right` right ones, is right."""
    if not 0 < k <= count or not 0 <= right <= count:
        raise ValueError(f"pass@{k} needs at least {k} answers, got {count} ({right} right)")
    return 1.0 - math.comb(count - right, k) / math.comb(count, k)


def maj_at(k: int, answers: Sequence[Hashable], right: Sequence[bool], seed: int = 0) -> float:
    """Chance that the most frequent of k drawn answers is right; answers tied for it share evenly.

    All subsets of size k when there are at most SUBSETS, else that many drawn ones (seeded).
    """
    n = len(answers)
    if len(right) != n or not 0 < k <= n:
        raise ValueError(f"maj@{k} needs at least {k} answers, got {n}")
    if math.comb(n, k) <= SUBSETS:
        subsets = list(combinations(range(n), k))
    else:
        rng = random.Random(seed)
        subsets = [tuple(rng.sample(range(n), k)) for _ in range(SUBSETS)]
    return math.fsum(_majority(subset, answers, right) for subset in subsets) / len(subsets)


def _majority(subset: Sequence[int], answers: Sequence[Hashable], right: Sequence[bool]) -> float:
    votes = Counter(answers[i] for i in subset)
    most = max(votes.values())
    winners = {answer for answer, n in votes.items() if n == most}
    is_right = {answers[i]: right[i] for i in subset}
    return sum(is_right[w] for w in winners) / len(winners)
