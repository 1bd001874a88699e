"""NLL of held-out text and the bound L_K, chunk by chunk, and what thinking gains where (method, sections 5 and 7)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from latent_thoughts import weights
from latent_thoughts.config import Recipe, Sample
from latent_thoughts.data import format
from latent_thoughts.data.tokenizer import Controls
from latent_thoughts.engines.base import Engine, ScoreRequest
from latent_thoughts.engines.joint import Seeds, Task, infer, likelihoods, raw_logprobs, tasks
from latent_thoughts.stages.evaluate.statistics import ratio
from latent_thoughts.types import ThoughtDocument

UNITS = {"token": "tokens", "character": "characters", "byte": "bytes"}
NATS_PER_BIT = float(np.log(2))
PLACES = 10  # parts of a document in which the gain is looked at

SCORES = pa.schema(
    [
        ("doc_id", pa.string()),
        ("chunk_index", pa.int32()),
        ("text", pa.string()),  # hash of the chunk and of all text before it
        ("place", pa.float64()),  # of the chunk's beginning in its document, in characters: 0 to 1
        ("tokens", pa.int32()),
        ("characters", pa.int32()),
        ("bytes", pa.int32()),
        ("log_raw", pa.float64()),
        ("log_thoughtless", pa.float64()),
        ("bounds", pa.map_(pa.int32(), pa.float64())),
        ("finished", pa.map_(pa.int32(), pa.float64())),  # share of the groups of K draws in which a thought ended
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
        """One row (SCORES) a target chunk. `log_raw` = log p(x | c) in raw text, `log_thoughtless` the same in the
        thoughtless form, null for a model of raw text."""
        todo = [t for d in documents for t in tasks(d.chunks, d.target, self.controls, self.sample)]
        length = {d.id: sum(len(c.text) for c in d.chunks) for d in documents}
        text = {d.id: hashes(d) for d in documents}
        raw = raw_logprobs(self.engine, todo, self.controls)
        found = self._bounds(todo) if self.thinks else [(None, dict.fromkeys(self.config.bound, (r, 1.0))) for r in raw]
        return [
            {
                "doc_id": t.chunk.doc_id,
                "chunk_index": t.chunk.index,
                "text": text[t.chunk.doc_id][t.chunk.index],
                "place": t.chunk.start / max(1, length[t.chunk.doc_id]),
                "tokens": len(t.chunk.ids),
                "characters": len(t.chunk.text),
                "bytes": len(t.chunk.text.encode("utf-8")),
                "log_raw": r,
                "log_thoughtless": e,
                "bounds": [(k, value) for k, (value, _) in b.items()],
                "finished": [(k, share) for k, (_, share) in b.items()],
            }
            for t, r, (e, b) in zip(todo, raw, found, strict=True)
        ]

    def _empty(self, todo: Sequence[Task]) -> list[float]:
        """log p(z, x | c) of the empty thought, which is scored like any other: E and x behind c S P."""
        prompts = [format.prior_prompt(self.controls, t.context) for t in todo]
        end = (self.controls.end,)
        requests = [ScoreRequest(p, (end + t.chunk.ids,)) for p, t in zip(prompts, todo, strict=True)]
        return likelihoods(self.engine, requests)

    def _bounds(self, todo: Sequence[Task]) -> list[tuple[float, dict[int, tuple[float, float]]]]:
        """For every chunk log p(x | c) in the thoughtless form, and a K each L_K, nats, with the share of its groups of
        K draws in which a thought ended. Smaller K average over disjoint groups of the same draws, in random order."""
        temperature, found = self.config.bound_temperature, []
        drawn = infer(self.engine, todo, self.controls, self.sample, self.seeds, temperature)
        for p, empty in zip(drawn, self._empty(todo), strict=True):
            ended = np.isfinite(p.log_weights)
            log_weights = np.where([not d.draw.ids for d in p.draws], -np.inf, p.log_weights)
            order = self.seeds.rng(p.chunk, "groups").permutation(len(log_weights))
            of_chunk = {}
            for k in self.config.bound:
                groups = order[: len(order) // k * k].reshape(-1, k)
                value = weights.bound_beside(empty, log_weights[groups])
                of_chunk[k] = (value, float(ended[groups].any(1).mean()))
            found.append((p.raw_logprob, of_chunk))
        return found


def hashes(document: ThoughtDocument) -> list[str]:
    """Of every chunk with all text before it: whatever their tokenizers, models that were scored on the same have the
    same. (How much of that text a model is given is among its own settings.)"""
    running, found = hashlib.sha256(), []
    for chunk in document.chunks:
        running.update(f"{len(chunk.text)}\n{chunk.text}".encode())
        found.append(running.hexdigest()[:16])
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
        self.finished: dict[str, np.ndarray] = {}
        for k, _ in rows[0]["bounds"] if rows else ():
            self.nats[f"bound_{k}"] = np.array([dict(r["bounds"])[k] for r in rows], float)
            self.finished[f"bound_{k}"] = np.array([dict(r["finished"])[k] for r in rows], float)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """NLL and L_K per token, per character and in bits per byte, with standard errors over documents.

    `nll` is the model's own form (thoughtless, where it thinks), `nll_raw` plain text. `bound_K_unfinished` is the
    share of chunks for which no draw ended: their L_K is that of the empty thought alone. `gain_K` is
    L_K - log p(x | c).
    """
    table = Table(rows)
    found: dict[str, Any] = {"documents": len(set(table.documents)), "chunks": len(rows)}
    for name, values in table.nats.items():
        if name in table.finished:
            found[f"{name}_unfinished"] = float((table.finished[name] == 0).mean())
        for unit, sizes in table.sizes.items():
            mean, error = ratio(values, sizes, table.documents)
            figure = f"{name}_per_{unit}"
            if unit == "byte":  # as bits that the text costs, of which fewer are better: of the bound too
                figure, sign = f"{name}_bits_per_byte", -1 if name in table.finished else 1
                mean, error = (x if x is None else x / NATS_PER_BIT for x in (mean, error))
                mean = None if mean is None else sign * mean
            found[figure], found[f"{figure}_se"] = mean, error
    return found | _gains(table)


def _gains(table: Table) -> dict[str, Any]:
    """What thinking gains, nats a token, in all and by tenths of the documents."""
    found: dict[str, Any] = {}
    tokens, part = table.sizes["token"], np.minimum((table.place * PLACES).astype(int), PLACES - 1)
    for name, values in table.nats.items():
        if name not in table.finished:
            continue
        k, gain = name.removeprefix("bound_"), values - table.log_x
        found[f"gain_{k}_per_token"], found[f"gain_{k}_per_token_se"] = ratio(gain, tokens, table.documents)
        found[f"gain_{k}_positive"] = float((gain > 0).mean()) if len(gain) else None
        found[f"gain_{k}_by_place"] = [
            {"from": n / PLACES, "to": (n + 1) / PLACES, "chunks": int(here.sum()), "gain_per_token": value, "se": se}
            for n in range(PLACES)
            if (here := part == n).any()
            for value, se in [ratio(gain[here], tokens[here], table.documents[here])]
        ]
    return found
