"""What the M-step waits for before its first step: thought shards checked and packed into one mapped file.

    python benchmarks/packing.py [--documents 2000] [--shards 16] [--repeats 3] [--json FILE]

Documents of eight chunks of 180 tokens, each with a thought of 414 (what the paper's recipe has). By as many threads as
`corpus.write` takes, by one, from pieces made while the shards were sampled, and by Python objects, which is how a
user would write it first.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import pyarrow as pa

from latent_thoughts.data import corpus, records
from latent_thoughts.data.corpus import Corpus, Source
from latent_thoughts.data.pieces import SCHEMA, Ahead
from latent_thoughts.store import Stage, read_manifest
from latent_thoughts.types import Chunk, ThoughtDocument

CHUNKS, TEXT, THOUGHT = 8, 180, 414


def shards(folder: Path, documents: int, count: int) -> Source:
    stage, rng = Stage(folder, "sample", "key"), np.random.default_rng(0)

    def ids(size: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, 32000, size).tolist())

    names = [f"corpus-{n:05}.parquet" for n in range(count)]
    for n, name in enumerate(names):
        made = [
            ThoughtDocument(
                f"{n}-{m}",
                tuple(Chunk(f"{n}-{m}", c, 0, "", ids(TEXT)) for c in range(CHUNKS)),
                tuple((ids(THOUGHT),) for _ in range(CHUNKS)),
                (True,) * CHUNKS,
                "",
            )
            for m in range(documents // count)
        ]
        stage.write(name, [records.document_row(d) for d in made], records.DOCUMENTS, {})
    stage.close(names, {})
    return Source(folder, "corpus")


def by_objects(source: Source, path: Path) -> None:
    manifest = read_manifest(source.folder)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for name in manifest.shards:
            rows = records.read_rows(source.folder, manifest, name)
            writer.write_batch(Corpus.of(records.document_of(row) for row in rows).shards[0].batch)


def by_threads(count: int, ahead: bool = False) -> Callable[[Source, Path], None]:
    def write(source: Source, path: Path) -> None:
        corpus.THREADS = count
        corpus.write([source if ahead else source._replace(ahead=None)], path)

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    threads = corpus.THREADS
    systems = {"ours": by_threads(threads, ahead=True), "not ahead": by_threads(threads), "one thread": by_threads(1)}
    systems |= {"objects": by_objects}
    took = {name: list[float]() for name in systems}
    with tempfile.TemporaryDirectory() as temporary:
        source, packed = shards(Path(temporary) / "stage", a.documents, a.shards), Path(temporary) / "documents.arrow"
        source = source._replace(ahead=Path(temporary) / "ahead")
        with Ahead(Path(temporary) / "ahead") as ahead:
            ahead(source.folder, read_manifest(source.folder).shards)
        for _ in range(a.repeats):
            for name, write in systems.items():
                began = time.perf_counter()
                write(source, packed)
                took[name].append(time.perf_counter() - began)
                packed.unlink()
    tokens = a.documents // a.shards * a.shards * CHUNKS * (TEXT + THOUGHT)
    rates = {name: [tokens / t for t in seconds] for name, seconds in took.items()}
    rows = [common.row(name, "tokens_per_second", "1/s", values) for name, values in rates.items()]
    median = {name: float(np.median(values)) for name, values in rates.items()}
    ratios = {f"ours/{name} tokens_per_second": median["ours"] / median[name] for name in list(systems)[1:]}
    common.finish("packing", common.machine(), rows, ratios, a.json, settings={k: str(v) for k, v in vars(a).items()})


if __name__ == "__main__":
    main()
