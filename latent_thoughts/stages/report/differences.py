"""How two models differ over seeds, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from latent_thoughts.stages.report.summary import Line, Row, figure


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two lines, paired by seed. `interval` is of 95 %, None where none is known."""

    value: float
    interval: tuple[float, float] | None
    higher: int  # seeds in which the first is above
    seeds: int

    @property
    def settled(self) -> bool:
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def difference(first: Line, second: Line, name: str, least: int = 3) -> Difference | None:
    """Paired by seed; None where no seed has both.

    From `least` seeds on with Student's interval, a single seed with that of its answers. Of accuracies the former is
    no narrower than the latter: a few seeds that happen to agree are no proof.
    """
    pairs = [(row, second.rows.get(seed, {})) for seed, row in first.rows.items()]
    pairs = [(a, b) for a, b in pairs if figure(a, name) is not None and figure(b, name) is not None]
    gaps = [(figure(a, name) or 0.0) - (figure(b, name) or 0.0) for a, b in pairs]
    if not gaps:
        return None
    known = [_over_seeds(gaps), _over_answers(pairs) if name == "accuracy" else None]
    there = [found for found in known if found and (len(gaps) == 1 or len(gaps) >= least)]
    interval = (min(low for low, _ in there), max(high for _, high in there)) if there else None
    return Difference(sum(gaps) / len(gaps), interval, sum(g > 0 for g in gaps), len(gaps))


def _over_seeds(gaps: list[float]) -> tuple[float, float] | None:
    """Student's; None where the gaps do not differ, which tells nothing of other seeds."""
    from scipy import stats  # heavy, and wanted here alone

    if np.ptp(gaps) < 1e-9:  # what rounding leaves
        return None
    low, high = stats.ttest_1samp(gaps, 0.0).confidence_interval()
    return float(low), float(high)


def _over_answers(pairs: list[tuple[Row, Row]]) -> tuple[float, float] | None:
    """Of the difference of two shares, from Wilson's intervals of each, which are sound near 0 and 1 too (Newcombe
    1998, method 10). As if the two were asked different questions. None where it is not known how many were asked."""
    from scipy import stats

    shares = []
    for rows in zip(*pairs, strict=True):
        counts = [int(figure(row, "accuracy_n") or 0) for row in rows]
        if not all(counts):
            return None
        right = sum(round((figure(row, "accuracy") or 0.0) * n) for row, n in zip(rows, counts, strict=True))
        found = stats.binomtest(right, sum(counts)).proportion_ci(method="wilson")
        shares.append((right / sum(counts), float(found.low), float(found.high)))
    (a, a_low, a_high), (b, b_low, b_high) = shares
    return a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low)


def points(found: Difference | None) -> str:
    """A difference of shares in percentage points, with its interval."""
    if found is None:
        return ""
    interval = " ({:+.1f} to {:+.1f})".format(*(100 * end for end in found.interval)) if found.interval else ""
    return f"{100 * found.value:+.1f}{interval}".replace("-", "−")
