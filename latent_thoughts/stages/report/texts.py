"""The page's sample of texts: what the E-step thought of them, and how models answered held-out ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latent_thoughts import weights
from latent_thoughts.places import seekable
from latent_thoughts.stages.report.summary import LOOPS, NAMES, Results
from latent_thoughts.types import UserError

DOCUMENTS = 40  # a seed, the same in every iteration
CLIP = 4000  # characters of one text; the page is one file
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Texts:
    """`seeds` are JSON for the page: {name, loops: [...], answers: {...}}."""

    seeds: list[Json]

    @property
    def any(self) -> bool:
        return any(seed["loops"] or seed["answers"]["texts"] for seed in self.seeds)


def read(folder: Path, results: Results) -> Texts:
    """Everything that can be shown; what a run lacks is left out."""
    kept = (results.recipe.get("evaluate") or {}).get("thoughts_kept")
    kept = kept if isinstance(kept, int) else 50
    found = []
    for name, run in _runs(folder, results):
        loops = [loop for method in reversed(LOOPS) if (loop := _loop(run, method, results))]
        found.append({"name": name, "loops": loops, "answers": _answers(run, results, kept)})
    return Texts(found)


def _runs(folder: Path, results: Results) -> list[tuple[str, Path]]:
    """The run folders: of a demo one a seed, else the folder itself."""
    seeds = [(f"seed {seed}", folder / f"seed_{seed}") for seed in results.run.get("seeds") or []]
    return [(name, path) for name, path in seeds if path.is_dir()] or [("", folder)]


def _rows(path: Path, columns: list[str] | None = None) -> Iterator[Json]:
    """Rows of one shard, read a few at a time; none where there is no such shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return
    try:
        for batch in pq.ParquetFile(seekable(path)).iter_batches(64, columns=columns):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"shard {path} is damaged ({str(error).splitlines()[0]}): run that stage again") from None


def _loop(run: Path, method: str, results: Results) -> Json | None:
    """One EM run's iterations: for each text its draws in every iteration."""
    root = run if method == "em" else run / "baselines" / method
    numbers = [line.iteration for line in results.main(method)]
    shards = {n: sorted((root / f"iter_{n:02}" / "sample").glob("posterior-*.parquet"))[:1] for n in numbers}
    shards = {n: found[0] for n, found in shards.items() if found}
    if not shards:
        return None
    # With fixed data every iteration has the same shards; otherwise each slice gives its share.
    names = sorted({path.name for path in shards.values()})
    texts: dict[tuple[str, int], Json] = {}
    for name in names:
        texts |= _corpus(run / "prepare" / name.replace("posterior-", "corpus-"), math.ceil(DOCUMENTS / len(names)))
    for number, path in shards.items():
        missing = {key for key in texts if texts[key]["shard"] == path.name.replace("posterior-", "corpus-")}
        for row in _rows(path):
            key = (row["doc_id"], row["chunk_index"])
            if key in missing:
                missing.remove(key)
                texts[key]["steps"][str(number)] = _step(row, texts[key]["oracle"])
            if not missing:
                break
    shown = [{k: v for k, v in text.items() if k != "shard"} for text in texts.values() if text["steps"]]
    return {"name": NAMES[method], "iterations": list(shards), "texts": shown}


def _corpus(path: Path, limit: int) -> dict[tuple[str, int], Json]:
    """The first texts of a corpus shard that thoughts are meant for."""
    found: dict[tuple[str, int], Json] = {}
    for row in _rows(path):
        meta = json.loads(row["meta"])
        for index, chunk in enumerate(row["chunks"]):
            if not chunk["target"]:
                continue
            found[row["id"], index] = {
                "id": row["id"] + (f" · {index}" if len(row["chunks"]) > 2 else ""),
                "question": _clip("".join(c["text"] for c in row["chunks"][:index]), end=True),
                "answer": _clip(chunk["text"]),
                "oracle": _clip((meta.get("oracle") or {}).get(str(index))),
                "known": meta.get("known"),
                "shard": path.name,
                "steps": {},
            }
            if len(found) == limit:
                return found
    return found


def _step(row: Json, oracle: str | None) -> Json:
    """One text's posterior. Identical draws are one entry; entries are sorted by their share of the weight."""
    log_weights = np.array([-np.inf if w is None else w for w in row["log_weights"]], float)
    groups: dict[tuple[Any, ...], Json] = {}
    for n, (draw, share) in enumerate(zip(row["draws"], weights.normalised(log_weights), strict=True)):
        group = groups.setdefault(
            (draw["finished"], *draw["ids"]),
            {
                "text": _clip(draw["text"]),
                "from": {},
                "share": 0.0,
                "gain": _finite(row["gains"][n]),
                "finished": draw["finished"],
                "same": None if oracle is None else draw["finished"] and _clip(draw["text"]) == oracle,
                "chosen": False,
            },
        )
        group["from"][draw["proposal"]] = group["from"].get(draw["proposal"], 0) + 1
        group["share"] += float(share)
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


def _clip(text: str | None, end: bool = False) -> Any:
    """A text that is too long for the page loses its end, or its beginning."""
    if text is None or len(text) <= CLIP:
        return text
    return f"… {text[-CLIP:]}" if end else f"{text[:CLIP]} … ({len(text) - CLIP:,} more characters)"


def _answers(run: Path, results: Results, limit: int) -> Json:
    """Held-out questions, spread evenly over what was asked, with every model's answer."""
    texts: dict[str, Json] = {}
    models = []
    for name, path in _models(run, results):
        rows = list(_rows(path))
        if not rows:
            continue
        if not texts:
            texts = {r["doc_id"]: _asked(r) for r in rows[:: math.ceil(len(rows) / limit)]}
        for row in rows:
            if row["doc_id"] in texts:
                answer = {"thought": _clip(row["thought"]), "text": _clip(row["text"]), "right": row["right"]}
                answer["same"] = None if row["oracle"] is None else row["thought"] == row["oracle"]
                texts[row["doc_id"]]["by"][str(len(models))] = answer
        models.append(name)
    return {"models": models, "texts": list(texts.values())}


def _asked(row: Json) -> Json:
    return {
        "id": row["doc_id"],
        "question": _clip(row["question"], end=True),
        "gold": _clip(row["gold"]),
        "oracle": _clip(row["oracle"]),
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
                yield f"{NAMES[method]}, iteration {line.iteration}", folder / "evaluate" / "answers.parquet"
        elif method in NAMES:
            folder = root / "iter_00" if method == "warm_start" else root
            yield NAMES[method], folder / "evaluate" / "answers.parquet"
