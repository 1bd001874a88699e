"""prepare: source documents to chunked, tokenised document shards, and the initial checkpoint.

    latent-thoughts prepare recipe.yaml --out RUN

Three splits: `warm_start` (its thoughts may be used), `corpus` and `held_out`.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latent_thoughts import executors
from latent_thoughts import model as models
from latent_thoughts.bases import path_of
from latent_thoughts.config import Data, Recipe
from latent_thoughts.data import chunking, contamination, readers
from latent_thoughts.data.records import DOCUMENTS, SOURCE, document_from, document_row, source_row
from latent_thoughts.data.tokenizer import Codec, on_all_cores
from latent_thoughts.executors.work import Do, Told
from latent_thoughts.places import below, place, version
from latent_thoughts.progress import track
from latent_thoughts.provenance import PREPARED_BY, save_recipe
from latent_thoughts.seals import read_sealed, write_sealed
from latent_thoughts.store import Stage, base_of, stage_key
from latent_thoughts.types import Document, Manifest, ThoughtDocument, UserError

SPLITS = ("warm_start", "corpus", "held_out")
_SOURCE, _READ = "source-", "read.json"  # what only an unfinished stage holds


def initialise(recipe: Recipe, folder: Path) -> Manifest:
    """The initial checkpoint: the base model and its tokenizer with the four tokens, in `folder`/model.

    Raises UserError where what is to be prepared for it is missing: documents must not stay behind that are of another.
    """
    config = recipe.model.model_dump(exclude={"device", "attention", "allow_pickle"})
    seed = _world_seed(recipe)
    parts = [config, recipe.seed, seed, recipe.data.source, *_model_files(recipe)]
    _look(recipe)
    stage = Stage(folder, "initialise", stage_key("initialise", parts))
    if (manifest := stage.manifest) is not None:
        return manifest
    model, tokenizer, _ = models.load_base(recipe.model, recipe.data.source, recipe.seed, seed)
    models.save(model, tokenizer, folder / "model")
    return stage.close([], {"parameters": sum(p.numel() for p in model.parameters())}, model="model")


def prepare(recipe: Recipe, base: Path, base_manifest: Manifest, folder: Path) -> Manifest:
    """Reads, splits, chunks and tokenises the source; `folder`/settings.yaml says by which recipe.

    Raises UserError for bad input, naming the row.
    """
    config = [recipe.data.model_dump(), *chunking.key(recipe.chunking), _world_seed(recipe), _files(recipe)]
    config += contamination.key(recipe.contamination)
    stage = Stage(folder, "prepare", stage_key("prepare", config, {"base": base_manifest}))
    if (manifest := stage.manifest) is not None:
        stage.remove(_READ)  # left by a process that was killed right after the manifest was there
        save_recipe(recipe, folder, PREPARED_BY)
        return manifest
    read = _read(recipe, stage)
    counts, described = Counter(read["counts"]), {}
    tally = contamination.Tally(contamination.load(recipe.contamination))
    with track("prepare", sum(read["rows"].values()), "documents") as advance:
        told = lambda amount, counts: advance(amount)  # noqa: E731
        for result in executors.run(recipe, Shards(recipe, stage, base), read["rows"], told):
            found = result.counts
            counts.update(found["sums"])
            _note(counts, found["malformed"])
            tally.add(found["repeated"])
            described |= result.shards
    if not any(counts[f"{split}_documents"] for split in SPLITS):
        left = next((f"; first of {counts['malformed']} {n}" for n in counts if n.startswith("malformed: ")), "")
        raise UserError(f"data.source {recipe.data.source} holds no documents{left}")
    for name in read["rows"]:
        stage.remove(_SOURCE + name)
    counts = dict(counts) | tally.counts("documents")
    manifest = stage.close(list(read["rows"]), counts, described, base=base_of(base_manifest))
    save_recipe(recipe, folder, PREPARED_BY)
    stage.remove(_READ)
    return manifest


def _read(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """Reads the source once and cuts it, in its order, into shards of documents as they came (`source-NAME`), which
    are tokenised by whichever worker. Returns their `rows` by name, and `counts` of what was left out.

    Where a shard that is still needed has been taken away, as a damaged one is, all is read again.
    """
    if stage.shard(_READ).exists():
        known = read_sealed(stage.shard(_READ), "rows", "counts")
        if all(stage.shard(_SOURCE + n).exists() or stage.done(n) is not None for n in known["rows"]):
            return known
    rows: dict[str, int] = {}
    counts, numbers = Counter[str](), Counter[str]()
    waiting: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}

    def flush(split: str) -> None:
        name = f"{split}-{numbers[split]:05}.parquet"
        rows[name], numbers[split] = len(waiting[split]), numbers[split] + 1
        stage.write(_SOURCE + name, waiting[split], SOURCE, {})
        waiting[split] = []

    for data in recipe.data.parts:
        if left := readers.left_out(data):
            names = f"{', '.join(left[:3])}{f' and {len(left) - 3:,} more' if len(left) > 3 else ''}"
            why = "in a folder that holds JSONL or Parquet nothing else is read (data.format)"
            print(f"latent-thoughts: {data.source}: {names} left out: {why}", file=sys.stderr)
    seen = Seen()
    with track("read", float("inf"), "documents") as advance:
        for data, found in _documents(recipe, lambda m: _note(counts, [m])):
            split = split_of(found, data)
            blank = not found.text.strip()
            document = None if blank else seen.new(found, split)
            if document is None:
                counts["empty" if blank else "duplicates"] += 1
                continue
            counts["renamed"] += document.id != found.id
            waiting[split].append(source_row(document))
            if len(waiting[split]) == recipe.data.shard_documents:
                flush(split)
            advance(1)
    for split in SPLITS:
        if waiting[split]:
            flush(split)
    told = {"rows": rows, "counts": {name: count for name, count in counts.items() if count}}
    write_sealed(stage.shard(_READ), told)
    return told


class Seen:
    """The texts and names of the documents so far, as hashes of 16 bytes: a corpus may be large.

    The names that readers give, hashes of the texts, are not kept.
    """

    def __init__(self):
        self.texts, self.names = set[bytes](), set[bytes]()

    def new(self, document: Document, split: str) -> Document | None:
        """The document under a name of its own; None where its text has been there, whatever it was called.

        In the warm start a text may come again with other thoughts. A world draws its documents from fewer problems, so
        that texts recur; it holds out by problem.
        """
        text, name = _digest(document.text), _digest(document.id)
        teaches = split == "warm_start" and bool(document.thoughts)
        unit = _digest(f"{document.text}\n{sorted(document.thoughts.items())}") if teaches else text
        taught = _digest(f"{document.text}\ntaught")  # stands for the text in the warm start, with whatever thoughts
        known = text in self.texts or (unit if teaches else taught) in self.texts
        again = taught in self.texts if document.id == text.hex()[:16] else name in self.names
        if known and "split" not in document.meta:
            return None
        self.texts |= {unit, taught} if teaches else {unit}
        if document.id != text.hex()[:16]:
            self.names.add(name)  # two files may both count from 0
        return replace(document, id=f"{document.id}-{unit.hex()}") if again else document


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def _documents(recipe: Recipe, skipped: Callable[[str], None]) -> Iterator[tuple[Data, Document]]:
    """Held-out documents of their own source come first, so that training drops what repeats them."""
    for data in recipe.data.parts:
        for document in readers.read(data, _world_seed(recipe), skipped):
            yield data, document


def _note(counts: Counter[str], malformed: Sequence[str]) -> None:
    """Counts documents that were left out as malformed, and names the first 20 of all."""
    for message in malformed:
        counts["malformed"] += 1
        if counts["malformed"] <= 20:
            counts[f"malformed: {message}"[:200]] += 1


@dataclass(frozen=True)
class Shards:
    """The stage's work for an executor: a unit is a shard of documents, which it chunks and tokenises."""

    recipe: Recipe
    stage: Stage
    base: Path

    def files(self, unit: str) -> list[str]:
        return [unit]

    def set_up(self, stack: contextlib.ExitStack) -> Do:
        codec = Codec(models.load_tokenizer(self.base / "model")[0])
        overlap = contamination.load(self.recipe.contamination)

        def do(unit: str, told: Told) -> None:
            documents = [document_from(row) for row in self.stage.rows(_SOURCE + unit)]
            self._write(unit, documents, codec, contamination.Tally(overlap))
            told(len(documents), {})

        return do

    def _write(self, unit: str, documents: list[Document], codec: Codec, tally: contamination.Tally) -> None:
        split, rows, malformed = unit.partition("-")[0], [], []
        sums: Counter[str] = Counter()
        for document, prepared in zip(documents, self._chunked(documents, codec), strict=True):
            if isinstance(prepared, UserError):
                malformed.append(f"document {document.id}: {prepared}")
                if self.recipe.data.malformed == "error":
                    raise UserError(malformed[-1])
                continue
            if not prepared.chunks:
                sums["empty"] += 1
                continue
            if tally.repeats(document.text) and self.recipe.contamination.remove:
                continue
            rows.append(document_row(prepared))
            sums[f"{split}_documents"] += 1
            sums[f"{split}_chunks"] += len(prepared.chunks)
            sums[f"{split}_tokens"] += sum(len(chunk.ids) for chunk in prepared.chunks)
        self.stage.write(unit, rows, DOCUMENTS, {"sums": sums, "malformed": malformed, "repeated": tally.record()})

    def _chunked(self, documents: list[Document], codec: Codec) -> list[ThoughtDocument | UserError]:
        alone = self.recipe.executor.workers == 1 and self.recipe.threads is None
        with on_all_cores() if alone else contextlib.nullcontext():
            return list(chunking.all_chunked(documents, self.recipe.chunking, codec))


