"""Endless, seeded, resumable batches of packed rows.

A row holds several documents; `document_ids` keep them apart. The order of documents, the forms
they take and the rows they land in depend on the seed and the documents alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latent_thoughts.config import Train
from latent_thoughts.data import format
from latent_thoughts.data.tokenizer import Controls
from latent_thoughts.types import PackedRow, ThoughtDocument


@dataclass(slots=True)
class Piece:
    """At most a row's worth of one visit to a document: visit `epoch`, part `part` of document `index`."""

    epoch: int
    index: int
    part: int
    ids: np.ndarray
    labels: np.ndarray
    parts: np.ndarray


@dataclass(slots=True)
class Batches:
    """Best-fit packing into `rows` rows of `sequence_length` tokens, `lookahead` misfits put back.

    State between batches: the position in the stream, and the pieces put back, as
    (epoch, index, part) triples, from which `load_state` lays them out again.
    """

    documents: Sequence[ThoughtDocument]
    controls: Controls
    config: Train
    seed: int
    lookahead: int = 8
    epoch: int = 0
    cursor: int = 0
    waiting: list[Piece] = field(default_factory=list)
    _shuffled: tuple[int, np.ndarray] | None = None

    def __iter__(self) -> Iterator[list[PackedRow]]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> list[PackedRow]:
        capacity = self.config.sequence_length
        rows: list[list[Piece]] = [[] for _ in range(self.config.rows)]
        room = [capacity] * self.config.rows
        stream, self.waiting = self.waiting, []
        while len(self.waiting) <= self.lookahead:
            if not stream:
                stream = self._next_visit()
            piece = stream.pop(0)
            fits = [r for r in range(len(rows)) if room[r] >= len(piece.ids)]
            if fits:
                best = min(fits, key=room.__getitem__)
                rows[best].append(piece)
                room[best] -= len(piece.ids)
            else:
                self.waiting.append(piece)
        self.waiting.extend(stream)
        return [_join(row, capacity) for row in rows if row]

    def _next_visit(self) -> list[Piece]:
        if self.cursor == len(self.documents):
            self.epoch, self.cursor = self.epoch + 1, 0
        order = self._order(self.epoch)
        visit = self._lay_out(self.epoch, int(order[self.cursor]))
        self.cursor += 1
        return visit

    def _order(self, epoch: int) -> np.ndarray:
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
        return self._shuffled[1]

    def _lay_out(self, epoch: int, index: int) -> list[Piece]:
        config, document = self.config, self.documents[index]
        rng = np.random.default_rng([self.seed, epoch, index + 1])
        forms = format.draw_forms(document, config.layout, config.posterior_share, config.raw_share, rng)
        layout = format.lay_out(document, forms, self.controls, epoch)
        labels, ids = format.labels(layout, config.loss_on), np.array(layout.ids, np.int64)
        parts, size = np.array(layout.parts, np.int64), config.sequence_length
        starts = range(0, len(ids), size)
        cut = [(slice(start, start + size)) for start in starts]
        return [Piece(epoch, index, n, ids[s], labels[s], parts[s]) for n, s in enumerate(cut)]

    def state(self) -> dict[str, Any]:
        waiting = [[piece.epoch, piece.index, piece.part] for piece in self.waiting]
        return {"epoch": self.epoch, "cursor": self.cursor, "waiting": waiting}

    def load_state(self, state: dict[str, Any]) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self.waiting = [self._lay_out(epoch, index)[part] for epoch, index, part in state["waiting"]]


def _join(pieces: list[Piece], capacity: int) -> PackedRow:
    padding = capacity - sum(len(piece.ids) for piece in pieces)

    def join(arrays: list[np.ndarray], fill: int) -> np.ndarray:
        return np.concatenate([*arrays, np.full(padding, fill, np.int64)])

    labels = [piece.labels.copy() for piece in pieces]
    for array in labels:
        array[0] = format.IGNORE  # its predecessor is in another document, or in another row
    return PackedRow(
        ids=join([piece.ids for piece in pieces], 0),
        labels=join(labels, format.IGNORE),
        document_ids=join([np.full(len(p.ids), n, np.int64) for n, p in enumerate(pieces)], -1),
        parts=join([piece.parts for piece in pieces], int(format.Part.PADDING)),
    )


def unpadded(rows: Sequence[PackedRow]) -> PackedRow:
    """The documents of all rows one behind the other, as one row without padding."""
    used = [row.document_ids >= 0 for row in rows]
    offsets = np.cumsum([0, *(row.document_ids.max() + 1 for row in rows)])
    numbered = [row.document_ids + offset for row, offset in zip(rows, offsets, strict=False)]

    def join(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([array[part] for array, part in zip(arrays, used, strict=True)])

    ids, labels, parts = ([getattr(row, name) for row in rows] for name in ("ids", "labels", "parts"))
    return PackedRow(join(ids), join(labels), join(numbered), join(parts))


def positions(row: PackedRow) -> np.ndarray:
    """Positions that restart at every document (and at the padding)."""
    index = np.arange(len(row.ids))
    starts = np.flatnonzero(np.diff(row.document_ids, prepend=-2))
    return index - starts[np.searchsorted(starts, index, side="right") - 1]
