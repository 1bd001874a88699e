"""What is trained on: documents with their thoughts as token ids, in one Arrow file that is mapped, not read.

The file is the training stage's cache: shards are checked and put in it once, one at a time, and then
any document is at hand for the price of its pages, whatever the size of the corpus.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from latent_thoughts.data import pieces
from latent_thoughts.data.pieces import SCHEMA
from latent_thoughts.machine import cores
from latent_thoughts.store import atomic, read_manifest
from latent_thoughts.types import Chunk, Manifest, ThoughtDocument

THREADS = min(8, cores())  # that read shards while a corpus is packed


class Source(NamedTuple):
    """A split of a completed stage; in an epoch its documents are visited `weight` times in the mean. `ahead` may hold
    pieces of its shards (pieces.py). `slice` (n, of) is every of-th shard from the n-th."""

    folder: Path
    split: str
    weight: float = 1.0
    ahead: Path | None = None
    slice: tuple[int, int] = (0, 1)

    def names(self, manifest: Manifest) -> list[str]:
        first, step = self.slice
        return [name for name in manifest.shards if name.startswith(f"{self.split}-")][first::step]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a document's chunks, and of each chunk's thoughts."""

    text: list[int]
    thoughts: list[list[int]]


class Corpus:
    """Documents by number. `weights` (documents,) are those of their sources."""

    def __init__(self, batches: Sequence[pa.RecordBatch], path: Path | None = None):
        self.path = path
        self.shards = [_Shard(batch) for batch in batches]
        self.starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        weights = [batch.column("weight").to_numpy() for batch in batches]
        self.weights = np.concatenate([np.zeros(0), *weights])

    @classmethod
    def of(cls, documents: Iterable[ThoughtDocument], weight: float = 1.0) -> Corpus:
        return cls([_batch(documents, weight)])

    @classmethod
    def open(cls, path: Path) -> Corpus:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return cls([reader.get_batch(n) for n in range(reader.num_record_batches)], path)

    def __reduce__(self):  # a loader's worker maps the file anew
        return (Corpus.open, (self.path,)) if self.path else (Corpus, ([shard.batch for shard in self.shards],))

    def __len__(self) -> int:
        return len(self.weights)

    def _at(self, index: int) -> tuple[_Shard, int]:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.shards[shard], index - int(self.starts[shard])

    @property
    def targets(self) -> bool:
        """Whether any chunk has a thought or is meant for one."""
        return any(shard.target.any() or len(shard.thought) > 1 for shard in self.shards)

    @property
    def thoughtless(self) -> bool:
        """Whether any chunk has no thought."""
        return any((np.diff(shard.thoughts) == 0).any() for shard in self.shards)

    def name(self, index: int) -> str:
        shard, row = self._at(index)
        return shard.batch.column("id")[row].as_py()

    def lengths(self, index: int) -> Lengths:
        shard, row = self._at(index)
        return shard.lengths(row)

    def __getitem__(self, index: int) -> ThoughtDocument:
        """The document without its characters: ids are all that training needs."""
        shard, row = self._at(index)
        return shard.document(row)


class _Shard:
    """One record batch, as flat arrays: documents hold chunks, chunks hold tokens and thoughts."""

    def __init__(self, batch: pa.RecordBatch):
        self.batch = batch
        chunks, thoughts = batch.column("text"), batch.column("thoughts").values
        self.target = batch.column("target").values.to_numpy()
        self.chunks = chunks.offsets.to_numpy()
        self.text, self.text_ids = chunks.values.offsets.to_numpy(), chunks.values.values.to_numpy()
        self.thoughts = thoughts.offsets.to_numpy()
        self.thought, self.thought_ids = thoughts.values.offsets.to_numpy(), thoughts.values.values.to_numpy()

    def lengths(self, row: int) -> Lengths:
        first, last = self.chunks[row : row + 2].tolist()
        at = self.thoughts[first : last + 1].tolist()
        sizes = np.diff(self.thought[at[0] : at[-1] + 1]).tolist()
        thoughts = [sizes[a - at[0] : b - at[0]] for a, b in itertools.pairwise(at)]
        return Lengths(np.diff(self.text[first : last + 1]).tolist(), thoughts)

    def document(self, row: int) -> ThoughtDocument:
        name = self.batch.column("id")[row].as_py()
        numbers = range(*self.chunks[row : row + 2].tolist())
        chunks = [Chunk(name, n, 0, "", _ids(self.text_ids, self.text, c)) for n, c in enumerate(numbers)]
        thoughts = [
            tuple(_ids(self.thought_ids, self.thought, z) for z in range(*self.thoughts[c : c + 2].tolist()))
            for c in numbers
        ]
        target = tuple(bool(t) for t in self.target[numbers.start : numbers.stop])
        return ThoughtDocument(name, tuple(chunks), tuple(thoughts), target, "")


def _ids(ids: np.ndarray, offsets: np.ndarray, n: int) -> tuple[int, ...]:
    return tuple(ids[offsets[n] : offsets[n + 1]].tolist())


def _batch(documents: Iterable[ThoughtDocument], weight: float) -> pa.RecordBatch:
    rows = [
        {
            "id": d.id,
            "weight": weight,
            "target": [int(t) for t in d.target],
            "text": [c.ids for c in d.chunks],
            "thoughts": d.thoughts,
        }
        for d in documents
    ]
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def write(sources: Sequence[Source], path: Path) -> None:
    """Puts the sources' documents into one file, a shard at a time; each is checked against its manifest.

    Raises UserError naming a shard that is missing or damaged.
    """
    with atomic(path) as temporary, pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for batch in _batches(sources):
            writer.write_batch(batch)


def _batches(sources: Sequence[Source]) -> Iterator[pa.RecordBatch]:
    """All shards in order. Threads read ahead by a few: reading, checking and decoding leave Python's lock."""
    manifests = [(source, read_manifest(source.folder)) for source in sources]
    shards = ((s, m, name) for s, m in manifests for name in s.names(m))
    with ThreadPoolExecutor(THREADS) as pool:
        ahead = deque(pool.submit(_batch_of, *shard) for shard in islice(shards, 2 * THREADS))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(_batch_of, *shard) for shard in islice(shards, 1))


def _batch_of(source: Source, manifest: Manifest, name: str) -> pa.RecordBatch:
    return pieces.batch(source.folder, manifest, name, source.weight, source.ahead)