def split_of(document: Document, data: Data) -> str:
    """The split a world assigned, else by hash of the document's text: the same in every run."""
    if "split" in document.meta:
        return document.meta["split"]
    digest = hashlib.sha256(document.text.encode()).digest()
    held_out, warm_start = (int.from_bytes(digest[n : n + 8], "big") / 2**64 for n in (0, 8))
    if held_out < data.held_out:
        return "held_out"
    return "warm_start" if warm_start < data.warm_start else "corpus"


def _world_seed(recipe: Recipe) -> int:
    return recipe.seed if recipe.data.world.seed is None else recipe.data.world.seed


def _look(recipe: Recipe) -> None:
    """Raises UserError for sources and evaluation sets that are missing."""
    for data in recipe.data.parts:
        readers.files(data)
    contamination.look(recipe.contamination)


def _files(recipe: Recipe) -> list[list[str]]:
    """The sources' files with their hashes: a changed file is prepared anew."""
    return [file for data in recipe.data.parts for file in readers.hashes(data)]


def _model_files(recipe: Recipe) -> list[list[str]]:
    """Files of a base model and a tokenizer that are folders or files here, with their hashes."""
    names = [name for name in (recipe.model.base, recipe.model.tokenizer) if isinstance(name, str)]
    paths = [Path(path_of(name)) if name.startswith("package:") else place(name) for name in names]
    return [[str(path), version(path)] for found in paths for path in below(found)]
