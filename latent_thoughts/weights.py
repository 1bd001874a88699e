"""Importance weights, resampling and the bound, in plain numpy (method, section 5).

Shapes: K is the number of draws of one chunk. Everything is in nats.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from latent_thoughts.types import UserError


def logsumexp(values: ArrayLike) -> float:
    """log Σ exp(values), -inf for an empty or all -inf input."""
    return float(np.logaddexp.reduce(np.asarray(values, dtype=np.float64)))


def log_mixture(log_posterior: ArrayLike, log_prior: ArrayLike, posterior_share: float) -> np.ndarray:
    """log(a q(z | c, x) + (1 - a) p(z | c)): the density of the mixture proposal (balance heuristic,
    Veach and Guibas 1995). With a = 1 or a = 0 the other density is not looked at."""
    posterior, prior = np.asarray(log_posterior, np.float64), np.asarray(log_prior, np.float64)
    if posterior_share == 1:
        return posterior
    if posterior_share == 0:
        return prior
    return np.logaddexp(np.log(posterior_share) + posterior, np.log1p(-posterior_share) + prior)


def log_weights(log_p: ArrayLike, log_q: ArrayLike, finished: ArrayLike) -> np.ndarray:
    """log w_k = log p(z_k, x | c) - log q(z_k); -inf where the thought is unfinished.

    Raises UserError where a finished draw has no finite score: a failed score is an error.
    """
    log_p, log_q = np.asarray(log_p, np.float64), np.asarray(log_q, np.float64)
    finished = np.asarray(finished, bool)
    if not (np.isfinite(log_p[finished]).all() and np.isfinite(log_q[finished]).all()):
        raise UserError("a finished thought has no finite score")
    return np.where(finished, np.subtract(log_p, log_q, where=finished, out=np.zeros_like(log_p)), -np.inf)


def normalised(log_w: np.ndarray) -> np.ndarray:
    """w_k / Σ w, all zero where every weight is zero."""
    total = logsumexp(log_w)
    return np.exp(log_w - total) if np.isfinite(total) else np.zeros_like(log_w)


def effective_sample_size(log_w: np.ndarray) -> float:
    """(Σ w)² / Σ w², 0 where every weight is zero."""
    share = normalised(log_w)
    return float(1 / np.square(share).sum()) if share.any() else 0.0


def bound(log_w: np.ndarray) -> float:
    """L_K = log((1/K) Σ_k w_k) (importance-weighted bound, Burda et al. 2016)."""
    return logsumexp(log_w) - float(np.log(len(log_w)))


def bound_beside(log_empty: float, log_w: np.ndarray) -> float:
    """L_K of one chunk from groups of K draws, shape (groups, K), and `log_empty` = log p(empty, x | c). Draws of the
    empty thought weigh nothing in `log_w`, as unfinished ones do.

    log w̄ is -inf for a group without a finished thought, and its mean over the other groups alone is no bound. So
    the empty thought's share of the likelihood is not left to chance, but computed. With P̂ the share of groups with
    w̄ > 0,

        L_K = log(p(empty, x | c) + P̂ exp(mean of log w̄ over those groups))

    The geometric mean is at most the arithmetic one: in the brackets stands at most p(empty, x | c) plus the mean
    weight of all draws, whose expectation is at most p(x | c). So E[L_K] <= log p(x | c), by Jensen's inequality.
    """
    bounds = [b for b in map(bound, log_w) if np.isfinite(b)]
    of_thoughts = float(np.mean(bounds) + np.log(len(bounds) / len(log_w))) if bounds else -np.inf
    return float(np.logaddexp(log_empty, of_thoughts))


def choose(
    log_w: np.ndarray, thoughts: Sequence[Hashable], method: str, rng: np.random.Generator, keep: int = 1
) -> list[int]:
    """Indices of up to `keep` chosen draws whose thoughts differ, one after the other without replacement.

    `resample` ∝ w, `best` argmax w, `uniform` any finished one. Empty where every weight is zero.
    """
    left, chosen = log_w.copy(), []
    while len(chosen) < keep and (share := normalised(left)).any():
        if method == "uniform":
            share = np.isfinite(left) / np.isfinite(left).sum()
        n = int(share.argmax()) if method == "best" else int(rng.choice(len(share), p=share / share.sum()))
        chosen.append(n)
        left[[thought == thoughts[n] for thought in thoughts]] = -np.inf
    return chosen
