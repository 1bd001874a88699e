"""prepare: source documents to chunked, tokenised document shards, and the initial checkpoint.

    latent-thoughts prepare recipe.yaml --out RUN

Three splits: `warm_start` (its thoughts may be used), `corpus` and `held_out`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_thoughts import model as models
from latent_thoughts.config import Recipe
from latent_thoughts.data import chunking, contamination, readers
from latent_thoughts.data.records import DOCUMENTS, document_row
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.places import below, place, version
from latent_thoughts.runlog import track
from latent_thoughts.store import Stage, stage_key
from latent_thoughts.types import Document, Manifest, UserError

SPLITS = ("warm_start", "corpus", "held_out")


def initialise(recipe: Recipe, folder: Path) -> Manifest:
    """The initial checkpoint: the base model and its tokenizer with the four tokens, in `folder`/model."""
    config = recipe.model.model_dump(exclude={"device", "attention"})
    seed = _world_seed(recipe)
    parts = [config, recipe.seed, seed, recipe.data.source, *_hashes(_model_files(recipe))]
    stage = Stage(folder, "initialise", stage_key("initialise", parts))
    if (manifest := stage.manifest) is not None:
        return manifest
    model, tokenizer, _ = models.load_base(recipe.model, recipe.data.source, recipe.seed, seed)
    models.save(model, tokenizer, folder / "model")
    return stage.close([], {"parameters": sum(p.numel() for p in model.parameters())})


def prepare(recipe: Recipe, base: Path, base_manifest: Manifest, folder: Path) -> Manifest:
    """Reads, splits, chunks and tokenises the source. Raises UserError for bad input, naming the row."""
    config = [recipe.data.model_dump(), recipe.chunking.model_dump(), _world_seed(recipe), _files(recipe)]
    config += contamination.key(recipe.contamination)
    stage = Stage(folder, "prepare", stage_key("prepare", config, {"base": base_manifest}))
    if (manifest := stage.manifest) is not None:
        return manifest
    tokenizer, _ = models.load_tokenizer(base / "model")
    codec, size = Codec(tokenizer), recipe.data.shard_documents
    counts: Counter[str] = Counter()
    names: list[str] = []
    waiting: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    tally = contamination.Tally(contamination.load(recipe.contamination))

    def flush(split: str) -> None:
        names.append(f"{split}-{sum(n.startswith(split) for n in names):05}.parquet")
        stage.write(names[-1], waiting[split], DOCUMENTS, {})
        waiting[split] = []

    def skipped(message: str) -> None:
        counts["malformed"] += 1
        if counts["malformed"] <= 20:
            counts[f"malformed: {message}"[:200]] += 1

    seen: set[str] = set()
    with track("prepare", float("inf"), "documents") as advance:
        for document in readers.read(recipe.data, _world_seed(recipe), skipped):
            if document.id in seen:
                counts["duplicates"] += 1
                continue
            seen.add(document.id)
            split = split_of(document, recipe)
            try:
                prepared = chunking.chunked(document, recipe.chunking, codec)
            except UserError as error:
                message = f"document {document.id}: {error}"
                if recipe.data.malformed == "error":
                    raise UserError(message) from None
                skipped(message)
                continue
            if not prepared.chunks:
                counts["empty"] += 1
                continue
            if tally.repeats(document.text) and recipe.contamination.remove:
                continue
            waiting[split].append(document_row(prepared))
            counts[f"{split}_documents"] += 1
            counts[f"{split}_chunks"] += len(prepared.chunks)
            counts[f"{split}_tokens"] += sum(len(chunk.ids) for chunk in prepared.chunks)
            if len(waiting[split]) == size:
                flush(split)
            advance(1)
    for split in SPLITS:
        if waiting[split]:
            flush(split)
    if not names:
        raise UserError(f"data.source {recipe.data.source} holds no documents")
    return stage.close(names, dict(counts) | tally.counts("documents"))


def split_of(document: Document, recipe: Recipe) -> str:
    """The split a world assigned, else by hash of the document's text: the same in every run."""
    if "split" in document.meta:
        return document.meta["split"]
    digest = hashlib.sha256(document.text.encode()).digest()
    held_out, warm_start = (int.from_bytes(digest[n : n + 8], "big") / 2**64 for n in (0, 8))
    if held_out < recipe.data.held_out:
        return "held_out"
    return "warm_start" if warm_start < recipe.data.warm_start else "corpus"


def _world_seed(recipe: Recipe) -> int:
    return recipe.seed if recipe.data.world.seed is None else recipe.data.world.seed


def _files(recipe: Recipe) -> list[list[str]]:
    """The source's files with their hashes: a changed file is prepared anew."""
    scheme, _, rest = recipe.data.source.partition(":")
    return _hashes(below(place(rest)) if scheme == "disk" else readers.files(recipe.data))


def _model_files(recipe: Recipe) -> list[Path]:
    """Files of a base model and a tokenizer that are folders or files here."""
    names = [name for name in (recipe.model.base, recipe.model.tokenizer) if isinstance(name, str)]
    return [path for name in names for path in below(place(name))]


def _hashes(paths: Sequence[Path]) -> list[list[str]]:
    return [[str(path), version(path)] for path in paths]
