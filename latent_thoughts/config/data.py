"""Sections `data` and `chunking`: where documents come from, and how they are cut."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from latent_thoughts.config.base import Pattern, Positive, Section, Seed, Share

FIELD = re.compile(r"\{([^{}]+)\}")  # a column's name in a template


class World(Section):
    """Size of a built-in world (`data.source: world:NAME`)."""

    documents: Positive = 2000
    teacher_documents: Annotated[int, Field(ge=0)] = 150
    known_share: Share = 0.8  # share of the world's facts that the teacher's thoughts use
    held_out_share: Share = 0.2  # share of the problems that occur in no training document
    chain: Positive = 1  # walks in a document, each from where the one before it ended (world:hindsight)
    seed: Seed | None = None  # default: the run's seed


class Data(Section):
    """Where documents come from, and how rows become documents.

    Templates name columns in braces. `extract` matches a regular expression against a column;
    its named groups become columns.
    """

    source: str = "world:castle"  # world:NAME, a path or glob, hub:NAME[:CONFIG], or disk:FOLDER
    format: Literal["auto", "jsonl", "parquet", "text"] = "auto"
    chunks: bool = False  # rows hold `text` and `chunks` of `suffix` and `latent`, as published thoughts do
    split: str = "train"  # of a Hugging Face dataset
    id: str | None = None  # column; default: a hash of the text
    text: str = "{text}"  # template
    extract: dict[str, Pattern] = {}
    pieces: list[str] | None = None  # templates of the document's own chunks, instead of `text`
    thought: str | None = None  # template of the thought before the last piece (oracle); none where a column is null
    limit: Positive | None = None  # read at most so many documents
    held_out: Share = 0.02  # share of the documents, by hash
    held_out_source: str | None = None  # instead of a share: other documents, as `source` and its templates say
    held_out_split: str = "test"  # where that is a Hugging Face dataset
    warm_start: Share = 0.1  # share of the training documents with thoughts for the warm start, by hash
    malformed: Literal["error", "skip"] = "error"
    shard_documents: Positive = 500
    world: World = World()

    @model_validator(mode="after")
    def _fits_together(self) -> Data:
        if self.chunks and (self.pieces or self.thought or self.extract):
            raise ValueError("chunks bring pieces and thoughts of their own: take pieces, thought and extract away")
        if self.thought is not None and not self.pieces:
            raise ValueError("thought stands before the last of data.pieces: set them too")
        for name, template in self._templates.items():
            if not FIELD.search(template):
                raise ValueError(f"{name} names no column, so that all documents would be the same: write {{COLUMN}}")
        if self.held_out_source and any(s.startswith("world:") for s in (self.source, self.held_out_source)):
            raise ValueError("held_out_source: a world holds out problems of its own")
        return self

    @property
    def _templates(self) -> dict[str, str]:
        """Those that rows are filled into, by the setting that they stand in."""
        if self.chunks:
            return {}
        body = {"text": self.text} if not self.pieces else {"pieces": "".join(self.pieces)}
        return body | ({"thought": self.thought} if self.thought else {})

    @property
    def columns(self) -> set[str]:
        """Those of a source that rows are made of."""
        if self.chunks:
            needed = {"text", "chunks"}
        else:
            made = {group for pattern in self.extract.values() for group in re.compile(pattern).groupindex}
            filled = {column for template in self._templates.values() for column in FIELD.findall(template)}
            needed = (filled - made) | self.extract.keys()
        return needed | ({self.id} if self.id else set())

    @property
    def parts(self) -> tuple[Data, ...]:
        """One source each: `held_out_source`, where there is one, all of which is held out, and `source`."""
        if not self.held_out_source:
            return (self,)
        apart = {"source": self.held_out_source, "split": self.held_out_split, "held_out": 1.0, "limit": None}
        source = {"held_out": 0.0}
        return tuple(self.model_copy(update={"held_out_source": None, **part}) for part in (apart, source))


class Chunking(Section):
    """Cutting documents into chunks of whole sentences (method, section 2)."""

    mode: Literal["poisson", "fixed", "pieces", "document"] = "poisson"
    mean: Annotated[float, Field(ge=1)] = 8  # sentences a chunk, in poisson mode 1 + Poisson(mean - 1)
    max: Positive = 20  # sentences
    seed: int = 0
    max_tokens: Positive = 512  # a longer chunk is split, or refused
    oversize: Literal["split", "refuse"] = "split"
    thoughts: Literal["all", "last", "given"] = "all"  # which chunks get a thought; given: where the data has its own
