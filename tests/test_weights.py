from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from latent_thoughts import weights
from latent_thoughts.types import UserError

logs = nps.arrays(np.float64, st.integers(1, 12), elements=st.floats(-40, 10))


@given(logs)
def test_logsumexp_and_bound_equal_their_definition(log_w: np.ndarray) -> None:
    assert weights.logsumexp(log_w) == pytest.approx(np.log(np.exp(log_w).sum()), abs=1e-9)
    assert weights.bound(log_w) == pytest.approx(np.log(np.exp(log_w).mean()), abs=1e-9)


def test_zero_weights_count_in_k() -> None:
    assert weights.bound(np.array([0.0, -np.inf])) == pytest.approx(np.log(0.5))
    assert weights.bound(np.array([-np.inf, -np.inf])) == -np.inf


@given(logs)
def test_effective_sample_size_lies_between_one_and_k(log_w: np.ndarray) -> None:
    w = np.exp(log_w)
    expected = w.sum() ** 2 / (w**2).sum()
    assert weights.effective_sample_size(log_w) == pytest.approx(expected, rel=1e-9)
    assert 1 - 1e-9 <= expected <= len(log_w) + 1e-9


def test_effective_sample_size_of_nothing_is_zero() -> None:
    assert weights.effective_sample_size(np.full(3, -np.inf)) == 0


def test_mixture_density() -> None:
    q, p = np.log([0.2, 0.5]), np.log([0.4, 0.1])
    assert np.exp(weights.log_mixture(q, p, 0.25)) == pytest.approx([0.25 * 0.2 + 0.75 * 0.4, 0.25 * 0.5 + 0.75 * 0.1])
    assert weights.log_mixture(q, [np.nan, np.nan], 1.0) == pytest.approx(q)
    assert weights.log_mixture([np.nan, np.nan], p, 0.0) == pytest.approx(p)


def test_unfinished_thoughts_weigh_nothing_and_a_failed_score_is_an_error() -> None:
    found = weights.log_weights([-1.0, np.nan], [-2.0, np.nan], [True, False])
    assert found.tolist() == [1.0, -np.inf]
    for bad in (np.nan, -np.inf):
        with pytest.raises(UserError, match="no finite score"):
            weights.log_weights([-1.0, bad], [-2.0, -2.0], [True, True])
    with pytest.raises(UserError, match="no finite score"):
        weights.log_weights([-1.0], [np.inf], [True])


def test_resampling_follows_the_weights() -> None:
    from scipy import stats

    log_w = np.log([0.1, 0.6, 0.3]) - 700  # tiny weights must not underflow
    drawn = [weights.choose(log_w, "abc", "resample", np.random.default_rng(seed))[0] for seed in range(3000)]
    assert stats.chisquare(np.bincount(drawn, minlength=3), [300, 1800, 900]).pvalue > 1e-4


def test_choices() -> None:
    log_w, rng = np.array([-3.0, -1.0, -np.inf]), np.random.default_rng(0)
    assert weights.choose(log_w, "abc", "best", rng) == [1]
    drawn = [weights.choose(log_w, "abc", "uniform", rng)[0] for _ in range(400)]
    assert set(drawn) == {0, 1}
    assert 150 < drawn.count(0) < 250
    assert weights.choose(np.full(2, -np.inf), "ab", "resample", rng) == []


def test_several_thoughts_are_resampled_without_replacement() -> None:
    """Draws 0 and 2 are one thought: P(c, then the rest) = w_c * w / (1 - w_c), and so on; unfinished ones never."""
    from scipy import stats

    log_w, thoughts = np.log([0.1, 0.5, 0.2, 0.2, 1e-300]), "abacd"
    log_w[4] = -np.inf
    rng = np.random.default_rng(0)
    drawn = ["".join(thoughts[n] for n in weights.choose(log_w, thoughts, "resample", rng, 2)) for _ in range(4000)]
    share = {"a": 0.3, "b": 0.5, "c": 0.2}
    expected = {z + y: share[z] * share[y] / (1 - share[z]) for z in share for y in share if z != y}
    assert set(drawn) == set(expected)
    assert stats.chisquare([drawn.count(z) for z in expected], [4000 * p for p in expected.values()]).pvalue > 1e-4
    assert weights.choose(log_w, thoughts, "best", rng, 9) == [1, 2, 3]
    assert sorted(thoughts[n] for n in weights.choose(log_w, thoughts, "uniform", rng, 9)) == ["a", "b", "c"]
