"""Texts for the page: an index that is read at once, and blocks of documents that are read when they are looked at.

Both are JSON, compressed (gzip) and in base64, so that 10,000 chunks with all their draws stay a few megabytes, and
the page shows itself before it has read any of them.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from latent_thoughts.stages.report.texts import Json, Loop, Seed, clip

TEXTS = 10_000  # chunks with thoughts, over all seeds
BYTES = 24_000_000  # of all blocks; the page is one file
BLOCK = 64  # chunks with thoughts in one block, at least
TITLE, SNIPPET = 220, 160  # characters of a text and of its thought in the index


@dataclass(slots=True)
class Packed:
    """`overview` is what the page reads first; `blocks` are base64 of gzip of JSON, named by their number in it."""

    overview: Json
    blocks: list[str] = field(default_factory=list)

    @property
    def any(self) -> bool:
        return any(seed["loops"] or seed["answers"] is not None for seed in self.overview["seeds"])

    def add(self, value: Any) -> int:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        # without a time, so that the same run gives the same page
        self.blocks.append(base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode())
        return len(self.blocks) - 1


def pack(seeds: Sequence[Seed], texts: int = TEXTS) -> Packed:
    """As many texts as there is room for, every seed and EM run with an equal share."""
    found = Packed({"seeds": []})
    shares = max(1, sum(len(seed.loops) for seed in seeds))
    for seed in seeds:
        loops = [_pack_loop(loop, found, texts // shares, BYTES // shares) for loop in seed.loops]
        answers = found.add(seed.answers) if seed.answers["texts"] else None
        found.overview["seeds"].append({"name": seed.name, "loops": loops, "answers": answers})
    return found


def _pack_loop(loop: Loop, packed: Packed, texts: int, room: int) -> Json:
    """Every shard gives its part, since continual EM thinks about another shard in every iteration."""
    shards = loop.shards()
    index, waiting = Index(list(loop.steps)), list[Json]()
    begin = len(packed.blocks)

    def store() -> None:
        index.add(waiting, packed.add(waiting))
        waiting.clear()

    for n, shard in enumerate(shards, 1):
        for document in _first(loop.documents(shard), texts * n // len(shards) - index.texts):
            waiting.append(document)
            if _targets(waiting) >= BLOCK:
                store()
            if sum(map(len, packed.blocks[begin:])) > room * n / len(shards):
                break
        if waiting:
            store()
    told = {"name": loop.name, "iterations": list(loop.steps), "totals": loop.totals()}
    return {**told, "index": packed.add(index.columns())}


def _targets(documents: Sequence[Json]) -> int:
    return sum(bool(chunk["steps"]) for document in documents for chunk in document["chunks"])


def _first(documents: Iterator[Json], texts: int) -> Iterator[Json]:
    """Whole documents, until that many of their chunks have thoughts."""
    for document in documents:
        if texts <= 0:
            return
        texts -= _targets([document])
        yield document


@dataclass(slots=True)
class Index:
    """What the list, its filters and the search need of every text, in columns."""

    iterations: list[int]
    texts: int = 0
    _documents: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    _texts: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    _steps: dict[int, dict[str, list[Any]]] = field(default_factory=dict)

    def add(self, documents: Sequence[Json], block: int) -> None:
        for place, document in enumerate(documents):
            number = len(self._documents["id"])
            for name, value in (("id", document["id"]), ("known", document["known"]), ("block", block)):
                self._documents[name].append(value)
            self._documents["place"].append(place)
            before = ""
            for at, chunk in enumerate(document["chunks"]):
                if chunk["steps"]:
                    self._add_text(number, at, before, chunk)
                before = (before + chunk["text"])[-TITLE:]

    def _add_text(self, document: int, at: int, before: str, chunk: Json) -> None:
        self.texts += 1
        row = {"document": document, "at": at, "before": before, "text": clip(chunk["text"], TITLE)}
        for name, value in row.items():
            self._texts[name].append(value)
        for iteration in self.iterations:
            columns = self._steps.setdefault(iteration, defaultdict(list))
            for name, value in _summary(chunk, chunk["steps"].get(str(iteration))).items():
                columns[name].append(value)

    def columns(self) -> Json:
        return {"documents": dict(self._documents), "texts": dict(self._texts), "steps": self._steps}


def _summary(chunk: Json, step: Json | None) -> Json:
    """Of the chosen thought; of the one with most weight where none was accepted. All null without a posterior."""
    if step is None:
        return dict.fromkeys(("thought", "accepted", "same", "gain", "ess", "length"))
    draw = next((d for d in step["draws"] if d["chosen"]), step["draws"][0])
    return {
        "thought": clip(draw["text"], SNIPPET),
        "accepted": draw["chosen"],
        "same": draw["same"],
        "gain": None if draw["gain"] is None else round(draw["gain"] / max(1, chunk["tokens"]), 3),
        "ess": step["ess"],
        "length": draw["length"],
    }
