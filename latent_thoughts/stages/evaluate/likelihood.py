"""NLL of held-out text and the bound L_K, chunk by chunk, and what thinking gains where (method, sections 5 and 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from latent_thoughts import weights
from latent_thoughts.config import Recipe, Sample
from latent_thoughts.data import format
from latent_thoughts.data.tokenizer import Controls
from latent_thoughts.engines.base import Engine, ScoreRequest, Scoring, ask
from latent_thoughts.engines.joint import Seeds, Task, infer, tasks
from latent_thoughts.stages.evaluate.statistics import ratio
from latent_thoughts.types import ThoughtDocument

UNITS = {"token": "tokens", "character": "characters", "byte": "bytes"}
NATS_PER_BIT = float(np.log(2))
PLACES = 10  # parts of a document in which the gain is looked at

SCORES = pa.schema(
    [
        ("doc_id", pa.string()),
        ("chunk_index", pa.int32()),
        ("place", pa.float64()),  # of the chunk's beginning in its document, in characters: 0 to 1
        ("tokens", pa.int32()),
        ("characters", pa.int32()),
        ("bytes", pa.int32()),
        ("log_raw", pa.float64()),
        ("log_thoughtless", pa.float64()),
        ("bounds", pa.map_(pa.int32(), pa.float64())),
    ]
)


def sample_of(recipe: Recipe) -> Sample:
    """The settings of the bound's draws: the paper's weights, and as many draws as the largest K."""
    return Sample(
        k=max(recipe.evaluate.bound),
        posterior_share=recipe.evaluate.bound_posterior_share,
        accept="all",
        choose="best",
        **recipe.sample.model_dump(include={"max_thought_tokens", "context_chunks", "max_tokens"}),
    )


class Scorer:
    """Scores the target chunks of held-out documents with one model. A model of raw text does not think: its bound
    is its likelihood."""

    def __init__(self, recipe: Recipe, engine: Engine, controls: Controls, thinks: bool):
        self.config, self.engine, self.controls, self.thinks = recipe.evaluate, engine, controls, thinks
        self.sample, self.seeds = sample_of(recipe), Seeds(recipe.seed, -1)

    def rows(self, documents: Sequence[ThoughtDocument]) -> list[dict[str, Any]]:
        """One row (SCORES) a target chunk. `log_raw` = log p(x | c) in raw text, `log_thoughtless` the same behind
        the empty thought, null for a model of raw text; a bound none of whose groups has a finished draw is -inf."""
        todo = [t for d in documents for t in tasks(d.chunks, d.target, self.controls, self.sample)]
        length = {d.id: sum(len(c.text) for c in d.chunks) for d in documents}
        raw = self._raw(todo)
        thoughtless = self._thoughtless(todo) if self.thinks else [None] * len(todo)
        bounds = self._bounds(todo) if self.thinks else [dict.fromkeys(self.config.bound, r) for r in raw]
        return [
            {
                "doc_id": t.chunk.doc_id,
                "chunk_index": t.chunk.index,
                "place": t.chunk.start / max(1, length[t.chunk.doc_id]),
                "tokens": len(t.chunk.ids),
                "characters": len(t.chunk.text),
                "bytes": len(t.chunk.text.encode("utf-8")),
                "log_raw": r,
                "log_thoughtless": e,
                "bounds": list(b.items()),
            }
            for t, r, e, b in zip(todo, raw, thoughtless, bounds, strict=True)
        ]

    def _raw(self, todo: Sequence[Task]) -> list[float]:
        requests = [ScoreRequest(format.raw_prompt(self.controls, t.context), (t.chunk.ids,)) for t in todo]
        return self._sums(requests)

    def _thoughtless(self, todo: Sequence[Task]) -> list[float]:
        requests = [ScoreRequest(format.thoughtless_prompt(self.controls, t.context), (t.chunk.ids,)) for t in todo]
        return self._sums(requests)

    def _sums(self, requests: Sequence[ScoreRequest]) -> list[float]:
        scores = ask(self.engine, [Scoring((request,)) for request in requests])
        return [float(s[0][0].sum()) for s in scores]

    def _bounds(self, todo: Sequence[Task]) -> list[dict[int, float]]:
        """L_K a chunk, nats. Smaller K average over disjoint groups of the same draws, in random order.

        Where a group may hold no finished draw, E[log w̄] is -inf, but with A for "some draw finished"
        log p(x | c) >= log P(A) + E[log w̄ | A] by Jensen's inequality. That is reported; since
        E[log P̂(A)] <= log P(A), the estimate of P(A) keeps it a bound.
        """
        temperature, found = self.config.bound_temperature, []
        for p in infer(self.engine, todo, self.controls, self.sample, self.seeds, temperature):
            order = self.seeds.rng(p.chunk, "groups").permutation(len(p.log_weights))
            of_chunk = {}
            for k in self.config.bound:
                groups = p.log_weights[order][: len(order) // k * k].reshape(-1, k)
                bounds = [b for b in map(weights.bound, groups) if np.isfinite(b)]
                share = len(bounds) / len(groups)
                of_chunk[k] = float(np.mean(bounds) + np.log(share)) if bounds else -np.inf
            found.append(of_chunk)
        return found


class Table:
    """Score rows as arrays, one entry a chunk."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.documents = np.array([r["doc_id"] for r in rows])
        self.place = np.array([r["place"] for r in rows], float)
        self.sizes = {name: np.array([r[column] for r in rows], float) for name, column in UNITS.items()}
        raw = np.array([r["log_raw"] for r in rows], float)
        thinks = any(r["log_thoughtless"] is not None for r in rows)
        self.log_x = np.array([r["log_thoughtless"] for r in rows], float) if thinks else raw
        self.nats = {"nll": -self.log_x, "nll_raw": -raw}
        for k, _ in rows[0]["bounds"] if rows else ():
            self.nats[f"bound_{k}"] = np.array([dict(r["bounds"])[k] for r in rows], float)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """NLL and L_K per token, per character and in bits per byte, with standard errors over documents.

    `nll` is the model's own form (behind the empty thought, where it thinks), `nll_raw` plain text. A chunk none of
    whose draws finished has no finite bound: it is left out of the mean, and the share of such chunks stands beside
    it as `bound_K_unfinished`. `gain_K` is L_K - log p(x | c) over the chunks that have both.
    """
    table = Table(rows)
    found: dict[str, Any] = {"documents": len(set(table.documents)), "chunks": len(rows)}
    for name, values in table.nats.items():
        there = np.isfinite(values)
        if name.startswith("bound"):
            found[f"{name}_unfinished"] = 1 - float(there.mean())
        for unit, sizes in table.sizes.items():
            mean, error = ratio(values[there], sizes[there], table.documents[there])
            figure = f"{name}_per_{unit}"
            if unit == "byte":  # as bits that the text costs, of which fewer are better: of the bound too
                figure, sign = f"{name}_bits_per_byte", -1 if name.startswith("bound") else 1
                mean, error = (x if x is None else x / NATS_PER_BIT for x in (mean, error))
                mean = None if mean is None else sign * mean
            found[figure], found[f"{figure}_se"] = mean, error
    return found | _gains(table)


def _gains(table: Table) -> dict[str, Any]:
    """What thinking gains, nats a token, in all and by tenths of the documents."""
    found: dict[str, Any] = {}
    tokens, part = table.sizes["token"], np.minimum((table.place * PLACES).astype(int), PLACES - 1)
    for name, values in table.nats.items():
        if not name.startswith("bound"):
            continue
        k, there = name.removeprefix("bound_"), np.isfinite(values)
        gain = np.where(there, values, 0) - table.log_x
        found[f"gain_{k}_per_token"], found[f"gain_{k}_per_token_se"] = ratio(
            gain[there], tokens[there], table.documents[there]
        )
        found[f"gain_{k}_positive"] = float((gain[there] > 0).mean()) if there.any() else None
        found[f"gain_{k}_by_place"] = [
            {"from": n / PLACES, "to": (n + 1) / PLACES, "chunks": int(here.sum()), "gain_per_token": value, "se": se}
            for n in range(PLACES)
            if (here := there & (part == n)).any()
            for value, se in [ratio(gain[here], tokens[here], table.documents[here])]
        ]
    return found
