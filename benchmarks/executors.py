"""What Ray costs beside local worker processes, and what many shards cost the driver.

    python benchmarks/executors.py [--chunks 200] [--k 2] [--thought 32] [--repeats 1] [--json FILE]
    python benchmarks/executors.py --shards 10000,100000 [--json FILE]

The first samples thoughts for chunks of about 100 tokens with SmolLM2-135M-Instruct (the model of benchmarks/estep.py;
extra `ray`), in shards of five documents: two local worker processes against two actors of a Ray that starts with the
command and ends with it. Seconds are the whole stage's: processes, Ray, model, manifest. The second writes empty
shards with two actors, and tells the driver's processor time and peak memory.

Every run is a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parent))
import common
import estep_systems

from latent_thoughts import executors
from latent_thoughts import model as models
from latent_thoughts.config import Recipe, World, resolve
from latent_thoughts.data import worlds
from latent_thoughts.data.records import DOCUMENTS, document_row
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.executors.work import Do, Told
from latent_thoughts.stages.sample import sample
from latent_thoughts.store import Stage
from latent_thoughts.types import Chunk, ThoughtDocument

SHARD = 5  # documents
EXECUTORS = {"local": {"kind": "local", "workers": 2}, "ray": {"kind": "ray", "workers": 2}}


def prepare(run: Path, count: int) -> None:
    """A model and prepared shards of one chunk a document, as the stages before would leave them."""
    stage = Stage(run / "train", "train", "model")  # first: it moves aside what it does not know
    estep_systems.prepare(run / "train" / "model", "bfloat16")
    stage.close([], {})
    codec, rng = Codec(models.load_tokenizer(run / "train" / "model")[0]), np.random.default_rng(0)
    stories = worlds.documents("stories", World(documents=20 * count, teacher_documents=0), 0)
    ids, documents, at = codec.encode("\n".join(d.text for d in stories)), [], 0
    for n in range(count):
        size = int(rng.integers(80, 121))
        chunk = Chunk(f"doc{n}", 0, 0, codec.decode(ids[at : at + size]), tuple(ids[at : at + size]))
        documents.append(ThoughtDocument(f"doc{n}", (chunk,), ((),), (True,), ""))
        at += size
    stage, names = Stage(run / "prepare", "prepare", "documents"), []
    for first in range(0, count, SHARD):
        names.append(f"corpus-{first // SHARD:05}.parquet")
        stage.write(names[-1], [document_row(d) for d in documents[first : first + SHARD]], DOCUMENTS, {})
    stage.close(names, {})


def recipe(name: str, k: int, thought: int) -> Recipe:
    sampled = {"preset": "paper", "k": k, "max_thought_tokens": thought}
    # one thread a worker, as two of them have on two cores
    return resolve({"threads": 1, "model": {"dtype": "bfloat16"}, "sample": sampled, "executor": EXECUTORS[name]})


def sampled(name: str, run: Path, folder: Path, k: int, thought: int) -> dict[str, float]:
    """Seconds of the stage; `workers` are those of the shards, added up over the workers."""
    began = time.perf_counter()
    settings = recipe(name, k, thought)
    counts = sample(settings, settings.sample, run / "train", run / "prepare", folder, 1).counts
    return {"seconds": time.perf_counter() - began, "workers": counts["seconds"], "draw_tokens": counts["draw_tokens"]}


@dataclass(frozen=True)
class Empty:
    """Work that is none."""

    stage: Stage

    def files(self, unit: str) -> list[str]:
        return [unit]

    def set_up(self, stack: contextlib.ExitStack) -> Do:
        def do(unit: str, told: Told) -> None:
            self.stage.write(unit, [], pa.schema([("id", pa.string())]), {"documents": 0})

        return do


def driven(shards: int, folder: Path) -> dict[str, float]:
    """The driver's share of a stage of empty shards."""
    work, units = Empty(Stage(folder, "empty", "empty")), {f"corpus-{n:06}.parquet": 1.0 for n in range(shards)}
    began, busy, described = time.perf_counter(), time.process_time(), {}
    for result in executors.run(recipe("ray", 1, 1), work, units, lambda amount, counts: None):
        described |= result.shards
    work.stage.close(list(units), {}, described)
    busy, seconds = time.process_time() - busy, time.perf_counter() - began
    assert len(described) == shards
    return {"driver_ms_per_shard": 1e3 * busy / shards, "seconds": seconds, "driver_peak_rss_gb": common.peak_memory()}


def apart(*arguments: object) -> dict[str, Any]:
    """`sampled` or `driven` in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(next(line for line in done.stdout.splitlines()[::-1] if line.startswith("{")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--thought", type=int, default=32, help="tokens at most")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--shards", default="", help="numbers of empty shards, separated by commas, instead")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure:
        name, *rest = a.measure
        if name == "driven":
            print(json.dumps(driven(int(rest[0]), Path(rest[1]))))
        else:
            print(json.dumps(sampled(name, Path(rest[0]), Path(rest[1]), int(rest[2]), int(rest[3]))))
        return
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary)
        if not a.shards:
            prepare(run, a.chunks)
        for repeat in range(a.repeats):
            for shards in filter(None, a.shards.split(",")):
                key = "ray", f"{int(shards):,} empty shards"
                found.setdefault(key, []).append(apart("driven", shards, run / f"{shards}-{repeat}"))
            for name in EXECUTORS if not a.shards else ():
                figures = apart(name, run, run / f"{name}-{repeat}", a.k, a.thought)
                found.setdefault((name, f"{a.chunks} chunks"), []).append(figures)
            print(found, file=sys.stderr, flush=True)
    units = {"seconds": "s", "workers": "s", "driver_ms_per_shard": "ms", "driver_peak_rss_gb": "GB"}
    rows = [
        common.row(name, f"{metric}, {what}", units.get(metric, "tokens"), [v[metric] for v in values])
        for (name, what), values in found.items()
        for metric in values[0]
    ]
    seconds = {name: statistics.median(v["seconds"] for v in values) for (name, _), values in found.items()}
    ratios = {"ray/local seconds": seconds["ray"] / seconds["local"]} if "local" in seconds else {}
    common.finish("executors", common.machine(), rows, ratios, a.json, settings={k: str(v) for k, v in vars(a).items()})


if __name__ == "__main__":
    main()
