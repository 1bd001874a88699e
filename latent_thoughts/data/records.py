"""Documents and posteriors as Parquet rows. The schemas are documented in docs/formats.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from latent_thoughts import weights
from latent_thoughts.store import read_manifest, read_rows
from latent_thoughts.types import Chunk, Document, Posterior, ThoughtDocument

IDS = pa.list_(pa.int32())

CHUNK = pa.struct(
    [
        ("start", pa.int64()),
        ("text", pa.string()),
        ("ids", IDS),
        ("target", pa.bool_()),
        ("thoughts", pa.list_(IDS)),
    ]
)

DOCUMENTS = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("meta", pa.string()),  # JSON; `oracle` maps a chunk's index to the thought that came with the data
        ("chunks", pa.list_(CHUNK)),
    ]
)

SOURCE = pa.schema(  # documents as they were read, until they are chunked
    [("id", pa.string()), ("text", pa.string()), ("meta", pa.string()), ("pieces", pa.list_(pa.string())),
     ("thoughts", pa.string())]
)  # fmt: skip

POSTERIORS = pa.schema(
    [
        ("doc_id", pa.string()),
        ("chunk_index", pa.int32()),
        ("context_ids", IDS),
        ("chunk_ids", IDS),
        (
            "draws",
            pa.list_(
                pa.struct(
                    [
                        ("ids", IDS),
                        ("proposal", pa.string()),
                        ("log_posterior", pa.float64()),
                        ("log_prior", pa.float64()),
                        ("log_x", pa.float64()),
                        ("log_q", pa.float64()),
                        ("finished", pa.bool_()),
                        ("text", pa.string()),
                    ]
                )
            ),
        ),
        ("log_weights", pa.list_(pa.float64())),
        ("gains", pa.list_(pa.float64())),
        ("ess", pa.float64()),
        ("distinct", pa.int32()),
        ("chosen", pa.int32()),
        ("kept", pa.list_(pa.int32())),
        ("raw_logprob", pa.float64()),
    ]
)


def source_row(document: Document) -> dict[str, Any]:
    meta, thoughts = (json.dumps(value, ensure_ascii=False) for value in (document.meta, document.thoughts))
    return {"id": document.id, "text": document.text, "meta": meta, "pieces": document.pieces, "thoughts": thoughts}


def document_from(row: dict[str, Any]) -> Document:
    thoughts = {int(index): text for index, text in json.loads(row["thoughts"]).items()}
    pieces = None if row["pieces"] is None else tuple(row["pieces"])
    return Document(row["id"], row["text"], json.loads(row["meta"]), pieces, thoughts)


def document_row(document: ThoughtDocument) -> dict[str, Any]:
    chunks = [
        {"start": c.start, "text": c.text, "ids": c.ids, "target": target, "thoughts": thoughts}
        for c, thoughts, target in zip(document.chunks, document.thoughts, document.target, strict=True)
    ]
    meta = json.dumps(document.meta, ensure_ascii=False)
    return {"id": document.id, "source": document.source, "meta": meta, "chunks": chunks}


def document_of(row: dict[str, Any]) -> ThoughtDocument:
    chunks = row["chunks"]
    return ThoughtDocument(
        id=row["id"],
        chunks=tuple(Chunk(row["id"], index, c["start"], c["text"], tuple(c["ids"])) for index, c in enumerate(chunks)),
        thoughts=tuple(tuple(map(tuple, c["thoughts"])) for c in chunks),
        target=tuple(c["target"] for c in chunks),
        source=row["source"],
        meta=json.loads(row["meta"]),
    )


def oracle(document: ThoughtDocument) -> dict[int, str]:
    """The thoughts that came with the data, by chunk."""
    return {int(index): text for index, text in document.meta.get("oracle", {}).items()}


def shards(
    folder: Path, split: str, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, list[ThoughtDocument]]]:
    """The document shards of one split of a completed stage, one at a time: all, or those whose name is wanted."""
    manifest = read_manifest(folder)
    for name in manifest.shards:
        if name.startswith(f"{split}-") and wanted(name):
            yield name, [document_of(row) for row in read_rows(folder, manifest, name)]


def documents(folder: Path, split: str) -> list[ThoughtDocument]:
    """All documents of one split; there may be none."""
    return [document for _, part in shards(folder, split) for document in part]


def posterior_row(posterior: Posterior, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    draws = [
        {
            "ids": d.draw.ids,
            "proposal": d.proposal,
            "log_posterior": d.log_posterior,
            "log_prior": d.log_prior,
            "log_x": d.log_x,
            "log_q": d.log_q,
            "finished": d.draw.finished,
            "text": decode(d.draw.ids),
        }
        for d in posterior.draws
    ]
    return {
        "doc_id": posterior.chunk.doc_id,
        "chunk_index": posterior.chunk.index,
        "context_ids": posterior.context_ids,
        "chunk_ids": posterior.chunk.ids,
        "draws": draws,
        "log_weights": posterior.log_weights.tolist(),
        "gains": posterior.gains.tolist(),
        "ess": weights.effective_sample_size(posterior.log_weights),
        "distinct": len({d.draw.ids for d in posterior.draws if d.draw.finished}),
        "chosen": posterior.chosen,
        "kept": posterior.kept,
        "raw_logprob": posterior.raw_logprob,
    }
