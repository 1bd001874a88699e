"""Errors and tests against simulation and against independent formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from latent_thoughts.stages.evaluate import statistics


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    for n, right in itertools.product(range(1, 7), range(7)):
        if right > n:
            continue
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
            assert statistics.pass_at(right, n, k) == pytest.approx(np.mean([any(s) for s in subsets]))


def test_mcnemar_counts_the_questions_that_one_alone_got_right() -> None:
    first = np.array([1] * 30 + [1] * 15 + [0] * 4 + [0] * 51)
    second = np.array([1] * 30 + [0] * 15 + [1] * 4 + [0] * 51)
    found = statistics.paired(first, second)
    assert found.test.startswith("McNemar") and found.n == 100
    assert found.p == pytest.approx(2 * stats.binom.cdf(4, 19, 0.5))
    assert found.value == pytest.approx(0.11) and found.low < 0.11 < found.high
    assert found.low > 0  # the same verdict as the test's
    same = statistics.paired(first, first)
    assert same.p == 1 and same.value == same.low == same.high == 0


def test_graded_means_are_tested_by_exchange() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 5, 80) / 4
    b = np.clip(a - rng.integers(0, 2, 80) / 4, 0, 1)
    found = statistics.paired(a, b)
    assert found.test == "permutation" and found.p < 1e-3
    assert found.p == pytest.approx(stats.wilcoxon(a, b).pvalue, abs=2e-3)


def test_equal_models_are_seldom_called_different() -> None:
    """At 5 % an exact test says so of at most 5 % of pairs that do not differ."""
    rng = np.random.default_rng(1)
    calls = [statistics.paired(*rng.integers(0, 2, (2, 40))).p < 0.05 for _ in range(60)]
    assert np.mean(calls) <= 0.12


def test_errors_over_seeds_and_questions() -> None:
    """The variance of the mean over questions and seeds that were both drawn."""
    rng = np.random.default_rng(2)

    def drawn() -> np.ndarray:
        return 0.5 + rng.normal(0, 0.2, (5, 1)) + rng.normal(0, 0.5, (1, 40)) + rng.normal(0, 0.1, (5, 40))

    truth = np.std([drawn().mean() for _ in range(2000)])
    errors = [statistics.over_seeds(drawn())["se"] for _ in range(200)]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(truth, rel=0.1)
    one = statistics.over_seeds(np.array([[1.0, 0, 0, 1]]))
    assert one["seeds"] == 1 and one["se_seeds"] is None and one["n"] == 4
    assert one["se"] == pytest.approx(np.std([1, 0, 0, 1], ddof=1) / 2)


def test_documents_are_drawn_whole() -> None:
    """Ten chunks that always agree are one piece of evidence, not ten."""
    rng = np.random.default_rng(3)
    gaps, sizes = rng.normal(0.02, 0.1, 30), np.full(30, 10.0)
    alone = statistics.paired_ratio(gaps, sizes, np.arange(30))
    copied = statistics.paired_ratio(np.repeat(gaps, 10), np.repeat(sizes, 10), np.repeat(np.arange(30), 10))
    assert (copied.n, copied.value) == (alone.n, pytest.approx(alone.value))
    assert copied.p == pytest.approx(alone.p, abs=0.02)
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_equal_models_of_several_seeds_are_seldom_called_different() -> None:
    """Seeds that vary by 3 points: a test over questions calls a third of equal pairs different."""
    rng, base = np.random.default_rng(1), np.random.default_rng(2).beta(1, 2, 500)

    def model() -> np.ndarray:
        return np.array([rng.random(500) < np.clip(base + gain, 0, 1) for gain in rng.normal(0, 0.03, 5)], float)

    found = [statistics.over_training(model(), model()) for _ in range(100)]
    assert np.mean([d.p < 0.05 for d in found]) <= 0.1
    assert np.mean([d.low < 0 < d.high for d in found]) >= 0.9
    same = statistics.over_training(np.ones((2, 4)), np.ones((2, 4)))
    assert same.p == 1 and same.value == 0


def test_seeds_that_differ_by_rounding_alone_tell_nothing() -> None:
    """Means of 0.3, of which the sums end otherwise in another order, gave p = 1e-25."""
    rng = np.random.default_rng(0)
    grades = np.repeat([0.1, 0.2, 0.3, 0.6], 175)
    first, second = (np.array([rng.permutation(grades) for _ in range(20)]) for _ in range(2))
    assert np.ptp(first.mean(1)) > 0  # else there is nothing to test
    found = statistics.over_training(first, second + 0.001)
    assert found.p == 1 and found.value == pytest.approx(-0.001) and np.isnan(found.low)


def test_a_single_document_has_no_error_and_shows_no_difference() -> None:
    one = np.array([3.0, 5.0]), np.array([2.0, 2.0]), np.array(["a", "a"])
    assert statistics.ratio(*one) == (2.0, None)
    for found in (statistics.paired([0.3], [0.1]), statistics.paired_ratio(np.array([0.2]), np.ones(1), np.zeros(1))):
        assert found.value == pytest.approx(0.2) and found.p == 1 and math.isnan(found.low)


def test_many_comparisons_raise_p() -> None:
    differences = {n: statistics.Difference(0.1, 0, 0.2, p, 100, "") for n, p in enumerate([0.01, 0.04, 0.5, 0.9])}
    found = statistics.significant(differences)
    assert found[0] == pytest.approx(0.04) and found[1] == pytest.approx(0.08)
    assert statistics.significant({}) == {}
