"""Runs made by hand, as small as the report can read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latent_thoughts.data.records import DOCUMENTS, POSTERIORS
from latent_thoughts.stages.evaluate.held_out import ANSWERS
from latent_thoughts.stages.report import summary


def row(method: str, seed: int = 0, iteration: int = 0, samples: int = 0, **figures: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "accuracy": 0.5,
        "accuracy_n": 100,
        "accuracy_known": None,
        "accuracy_unknown": None,
        "bound_per_token": {"1": -1.0, "4": -0.5},
        "nll_per_token": 1.25,
        "train_tokens": 1000,
        "train_steps": 10,
        "seconds": {"sample": 0.0, "train": 5.0, "evaluate": 1.0},
    }
    return {"method": method, "iteration": iteration, "samples": samples, "seed": seed, **values, **figures}


def em_row(seed: int = 0, iteration: int = 1, samples: int = 2, **figures: Any) -> dict[str, Any]:
    health = {"thought_correct_sampled": 0.25, "thought_correct_chosen": 0.5, "ess": 1.5, "distinct": 2.0,
              "unfinished": 0.1, "accepted": 0.9, "gain_per_token": 0.3, "sample_tokens": 600,
              "seconds": {"sample": 2.0, "train": 5.0, "evaluate": 1.0}}  # fmt: skip
    return row("em", seed, iteration, samples, **{**health, **figures})


def save(folder: Path, rows: list[dict[str, Any]], **run: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"run": {"seeds": [0], **run}, "rows": rows}), encoding="utf-8")
    (folder / "recipe.yaml").write_text("# torch: 2\nsample:\n  k: 2\n", encoding="utf-8")
    return folder


def results(tmp_path: Path, rows: list[dict[str, Any]]) -> summary.Results:
    return summary.load(save(tmp_path, rows))


def parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def add_texts(run: Path, words: str = "in den .", name: str | None = None) -> None:
    """One corpus document with two iterations of draws, and one answer of the warm start and of EM."""
    meta = json.dumps({"known": False, "oracle": {"1": words}})
    chunks = [
        {"start": 0, "text": f"where? {words}", "ids": [1], "target": False, "thoughts": []},
        {"start": 9, "text": f"there {words}", "ids": [2], "target": True, "thoughts": []},
    ]
    document = {"id": name or words, "source": "raw", "meta": meta, "chunks": chunks}
    parquet(run / "prepare" / "corpus-00000.parquet", [document], DOCUMENTS)
    scores = {"log_posterior": -1.0, "log_prior": -1.0, "log_x": -1.0, "log_q": -1.0}
    for iteration, chosen in ((1, -1), (2, 1)):
        draws = [
            {"ids": [7, 8], "proposal": "posterior", "finished": False, "text": "on and on", **scores},
            {"ids": [5], "proposal": "posterior", "finished": True, "text": words, **scores},
            {"ids": [5], "proposal": "prior", "finished": True, "text": words, **scores},
            {"ids": [6], "proposal": "prior", "finished": True, "text": "elsewhere", **scores},
        ]
        posterior = {"doc_id": name or words, "chunk_index": 1, "context_ids": [1], "chunk_ids": [2], "draws": draws,
                     "log_weights": [-math.inf, 0.0, 0.0, math.log(2)], "gains": [-math.inf, 1.5, 1.5, -0.25],
                     "ess": 2.67, "distinct": 2, "chosen": chosen, "raw_logprob": -3.0}  # fmt: skip
        parquet(run / f"iter_{iteration:02}" / "sample" / "posterior-00000.parquet", [posterior], POSTERIORS)
    for iteration in (0, 2):
        answer = {"doc_id": "h", "question": words, "thought": words, "text": words, "answer": None, "gold": words,
                  "oracle": words, "right": iteration > 0, "known": None}  # fmt: skip
        parquet(run / f"iter_{iteration:02}" / "evaluate" / "answers.parquet", [answer], ANSWERS)


def add_many(run: Path, documents: int, iterations: int = 3, chunks: int = 4, draws: int = 4) -> None:
    """Documents of a context chunk and `chunks` chunks with thoughts, in one shard. A thought grows by a word an
    iteration; every third document's were not accepted. Gains a token run from -0.5 up to 0.5."""
    random = np.random.default_rng(0)
    words = np.array("den hall attic cellar tower north south east west gallery".split())
    rows, drawn = [], {n: [] for n in range(1, iterations + 1)}
    for n in range(documents):
        text = [f"Document {n}, part {at}: {' '.join(random.choice(words, 6))}. " for at in range(chunks + 1)]
        rows.append(
            {"id": f"document-{n}", "source": "raw", "meta": json.dumps({"known": n % 2 == 0}),
             "chunks": [{"start": 0, "text": t, "ids": [1] * 10, "target": at > 0, "thoughts": []}
                        for at, t in enumerate(text)]}
        )  # fmt: skip
        for iteration, posteriors in drawn.items():
            posteriors += [_many_draws(f"document-{n}", n, at, iteration, draws) for at in range(1, chunks + 1)]
    parquet(run / "prepare" / "corpus-00000.parquet", rows, DOCUMENTS)
    for iteration, posteriors in drawn.items():
        parquet(run / f"iter_{iteration:02}" / "sample" / "posterior-00000.parquet", posteriors, POSTERIORS)


def _many_draws(name: str, n: int, at: int, iteration: int, draws: int) -> dict[str, Any]:
    scores = {"log_posterior": -1.0, "log_prior": -1.0, "log_x": -1.0, "log_q": -1.0, "finished": True}
    found = [{"ids": [m] * (m + iteration), "proposal": "posterior", "text": f"thought {n}.{at}" + f" {m}" * iteration,
              **scores} for m in range(draws)]  # fmt: skip
    chosen = -1 if n % 3 == 2 else at % draws
    return {"doc_id": name, "chunk_index": at, "context_ids": [1], "chunk_ids": [1] * 10, "draws": found,
            "log_weights": [0.0] * draws, "gains": [n % 11 - 5.0] * draws, "ess": 1.0 + n % draws, "distinct": draws,
            "chosen": chosen, "raw_logprob": -3.0}  # fmt: skip
