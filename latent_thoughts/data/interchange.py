"""Thoughts as text, to and from other software: a row a document, `{"text", "chunks": [{"suffix", "latent"}]}`.

That is the layout in which the paper's authors publish theirs: `suffix` is a chunk, `latent` the thought before it.
Ours adds `id` and `source`; Parquet and Hugging Face datasets have the same columns (docs/formats.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.types import ThoughtDocument, UserError

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("text", pa.string()),
        ("chunks", pa.list_(pa.struct([("suffix", pa.string()), ("latent", pa.string())]))),
    ]
)


def row(document: ThoughtDocument, codec: Codec) -> dict[str, Any]:
    """A document with the first thought of each chunk; `latent` is None where there is none."""
    latents = [codec.decode(kept[0]) if kept else None for kept in document.thoughts]
    chunks = [{"suffix": c.text, "latent": z} for c, z in zip(document.chunks, latents, strict=True)]
    text = "".join(c.text for c in document.chunks)
    return {"id": document.id, "source": document.source, "text": text, "chunks": chunks}


def pieces_of(columns: dict[str, Any], where: str) -> tuple[tuple[str, ...], dict[int, str]]:
    """A row's pieces, which joined are its text, and its thoughts by piece; empty ones are none.

    White space that chunks leave out of the text goes to the piece before it. Raises UserError where `chunks` is not
    of this layout, or its chunks are not those of the text.
    """
    text, chunks = columns.get("text"), columns.get("chunks")
    if not isinstance(chunks, list) or not all(
        isinstance(c, dict) and isinstance(c.get("suffix"), str) for c in chunks
    ):
        raise UserError(f"{where}: `chunks` must be a list of objects with `suffix` and `latent`")
    suffixes = [c["suffix"] for c in chunks]
    latents = [c.get("latent") for c in chunks]
    if not all(isinstance(z, str | None) for z in latents):
        raise UserError(f"{where}: `latent` must be text or null")
    pieces = suffixes if text is None else _placed(str(text), suffixes, where)
    return tuple(pieces), {n: z for n, z in enumerate(latents) if z}


def _placed(text: str, suffixes: Sequence[str], where: str) -> list[str]:
    """The suffixes with the text's white space between them: joined they are the text."""
    starts, at = [], 0
    for n, suffix in enumerate(suffixes):
        found = text.find(suffix, at)
        if found < 0 or text[at:found].strip():
            raise UserError(f"{where}: chunk {n} does not follow in the text: {suffix[:60]!r}")
        starts.append(found)
        at = found + len(suffix)
    if text[at:].strip():
        raise UserError(f"{where}: the text goes on behind its last chunk: {text[at : at + 60]!r}")
    edges = [0, *starts[1:], len(text)] if starts else []
    return [text[a:b] for a, b in itertools.pairwise(edges)]
