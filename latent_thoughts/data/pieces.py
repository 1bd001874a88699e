"""Shards as record batches, which a corpus is packed from; made ahead while the last shards are still sampled.

A piece made ahead bears the hash of its shard and holds its own, so that it is what the shard would give, or is not
used.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from latent_thoughts.data import records
from latent_thoughts.places import bench
from latent_thoughts.store import atomic, checked_table
from latent_thoughts.transfer import remove
from latent_thoughts.types import Manifest

IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("weight", pa.float64()),
        ("target", pa.list_(pa.int8())),
        ("text", pa.list_(IDS)),
        ("thoughts", pa.list_(pa.list_(IDS))),
    ]
)
HASH = hashlib.sha256().digest_size


def batch(folder: Path, manifest: Manifest, shard: str, weight: float, ahead: Path | None) -> pa.RecordBatch:
    """A shard's documents: from its piece in `ahead`, where there is a sound one, else from the shard itself.

    Raises UserError naming a shard that is missing or damaged.
    """
    made = None if ahead is None else _read(ahead / manifest.shards[shard]["sha256"])
    if made is None:
        return _columns(checked_table(folder, manifest, shard), weight)
    weights = pa.repeat(pa.scalar(weight), made.num_rows)
    return made.set_column(SCHEMA.get_field_index("weight"), SCHEMA.field("weight"), weights)


class Ahead:
    """Makes pieces of a stage's shards in a thread, while the stage runs. `folder` is `forget`'s once they are used."""

    def __init__(self, folder: Path):
        self.folder, self.pool, self.pieces = bench(folder), ThreadPoolExecutor(1), list[Future[None]]()

    def __call__(self, stage: Path, shards: dict[str, dict[str, Any]]) -> None:
        """Shards of a stage's folder that are there now, as its manifest will describe them."""
        self.pieces.append(self.pool.submit(self._make, stage, Manifest("", "", shards, {}, {})))

    def _make(self, stage: Path, manifest: Manifest) -> None:
        for name, told in manifest.shards.items():
            path = self.folder / told["sha256"]
            if not path.exists():
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, SCHEMA) as writer:
                    writer.write_batch(_columns(checked_table(stage, manifest, name), 1.0))
                content = sink.getvalue()
                with atomic(path) as temporary, temporary.open("wb") as file:
                    file.write(hashlib.sha256(content).digest())
                    file.write(content)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
        for piece in self.pieces:
            if kind is None:
                piece.result()


def forget(folder: Path) -> None:
    remove(bench(folder))


def _read(path: Path) -> pa.RecordBatch | None:
    if not path.exists():
        return None
    content = pa.memory_map(str(path)).read_buffer()
    if hashlib.sha256(content[HASH:]).digest() != content[:HASH].to_pybytes():
        return None
    return pa.ipc.open_stream(content[HASH:]).read_next_batch()


def _columns(table: pa.Table, weight: float) -> pa.RecordBatch:
    """What `Corpus.of` makes of a shard's documents, column by column: a cluster waits while its corpus is packed."""
    chunks = table.column("chunks").combine_chunks()
    starts = chunks.offsets.to_numpy()
    offsets = pa.array(starts - starts[0])
    parts = dict(zip([f.name for f in records.CHUNK], chunks.flatten().flatten(), strict=True))
    named = {"target": parts["target"].cast(pa.int8()), "text": parts["ids"], "thoughts": parts["thoughts"]}
    arrays = {name: pa.ListArray.from_arrays(offsets, values) for name, values in named.items()}
    arrays |= {"id": table.column("id").combine_chunks(), "weight": pa.repeat(pa.scalar(weight), len(table))}
    return pa.RecordBatch.from_arrays([arrays[field.name].cast(field.type) for field in SCHEMA], schema=SCHEMA)
