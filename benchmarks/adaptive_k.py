"""Whether more draws only where the first ones disagree (adaptive K) beat as many draws everywhere (uniform K).

    python benchmarks/adaptive_k.py RUN/iter_01/sample RUN/iter_00/train [--repeats 20] [--chunks 1000] [--json FILE]

Reads the log-weights of an E-step's posterior shards (K = 16) and replays both on them. At a budget of B draws a chunk
in the mean, uniform takes B of a chunk's draws; adaptive takes a pilot of 2 everywhere and spends the rest on the
chunks where a figure of the pilot says it is needed, up to all that are left. Figures: the pilot's effective sample
size, its bound's gain over log p(x | c), and the difference of its two log-weights. L_K is that of held-out text
(`weights.bound_beside`), for which the model that drew computes the empty thought's part, so that no chunk is left out.

- valid: the pilot only decides, and L_K is taken over the draws that come after it: a lower bound on log p(x | c).
- optimistic: the pilot counts too. Then it is no bound, since a lucky pilot stops the drawing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import common
import numpy as np

from latent_thoughts import model as models
from latent_thoughts import weights
from latent_thoughts.config import Model
from latent_thoughts.data import format
from latent_thoughts.engines.base import ScoreRequest, Scoring, ask
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.store import read_manifest, read_rows

PILOT = 2
Figure = Callable[[np.ndarray, float], float]  # of the pilot's log-weights and log p(x | c): low asks for more draws
FIGURES: dict[str, Figure] = {
    "effective sample size": lambda pilot, raw: weights.effective_sample_size(pilot),
    "gain": lambda pilot, raw: weights.bound(pilot) - raw,
    "difference": lambda pilot, raw: -abs(np.subtract(*pilot)) if np.isfinite(pilot).all() else -np.inf,
}


@dataclass(frozen=True)
class Chunks:
    """Of every chunk: log-weights (chunks, K), log p(x | c), log p(empty, x | c), and tokens."""

    log_w: np.ndarray
    raw: np.ndarray
    empty: np.ndarray
    tokens: np.ndarray

    def mean_bound(self, taken: Sequence[np.ndarray]) -> float:
        """Nats a token, of the log-weights that are taken of every chunk."""
        bounds = [weights.bound_beside(empty, w[None]) for empty, w in zip(self.empty, taken, strict=True)]
        return float(sum(bounds) / self.tokens.sum())


def read(stage: Path, trained: Path, most: int) -> Chunks:
    manifest = read_manifest(stage)
    names = [name for name in manifest.shards if name.startswith("posterior-")]
    rows = [row for name in names for row in read_rows(stage, manifest, name)][:most]
    _, controls = models.load_tokenizer(trained / "model")
    engine, asked = TorchEngine(models.load(trained / "model", Model())), []
    for row in rows:
        prompt = format.prior_prompt(controls, tuple(row["context_ids"]))
        asked.append(Scoring((ScoreRequest(prompt, ((controls.end, *row["chunk_ids"]),)),)))
    empty = [answer[0][0].sum() for answer in ask(engine, asked)]
    log_w = [np.where([not d["ids"] for d in row["draws"]], -np.inf, row["log_weights"]) for row in rows]
    sizes = [float(len(row["chunk_ids"])) for row in rows]
    return Chunks(np.array(log_w), np.array([row["raw_logprob"] for row in rows]), np.array(empty), np.array(sizes))


def adaptive(chunks: Chunks, budget: int, figure: Figure, counted: bool) -> tuple[float, float]:
    """(mean bound, draws a chunk)."""
    count, most = chunks.log_w.shape
    scores = np.array([figure(w[:PILOT], r) for w, r in zip(chunks.log_w, chunks.raw, strict=True)])
    first, least = (0, PILOT) if counted else (PILOT, 2 * PILOT)  # where L_K begins; draws that every chunk has
    needy = set(np.argsort(scores, kind="stable")[: (budget - least) * count // (most - least)].tolist())
    stops = [most if n in needy else least for n in range(count)]
    taken = [w[first:stop] for w, stop in zip(chunks.log_w, stops, strict=True)]
    return chunks.mean_bound(taken), sum(stops) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=Path)
    parser.add_argument("model", type=Path, help="the train stage that the draws were made with")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--chunks", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    whole = read(a.stage, a.model, a.chunks)
    rng = np.random.default_rng(0)
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(a.repeats):
        chunks = replace(whole, log_w=rng.permuted(whole.log_w, axis=1))
        for budget in (6, 8):
            uniform = chunks.mean_bound(list(chunks.log_w[:, :budget]))
            found.setdefault(("uniform", f"L at {budget} draws a chunk"), []).append(uniform)
            for name, figure in FIGURES.items():
                for counted in (False, True):
                    kind = f"{'optimistic' if counted else 'valid'}, {name}"
                    value, drawn = adaptive(chunks, budget, figure, counted)
                    assert drawn <= budget
                    found.setdefault((kind, f"L at {budget} draws a chunk"), []).append(value)
    table = [common.row(kind, metric, "nats/token", values) for (kind, metric), values in found.items()]
    common.finish("adaptive_k", {"chunks": len(whole.tokens)}, table, {}, a.json, settings={"stage": a.stage.name})


if __name__ == "__main__":
    main()
