"""Means with their errors, and whether two models differ. What scipy has is scipy's.

A mean's standard error is over what was drawn at random: documents, questions, training seeds. Chunks of one
document, and samples of one question, are not independent, so that they count as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SIGNIFICANT = 0.05


def ratio(values: np.ndarray, sizes: np.ndarray, groups: np.ndarray) -> tuple[float | None, float | None]:
    """Σ values / Σ sizes, and its standard error over groups (documents), linearised (Cochran 1977, 6.4).

    None where there are no values, and no error for a single group.
    """
    if not len(values):
        return None, None
    mean = values.sum() / sizes.sum()
    residuals = np.bincount(np.unique(groups, return_inverse=True)[1], values - mean * sizes)
    if (n := len(residuals)) < 2:
        return float(mean), None
    error = np.sqrt(n / (n - 1) * np.square(residuals).sum()) / sizes.sum()
    return float(mean), float(error)


def mean(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """Mean and standard error of independent values; no error for a single one."""
    values = np.asarray(values, float)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error


def over_seeds(table: np.ndarray) -> dict[str, Any]:
    """Mean grade of a table (seeds, questions) with its errors.

    `se_questions` is over questions (each the mean of its seeds), `se_seeds` over training seeds, None for one;
    `se` adds their squares: questions and seeds were both drawn. What chance within a question adds is in both,
    so that with seeds `se` is rather too large than too small.
    """
    value, questions = mean(table.mean(0))
    seeds = mean(table.mean(1))[1] if len(table) > 1 else None
    parts = [e for e in (questions, seeds) if e is not None]
    return {
        "value": value,
        "se": math.hypot(*parts) if parts else None,
        "se_questions": questions,
        "se_seeds": seeds,
        "n": int(table.shape[1]),
        "seeds": int(table.shape[0]),
    }


def pass_at(right: int, n: int, k: int) -> float:
    """Probability that of k samples one is right, unbiased from n samples of which `right` are
    (Chen et al. 2021): 1 - C(n - right, k) / C(n, k)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


@dataclass(frozen=True, slots=True)
class Difference:
    """First minus second on the same n items. `low` and `high` end a 95 % interval."""

    value: float
    low: float
    high: float
    p: float
    n: int
    test: str


def paired(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, seed: int = 0) -> Difference:
    """The difference of two models on the same questions.

    Right or wrong answers are tested by McNemar's exact test (binomial on the questions that one alone got right),
    other grades by random exchange within pairs. The interval is a paired bootstrap over questions.
    """
    from scipy import stats

    a, b = np.asarray(first, float), np.asarray(second, float)
    gaps = a - b
    binary = bool(np.isin(np.concatenate([a, b]), (0, 1)).all())
    if binary:
        better, worse = int((gaps > 0).sum()), int((gaps < 0).sum())
        p = float(stats.binomtest(better, better + worse, 0.5).pvalue) if better + worse else 1.0
    else:
        p = _exchanged(gaps, seed)
    low, high = _interval(np.ones(len(gaps)), gaps, seed)
    test = "McNemar, exact" if binary else "permutation"
    return Difference(float(gaps.mean()), low, high, p, len(gaps), test)


def over_training(first: np.ndarray, second: np.ndarray) -> Difference:
    """The difference of two models of several training seeds each, from their grades (seeds, questions) of the same
    questions: Welch's t-test of the seeds' means. What a seed gains or loses it does on all questions at once, which
    no test over questions sees. Where no seed differs from another there is nothing to go by."""
    from scipy import stats

    a, b = first.mean(1), second.mean(1)
    test = f"Welch's t of {len(a)} and {len(b)} training seeds"
    if max(np.ptp(a), np.ptp(b)) < 1e-9:  # what rounding leaves
        return Difference(float(a.mean() - b.mean()), math.nan, math.nan, 1.0, first.shape[1], test)
    found: Any = stats.ttest_ind(a, b, equal_var=False)
    low, high = found.confidence_interval(0.95)
    return Difference(float(a.mean() - b.mean()), float(low), float(high), float(found.pvalue), first.shape[1], test)


def _exchanged(gaps: np.ndarray, seed: int) -> float:
    from scipy import stats

    if len(gaps) < 2 or not gaps.any():
        return 1.0
    found = stats.permutation_test(
        (gaps,), np.mean, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(seed), batch=500
    )
    return float(found.pvalue)


def _interval(sizes: np.ndarray, gaps: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap of Σ gaps / Σ sizes over documents or questions."""
    from scipy import stats

    if len(gaps) < 2:
        return math.nan, math.nan

    def total(g: np.ndarray, s: np.ndarray, axis: int = -1) -> np.ndarray:
        return g.sum(axis) / s.sum(axis)

    found = stats.bootstrap(
        (gaps, sizes), total, paired=True, vectorized=True, n_resamples=4999, method="percentile",
        rng=np.random.default_rng(seed), batch=500,
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def paired_ratio(gaps: np.ndarray, sizes: np.ndarray, groups: np.ndarray, seed: int = 0) -> Difference:
    """Σ gaps / Σ sizes of two models' scores of the same chunks; documents (`groups`) are exchanged and drawn whole."""
    number = np.unique(groups, return_inverse=True)[1]
    by_document, sizes = np.bincount(number, gaps), np.bincount(number, sizes)
    low, high = _interval(sizes, by_document, seed)
    p = _exchanged(by_document, seed)
    return Difference(float(by_document.sum() / sizes.sum()), low, high, p, len(sizes), "permutation of documents")


def significant(differences: Mapping[Any, Difference]) -> dict[Any, float]:
    """p-values adjusted for the number of comparisons (false discovery rate, Benjamini and Hochberg 1995)."""
    from scipy import stats

    if not differences:
        return {}
    adjusted = stats.false_discovery_control([d.p for d in differences.values()])
    return dict(zip(differences, map(float, adjusted), strict=True))
