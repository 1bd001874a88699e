"""Whether more draws only where the first ones disagree (adaptive K) beat as many draws everywhere (uniform K).

    python benchmarks/adaptive_k.py RUN/iter_01/sample [--repeats 20] [--chunks 1000] [--json FILE]

Reads the log-weights of an E-step's posterior shards (K = 16) and replays both on them. At a budget of B draws a chunk
in the mean, uniform takes B of a chunk's draws; adaptive takes a pilot of 2 everywhere and spends the rest on the
chunks where a figure of the pilot says it is needed, up to all that are left. Figures: the pilot's effective sample
size, its bound's gain over log p(x | c), and the difference of its two log-weights.

- valid: the pilot only decides, and L_K is taken over the draws that come after it: a lower bound on log p(x | c).
- optimistic: the pilot counts too. Then it is no bound, since a lucky pilot stops the drawing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np

from latent_thoughts import weights
from latent_thoughts.store import read_manifest, read_rows

PILOT = 2
Figure = Callable[[np.ndarray, float], float]  # of the pilot's log-weights and log p(x | c): low asks for more draws
FIGURES: dict[str, Figure] = {
    "effective sample size": lambda pilot, raw: weights.effective_sample_size(pilot),
    "gain": lambda pilot, raw: weights.bound(pilot) - raw,
    "difference": lambda pilot, raw: -abs(np.subtract(*pilot)) if np.isfinite(pilot).all() else -np.inf,
}


def mean_bound(log_w: list[np.ndarray], tokens: np.ndarray) -> float:
    """Nats a token, over chunks some of whose draws finished; the others are left out, which favours few draws."""
    bounds = np.array([weights.bound(w) for w in log_w])
    there = np.isfinite(bounds)
    return float(bounds[there].sum() / tokens[there].sum()) if there.any() else -np.inf


def adaptive(
    log_w: np.ndarray, raw: np.ndarray, tokens: np.ndarray, budget: int, figure: Figure, counted: bool
) -> tuple[float, float]:
    """(mean bound, draws a chunk)."""
    chunks, most = log_w.shape
    scores = np.array([figure(w[:PILOT], r) for w, r in zip(log_w, raw, strict=True)])
    least = PILOT  # draws behind the pilot that every chunk needs for a bound of its own
    spare = (budget - PILOT - (0 if counted else least)) * chunks
    more = most - PILOT - (0 if counted else least)
    needy = np.argsort(scores, kind="stable")[: spare // more]
    taken = []
    for n in range(chunks):
        stop = PILOT + (0 if counted else least) + (more if n in set(needy.tolist()) else 0)
        taken.append(log_w[n, (0 if counted else PILOT) : stop])
    drawn = PILOT * chunks * (not counted) + sum(map(len, taken))
    return mean_bound(taken, tokens), drawn / chunks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--chunks", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    manifest = read_manifest(a.stage)
    rows = [
        row for name in manifest.shards if name.startswith("posterior-") for row in read_rows(a.stage, manifest, name)
    ]
    rows = rows[: a.chunks]
    log_w = np.array([row["log_weights"] for row in rows])
    raw = np.array([row["raw_logprob"] for row in rows])
    tokens = np.array([len(row["chunk_ids"]) for row in rows], float)
    rng = np.random.default_rng(0)
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(a.repeats):
        shuffled = rng.permuted(log_w, axis=1)
        for budget in (6, 8):
            uniform = mean_bound(list(shuffled[:, :budget]), tokens)
            found.setdefault(("uniform", f"L at {budget} draws a chunk"), []).append(uniform)
            for name, figure in FIGURES.items():
                for counted in (False, True):
                    kind = f"{'optimistic' if counted else 'valid'}, {name}"
                    value, drawn = adaptive(shuffled, raw, tokens, budget, figure, counted)
                    assert drawn <= budget
                    found.setdefault((kind, f"L at {budget} draws a chunk"), []).append(value)
    table = [common.row(kind, metric, "nats/token", values) for (kind, metric), values in found.items()]
    common.finish("adaptive_k", {"chunks": len(rows)}, table, {}, a.json, settings={"stage": a.stage.name})


if __name__ == "__main__":
    main()
