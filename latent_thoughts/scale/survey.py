"""How large a corpus is, in the units that cost: from at most 1,000 of its documents."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from latent_thoughts.config import Data, Recipe
from latent_thoughts.data import chunking, readers, worlds
from latent_thoughts.data.records import DOCUMENTS, document_row, oracle
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.places import opened, seekable
from latent_thoughts.stages.prepare import SPLITS, Seen, split_of
from latent_thoughts.types import ThoughtDocument, UserError

MOST = 1000  # documents that are read
READ = 4 * 2**20  # bytes of a file, by which its lines are counted
CONTROLS = 4  # control tokens of a form: S P E, or S E S Q E


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a chunk that gets a thought: of its context, of itself, of the thought."""

    context: int
    chunk: int
    thought: int


@dataclass(slots=True)
class Split:
    """The documents of a split: how many there are, and what was measured on those that were read."""

    documents: float = 0.0
    read: int = 0
    raw_tokens: int = 0
    pieces: list[Piece] = field(default_factory=list)

    def add(self, raw_tokens: int, pieces: list[Piece]) -> None:
        self.read += 1
        self.raw_tokens += raw_tokens
        self.pieces += pieces

    @property
    def scale(self) -> float:
        """Documents for each one that was read."""
        return self.documents / self.read if self.read else 0.0

    def mean(self, name: str) -> float:
        """Mean of a piece's field, a document."""
        return sum(getattr(piece, name) for piece in self.pieces) / max(1, self.read)

    @property
    def text_length(self) -> float:
        """Mean tokens of a document's text alone."""
        return self.raw_tokens / max(1, self.read)

    @property
    def raw_length(self) -> float:
        """Mean tokens of a document without thoughts, with BOS and EOS."""
        return self.text_length + 2

    @property
    def length(self) -> float:
        """Mean tokens of a document with its thoughts."""
        return self.raw_length + self.mean("thought") + CONTROLS * len(self.pieces) / max(1, self.read)


@dataclass(slots=True)
class Survey:
    splits: dict[str, Split]
    bytes_per_token: float  # of a document shard
    known_thoughts: bool  # measured, and not assumed from plan.thought_ratio


def survey(recipe: Recipe, codec: Codec) -> Survey:
    """Reads, cuts and tokenises the first documents. Raises UserError for a source that holds none."""
    seed = recipe.seed if recipe.data.world.seed is None else recipe.data.world.seed
    splits = {name: Split() for name in SPLITS}
    rows, tokens, known, seen = [], 0, False, Seen()
    for data in recipe.data.parts:
        read, looked = Counter[str](), 0
        most = None if data.held_out == 1 else MOST  # what is held out apart is read whole
        for document in itertools.islice(readers.read(data, seed, lambda _: None), most):
            looked += 1
            split = split_of(document, data)
            if seen.new(document, split) is None:
                continue
            try:
                prepared = chunking.chunked(document, recipe.chunking, codec)
            except UserError:
                if data.malformed == "error":
                    raise
                continue
            if not prepared.chunks:
                continue
            known |= bool(oracle(prepared))
            size = sum(len(chunk.ids) for chunk in prepared.chunks)
            splits[split].add(size, list(_pieces(prepared, recipe, codec)))
            read[split], tokens = read[split] + 1, tokens + size
            rows.append(document_row(prepared))
        if not read:
            raise UserError(f"data.source {data.source} holds no documents")
        _count(recipe, data, splits, read, looked, seed)
    some = max(splits.values(), key=lambda split: split.read)
    for name, split in splits.items():  # one of which no document was read is taken to be like the others
        if not split.read:
            splits[name] = replace(some, documents=split.documents)
    return Survey(splits, _stored(rows) / tokens, known)


def assumed(recipe: Recipe) -> Survey:
    """The corpus that `plan.documents` and `plan.tokens` describe, all of whose documents are alike."""
    plan = recipe.plan
    assert plan.documents and plan.tokens
    raw, size = plan.tokens / plan.documents, plan.chunk_tokens
    count = max(1, round(raw / size))
    thought = min(recipe.sample.max_thought_tokens, round(plan.thought_ratio * raw / count))
    chunk = round(raw / count)
    before = recipe.sample.context_chunks
    pieces = [Piece(min(n, before) * chunk, chunk, thought) for n in range(count)]
    documents = min(plan.documents, recipe.data.limit or plan.documents)
    counts = {name: documents * share for name, share in _shares(recipe).items()}
    if recipe.data.held_out_source:
        counts["held_out"] = recipe.evaluate.documents  # at least, or fewer are asked
    splits = {name: Split(count, 1, round(raw), pieces) for name, count in counts.items()}
    return Survey(splits, 6.0, False)


def _pieces(document: ThoughtDocument, recipe: Recipe, codec: Codec) -> Iterator[Piece]:
    known, sizes = oracle(document), [len(chunk.ids) for chunk in document.chunks]
    for n, target in enumerate(document.target):
        if not target:
            continue
        length = len(codec.encode(known[n])) if n in known else round(recipe.plan.thought_ratio * sizes[n])
        context = sum(sizes[max(0, n - recipe.sample.context_chunks) : n])
        yield Piece(context, sizes[n], min(length, recipe.sample.max_thought_tokens))


def _shares(recipe: Recipe) -> dict[str, float]:
    data = recipe.data.parts[-1]
    train = 1 - data.held_out
    warm = train * data.warm_start
    return {"warm_start": warm, "corpus": train - warm, "held_out": data.held_out}


def _count(recipe: Recipe, data: Data, splits: dict[str, Split], read: Counter[str], looked: int, seed: int) -> None:
    """Adds how many documents of a source each split holds; exact where all were read. Of those that were looked at,
    duplicates were not `read`, and as many are taken to be among the others."""
    if data.source.startswith("world:"):
        made = worlds.documents(data.source.removeprefix("world:"), data.world, seed)
        for document in itertools.islice(made, data.limit):
            splits[document.meta["split"]].documents += 1
        return
    all_read = looked < MOST or data.held_out == 1
    total = float(looked) if all_read else max(looked, recipe.plan.documents or _documents(data))
    total = min(total, data.limit or total)
    for name, count in read.items():
        splits[name].documents += total * count / looked


def _documents(data: Data) -> float:
    """Rows of local files: counted in Parquet, by bytes in JSONL, also where it is packed."""
    found = readers.files(data)
    if not found:
        raise UserError("the corpus is not made of local files, which can be counted: set plan.documents")
    return sum(_rows(data, path) for path in found)


def _rows(data: Data, path: Path) -> float:
    kind = readers.kind_of(data, path)
    if kind == "parquet":
        return pq.read_metadata(seekable(path)).num_rows
    if kind != "jsonl":
        return 1
    with opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        lines, count = readers.unpacked(path, file), 0
        while part := sum(1 for _ in itertools.islice(lines, MOST)):
            count += part
            if READ < file.tell() < size:  # what unpacks reads ahead, by little of so much
                return count * size / file.tell()
        return count


def _stored(rows: list[dict]) -> int:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=DOCUMENTS), sink, compression="zstd")
    return sink.getvalue().size
