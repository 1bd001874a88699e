"""evaluate: likelihood, bound and answers on held-out documents (method, section 7).

latent-thoughts evaluate recipe.yaml --out RUN --iteration 1
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from latent_thoughts import model as models
from latent_thoughts import weights
from latent_thoughts.config import Recipe, Sample
from latent_thoughts.data import format, records
from latent_thoughts.data.tokenizer import Codec, Controls
from latent_thoughts.engines.base import Engine, Ids, ScoreRequest, Scoring, ask, in_order
from latent_thoughts.engines.joint import Answering, Seeds, Task, infer, tasks
from latent_thoughts.engines.load import loaded_engine
from latent_thoughts.runlog import track
from latent_thoughts.store import Stage, read_manifest, stage_key
from latent_thoughts.types import Draw, Manifest, ThoughtDocument, UserError

ANSWERS = pa.schema(
    [
        ("doc_id", pa.string()),
        ("question", pa.string()),
        ("thought", pa.string()),
        ("text", pa.string()),
        ("answer", pa.string()),
        ("gold", pa.string()),
        ("oracle", pa.string()),
        ("right", pa.bool_()),
        ("known", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True)
class Answer:
    document: ThoughtDocument
    thought: Draw | None
    ids: Ids


def evaluate(recipe: Recipe, model: Path, prepared: Path, folder: Path, thinks: bool) -> Manifest:
    """Evaluates the model of train stage `model`. `thinks` is False for models trained on raw text:
    they answer directly, and their bound is their likelihood."""
    config = recipe.evaluate
    inputs = {"model": read_manifest(model), "prepare": read_manifest(prepared)}
    sampled = recipe.sample.model_dump(include={"max_thought_tokens", "context_chunks", "max_tokens"})
    engine = recipe.engine.model_dump(include={"kind", "scorer"})
    settings = [config.model_dump(), sampled, recipe.seed, recipe.model.dtype, thinks, engine]
    stage = Stage(folder, "evaluate", stage_key("evaluate", settings, inputs))
    if (manifest := stage.manifest) is not None:
        return manifest
    began = time.perf_counter()
    documents = records.documents(prepared, "held_out")[: config.documents]
    if not documents:
        raise UserError("no document is held out: raise data.held_out, or data.limit")
    tokenizer, controls = models.load_tokenizer(model / "model")
    with loaded_engine(recipe, model / "model") as engine, track("evaluate", 2, "parts") as advance:
        examiner = Examiner(recipe, engine, controls, Codec(tokenizer), thinks)
        counts = examiner.likelihood(documents)
        advance(1)
        rows = examiner.grade(examiner.answer(documents)) if config.answer else []
        advance(1)
    counts |= accuracy(rows)
    counts["seconds"] = time.perf_counter() - began
    stage.write("answers.parquet", rows, ANSWERS, {})
    return stage.close(["answers.parquet"], counts)


class Examiner:
    """Scores and answers held-out documents with one model."""

    def __init__(self, recipe: Recipe, engine: Engine, controls: Controls, codec: Codec, thinks: bool):
        self.config, self.engine, self.controls, self.codec = recipe.evaluate, engine, controls, codec
        self.thinks, self.seeds = thinks, Seeds(recipe.seed, -1)
        self.sample = Sample(
            k=max(self.config.bound),
            posterior_share=self.config.bound_posterior_share,
            accept="all",
            choose="best",
            **recipe.sample.model_dump(include={"max_thought_tokens", "context_chunks", "max_tokens"}),
        )

    def likelihood(self, documents: Sequence[ThoughtDocument]) -> dict[str, Any]:
        """NLL and L_K of target chunks, per token and per character of their text, with standard errors
        over documents (ratio estimator).

        A chunk none of whose draws finished has no finite bound: it is left out of the mean, and the
        share of such chunks stands beside it as `bound_K_unfinished`.
        """
        todo = [t for d in documents for t in tasks(d.chunks, d.target, self.controls, self.sample)]
        raw = self._raw(todo)
        table = {"nll": -raw}
        for k, values in self._bounds(todo, raw).items():
            table[f"bound_{k}"] = values
        tokens = np.array([len(t.chunk.ids) for t in todo], float)
        characters = np.array([len(t.chunk.text) for t in todo], float)
        groups = np.unique([t.chunk.doc_id for t in todo], return_inverse=True)[1]
        found: dict[str, Any] = {"documents": len(documents), "chunks": len(todo)}
        for name, values in table.items():
            there = np.isfinite(values)
            if name != "nll":
                found[f"{name}_unfinished"] = 1 - float(there.mean())
            for unit, sizes in (("token", tokens), ("character", characters)):
                mean, error = ratio(values[there], sizes[there], groups[there])
                found[f"{name}_per_{unit}"], found[f"{name}_per_{unit}_se"] = mean, error
        return found

    def _raw(self, todo: Sequence[Task]) -> np.ndarray:
        """log p(x | c) without a thought, in the form the model was trained on."""

        def prefix(task: Task) -> Ids:
            return format.thoughtless_prompt(self.controls, task.context) if self.thinks else task.context

        scores = ask(self.engine, [Scoring((ScoreRequest(prefix(t), (t.chunk.ids,)),)) for t in todo])
        return np.array([s[0][0].sum() for s in scores])

    def _bounds(self, todo: Sequence[Task], raw: np.ndarray) -> dict[int, np.ndarray]:
        """L_K a chunk, nats. Smaller K average over disjoint groups of the same draws, in random order.

        Where a group may hold no finished draw, E[log w̄] is -inf, but with A for "some draw finished"
        log p(x | c) >= log P(A) + E[log w̄ | A] by Jensen's inequality. That is reported; since
        E[log P̂(A)] <= log P(A), the estimate of P(A) keeps it a bound.
        """
        if not self.thinks:
            return {k: raw for k in self.config.bound}
        found: dict[int, list[float]] = {k: [] for k in self.config.bound}
        temperature = self.config.bound_temperature
        for p in infer(self.engine, todo, self.controls, self.sample, self.seeds, temperature):
            order = self.seeds.rng(p.chunk, "groups").permutation(len(p.log_weights))
            for k in found:
                groups = p.log_weights[order][: len(order) // k * k].reshape(-1, k)
                bounds = [b for b in map(weights.bound, groups) if np.isfinite(b)]
                share = len(bounds) / len(groups)
                found[k].append(float(np.mean(bounds) + np.log(share)) if bounds else -np.inf)
        return {k: np.array(values) for k, values in found.items()}

    def answer(self, documents: Sequence[ThoughtDocument]) -> list[Answer]:
        """Thinks about every document's last chunk and then writes it."""
        sample = self.sample
        how = Answering(
            self.controls, self.thinks, sample.max_thought_tokens, self.config.answer_tokens, self.config.temperature
        )
        jobs = []
        for task in map(self._task, documents):
            seeds = (self.seeds.draw(task.chunk, "think"), self.seeds.draw(task.chunk, "answer"))
            jobs.append(how.job(task.context, seeds))
        return [Answer(d, *found) for d, found in zip(documents, in_order(self.engine, jobs), strict=True)]

    def _task(self, document: ThoughtDocument) -> Task:
        target = [n == len(document.chunks) - 1 for n in range(len(document.chunks))]
        return next(tasks(document.chunks, target, self.controls, self.sample))

    def grade(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """One row an answer. Raises UserError where the pattern does not match a gold text."""
        assert self.config.answer is not None
        pattern, rows = re.compile(self.config.answer), []
        for a in answers:
            gold_text = a.document.chunks[-1].text
            if (gold := pattern.search(gold_text)) is None:
                raise UserError(f"evaluate.answer does not match {gold_text!r} of document {a.document.id}")
            text = self.codec.decode(a.ids)
            found = pattern.search(text)
            rows.append(
                {
                    "doc_id": a.document.id,
                    "question": "".join(c.text for c in a.document.chunks[:-1]),
                    "thought": None if a.thought is None else self.codec.decode(a.thought.ids),
                    "text": text,
                    "answer": found.group(1) if found else None,
                    "gold": gold.group(1),
                    "oracle": records.oracle(a.document).get(len(a.document.chunks) - 1),
                    "right": bool(found and found.group(1) == gold.group(1)),
                    "known": a.document.meta.get("known"),
                }
            )
        return rows


def ratio(values: np.ndarray, sizes: np.ndarray, groups: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """Σ values / Σ sizes, and its standard error over groups (documents), linearised (Cochran 1977, 6.4).

    None where there are no values.
    """
    if not len(values):
        return None, None
    mean = values.sum() / sizes.sum()
    residuals = np.bincount(np.unique(groups, return_inverse=True)[1], values - mean * sizes)
    n = len(residuals)
    error = np.sqrt(n / max(1, n - 1) * np.square(residuals).sum()) / sizes.sum()
    return float(mean), float(error)


def accuracy(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share of right answers, together and apart for documents that are `known` or not."""
    found: dict[str, Any] = {"accuracy_n": len(rows)}
    parts = {"": rows, "_known": [r for r in rows if r["known"] is True]}
    parts["_unknown"] = [r for r in rows if r["known"] is False]
    for name, part in parts.items():
        right = np.array([r["right"] for r in part], float)
        found[f"accuracy{name}"] = float(right.mean()) if len(part) else None
        found[f"accuracy{name}_se"] = float(right.std() / np.sqrt(len(part))) if len(part) else None
    return found
