"""What there is to read of a run: documents with every draw of every E-step, and answers to held-out questions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latent_thoughts import weights
from latent_thoughts.places import seekable
from latent_thoughts.stages.report.methods import METHODS, of
from latent_thoughts.stages.report.summary import LOOPS, Results
from latent_thoughts.types import UserError

CLIP = 20_000  # characters of one text
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Loop:
    """One EM run of one seed: the folders of its E-steps by iteration, and the documents they thought about."""

    name: str
    prepared: Path
    steps: dict[int, Path]

    def shards(self) -> list[str]:
        """Names of the corpus shards that any E-step has posteriors for."""
        found = {path.name for folder in self.steps.values() for path in folder.glob("posterior-*.parquet")}
        return sorted(name.replace("posterior-", "corpus-") for name in found)

    def documents(self, shard: str) -> Iterator[Json]:
        """A shard's documents that were thought about: `{id, known, chunks: [{text, tokens, oracle, steps}]}`, where
        `steps` has a posterior for every iteration, and nothing for a chunk that no thought is meant for."""
        drawn = {n: _posteriors(folder / shard.replace("corpus-", "posterior-")) for n, folder in self.steps.items()}
        for row in _rows(self.prepared / shard):
            document = _document(row, drawn)
            if any(chunk["steps"] for chunk in document["chunks"]):
                yield document

    def totals(self) -> Json:
        """How many texts every E-step thought about."""
        return {str(n): sum(map(_count, folder.glob("posterior-*.parquet"))) for n, folder in self.steps.items()}


@dataclass(frozen=True, slots=True)
class Seed:
    name: str
    loops: list[Loop]
    answers: Json


def read(folder: Path, results: Results) -> list[Seed]:
    """Everything that can be shown, a seed each; what a run lacks is left out."""
    kept = (results.recipe.get("evaluate") or {}).get("thoughts_kept")
    kept = kept if isinstance(kept, int) else 50
    found = []
    for name, run in _runs(folder, results):
        loops = [_loop(run, method, results) for method in reversed(LOOPS)]
        found.append(Seed(name, [loop for loop in loops if loop.steps], _answers(run, results, kept)))
    return found


def _runs(folder: Path, results: Results) -> list[tuple[str, Path]]:
    """The run folders: of a demo one a seed, else the folder itself."""
    numbers = [seed for seed in results.run.get("seeds") or [] if isinstance(seed, int)]
    seeds = [(f"seed {seed}", folder / f"seed_{seed}") for seed in numbers]
    return [(name, path) for name, path in seeds if path.is_dir()] or [("", folder)]


def _loop(run: Path, method: str, results: Results) -> Loop:
    root = run if method == "em" else run / "baselines" / method
    folders = {line.iteration: root / f"iter_{line.iteration:02}" / "sample" for line in results.main(method)}
    there = {n: folder for n, folder in folders.items() if any(folder.glob("posterior-*.parquet"))}
    return Loop(of(method).name, run / "prepare", there)


def _rows(path: Path, columns: list[str] | None = None) -> Iterator[Json]:
    """Rows of one shard, read a few at a time; none where there is no such shard."""
    import pyarrow.parquet as pq

    if not path.exists():
        return
    with _sound(path):
        for batch in pq.ParquetFile(seekable(path)).iter_batches(256, columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _count(path: Path) -> int:
    """Rows of one shard."""
    import pyarrow.parquet as pq

    with _sound(path):
        return pq.ParquetFile(seekable(path)).metadata.num_rows


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    """What fails inside is the shard's damage."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"shard {path} is damaged ({str(error).splitlines()[0]}): run that stage again") from None


def _posteriors(path: Path) -> dict[tuple[str, int], Json]:
    columns = ["doc_id", "chunk_index", "draws", "log_weights", "gains", "ess", "distinct", "chosen", "raw_logprob"]
    return {(row["doc_id"], row["chunk_index"]): row for row in _rows(path, columns)}


