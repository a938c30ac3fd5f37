"""Estimators against closed forms and brute force."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from trivet.measure.stats import Z, bootstrap, maj_at, pass_at, wilson


def test_wilson_solves_its_own_equation() -> None:
    """The bounds are the p for which the observed share is exactly z standard errors away."""
    for right, count in ((7, 20), (1, 512), (300, 512), (19, 20)):
        share = right / count
        for bound in wilson(right, count):
            assert abs(share - bound) == pytest.approx(Z * (bound * (1 - bound) / count) ** 0.5, rel=1e-9)
    low, high = wilson(0, 10)
    assert low == 0 and high == pytest.approx(Z * Z / (10 + Z * Z))  # closed form at 0
    assert wilson(10, 10) == pytest.approx((1 - high, 1.0))
    with pytest.raises(ValueError):
        wilson(3, 0)


def test_wilson_covers_and_a_wrong_z_does_not() -> None:
    rng = random.Random(0)

    def coverage(z: float) -> float:
        hits = 0
        for _ in range(2000):
            low, high = wilson(sum(rng.random() < 0.1 for _ in range(60)), 60, z)
            hits += low <= 0.1 <= high
        return hits / 2000

    assert 0.93 < coverage(Z) < 0.98
    assert coverage(1.0) < 0.8  # the twin


def test_bootstrap_is_near_the_normal_interval_and_widens_with_clusters() -> None:
    rng = random.Random(1)
    per_question = [sum(rng.random() < 0.5 for _ in range(4)) / 4 for _ in range(400)]
    mean = sum(per_question) / 400
    sd = (sum((x - mean) ** 2 for x in per_question) / 400) ** 0.5
    low, high = bootstrap(per_question)
    assert low == pytest.approx(mean - Z * sd / 20, abs=0.006)
    assert high == pytest.approx(mean + Z * sd / 20, abs=0.006)
    assert bootstrap(per_question) == (low, high)  # seeded
    assert bootstrap(per_question, seed=1) != (low, high)
    # 400 questions that are all right or all wrong on 4 tries: as uncertain as 400 tries, not 1600
    clustered = [float(rng.random() < 0.5) for _ in range(400)]
    wide = bootstrap(clustered)
    assert wide[1] - wide[0] > 1.7 * (high - low)


def test_pass_at_k_counts_subsets() -> None:
    for n, right, k in ((5, 2, 1), (5, 2, 3), (8, 1, 4), (6, 0, 2), (6, 5, 2)):
        subsets = list(combinations([True] * right + [False] * (n - right), k))
        assert pass_at(k, n, right) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    assert pass_at(1, 16, 4) == 0.25
    biased = 1 - (1 - 2 / 5) ** 3  # the usual wrong estimator differs
    assert abs(pass_at(3, 5, 2) - biased) > 0.1
    with pytest.raises(ValueError):
        pass_at(4, 3, 1)


def test_maj_at_k() -> None:
    answers, right = ["a", "a", "b", "c"], [True, True, False, False]
    # pairs: aa right; ab x2, ac x2 ties of two: 1/2 each; bc wrong: (1 + 4 x 1/2) / 6
    assert maj_at(2, answers, right) == pytest.approx(0.5)
    # triples: aab, aac right; abc x2 ties of three: (2 + 2/3) / 4
    assert maj_at(3, answers, right) == pytest.approx((2 + 2 / 3) / 4)
    assert maj_at(4, answers, right) == 1.0
    assert maj_at(1, answers, right) == 0.5  # maj@1 is the mean
    many, truth = ["x"] * 18 + ["y"] * 12, [True] * 18 + [False] * 12
    # 30 choose 5 subsets are too many: sampled. P(at least 3 of 5 are x), hypergeometric
    from math import comb

    exact = sum(comb(18, i) * comb(12, 5 - i) for i in (3, 4, 5)) / comb(30, 5)
    assert maj_at(5, many, truth) == pytest.approx(exact, abs=0.03)
    assert abs(maj_at(5, many, truth) - 0.6) > 0.05  # not simply the mean