def _document(row: Json, drawn: dict[int, dict[tuple[str, int], Json]]) -> Json:
    meta = json.loads(row["meta"])
    chunks = []
    for index, chunk in enumerate(row["chunks"]):
        oracle = clip((meta.get("oracle") or {}).get(str(index)))
        found = {n: rows[row["id"], index] for n, rows in drawn.items() if (row["id"], index) in rows}
        steps = {str(n): _step(posterior, oracle) for n, posterior in found.items()}
        chunks.append({"text": clip(chunk["text"]), "tokens": len(chunk["ids"]), "oracle": oracle, "steps": steps})
    return {"id": row["id"], "known": meta.get("known"), "chunks": chunks}


def _step(row: Json, oracle: str | None) -> Json:
    """One chunk's posterior. Identical draws are one entry; entries are sorted by their share of the weight."""
    log_weights = np.array([-np.inf if w is None else w for w in row["log_weights"]], float)
    groups: dict[tuple[Any, ...], Json] = {}
    for n, (draw, share) in enumerate(zip(row["draws"], weights.normalised(log_weights).tolist(), strict=True)):
        key = (draw["finished"], *draw["ids"])
        if (group := groups.get(key)) is None:
            text = clip(draw["text"])
            group = groups[key] = {
                "text": text,
                "length": len(draw["ids"]),
                "from": {},
                "share": 0.0,
                "gain": _finite(row["gains"][n]),
                "finished": draw["finished"],
                "same": None if oracle is None else draw["finished"] and text == oracle,
                "chosen": False,
            }
        group["from"][draw["proposal"]] = group["from"].get(draw["proposal"], 0) + 1
        group["share"] += share
        group["chosen"] |= n == row["chosen"]
    draws = sorted(groups.values(), key=lambda d: (-d["share"], -sum(d["from"].values())))
    return {
        "k": len(row["draws"]),
        "ess": round(row["ess"], 2),
        "distinct": row["distinct"],
        "raw": _finite(row["raw_logprob"]),
        "draws": [{**d, "share": round(d["share"], 4)} for d in draws],
    }


def _finite(value: float | None) -> float | None:
    return round(value, 3) if value is not None and math.isfinite(value) else None


def clip(text: str | None, limit: int = CLIP, end: bool = False) -> Any:
    """A text that is too long loses its end, or its beginning."""
    if text is None or len(text) <= limit:
        return text
    return f"… {text[-limit:]}" if end else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def _answers(run: Path, results: Results, limit: int) -> Json:
    """Held-out questions, spread evenly over what was asked, with every model's answer."""
    texts: dict[str, Json] = {}
    models, total = [], 0
    for name, path in _models(run, results):
        rows = list(_rows(path))
        if not rows:
            continue
        if not texts:
            total = len(rows)
            texts = {r["doc_id"]: _asked(r) for r in rows[:: math.ceil(len(rows) / limit)]}
        for row in rows:
            if row["doc_id"] in texts:
                answer = {"thought": clip(row["thought"]), "text": clip(row["text"]), "right": row["right"]}
                answer["same"] = None if row["oracle"] is None else row["thought"] == row["oracle"]
                texts[row["doc_id"]]["by"][str(len(models))] = answer
        models.append(name)
    return {"models": models, "texts": list(texts.values()), "total": total}


def _asked(row: Json) -> Json:
    return {
        "id": row["doc_id"],
        "question": clip(row["question"], end=True),
        "gold": clip(row["gold"]),
        "oracle": clip(row["oracle"]),
        "known": row["known"],
        "by": {},
    }


def _models(run: Path, results: Results) -> Iterator[tuple[str, Path]]:
    """(name, answers) of every model of a run, in the order of the table."""
    for method in results.methods:
        root = run if method in ("em", "warm_start") else run / "baselines" / method
        if method in LOOPS:
            for line in results.main(method):
                folder = root / f"iter_{line.iteration:02}"
                yield f"{of(method).name}, iteration {line.iteration}", folder / "evaluate" / "answers.parquet"
        elif method in METHODS:
            folder = root / "iter_00" if method == "warm_start" else root
            yield of(method).name, folder / "evaluate" / "answers.parquet"
