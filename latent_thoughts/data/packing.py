"""Seeded, resumable batches of packed rows.

A row holds several documents, of at most `sequence_length` tokens together; `document_ids` keep them
apart, and there is no padding. The order of documents, the forms they take and the rows they land in
depend on the seed and the documents alone. A batch is planned from lengths, which is cheap, and laid
out in parts: by every rank its own rows, by every loader's worker its own batches.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from latent_thoughts.config import Train
from latent_thoughts.data import format
from latent_thoughts.data.corpus import Corpus
from latent_thoughts.data.tokenizer import Controls
from latent_thoughts.types import PackedRow


class Piece(NamedTuple):
    """At most a row's worth of one visit to a document: its `visit`-th, part `part` of `document`.

    `share` is what it is of an epoch, in which all visits count alike.
    """

    visit: int
    document: int
    part: int
    size: int
    share: float


Row = list[Piece]


@dataclass(slots=True)
class Batches:
    """Packs rows of at most `sequence_length` tokens, `rows` a batch, from `lookahead` pieces that wait.

    A row takes the piece that has waited longest and fits; for what would be its last piece, the largest that fits.
    Pieces of a document longer than a row do not wait side by side: they are `held` until there are more than `hold`,
    or the epoch ends, and drawn at random. After `ends` epochs no document follows: rows get short, and then empty.
    State between batches: the position in the stream, and the pieces that wait and are held.
    """

    documents: Corpus
    controls: Controls
    config: Train
    seed: int
    lookahead: int = 32
    hold: int = 64
    ends: float = math.inf
    epoch: int = 0
    cursor: int = 0
    waiting: list[Piece] = field(default_factory=list)
    held: list[Piece] = field(default_factory=list)
    _ordered: tuple[int, np.ndarray] | None = None

    def plan(self) -> list[Row]:
        """The pieces of the next batch, row by row."""
        return [self._fill() for _ in range(self.config.rows)]

    def _fill(self) -> Row:
        row: Row = []
        room = self.config.sequence_length
        while True:
            while len(self.waiting) < self.lookahead and (self.held or not self._over):
                self._draw()
            fits = [n for n, piece in enumerate(self.waiting) if piece.size <= room]
            if not fits:
                return row
            least = min(piece.size for piece in self.waiting)
            last = row and room - self.waiting[fits[0]].size < least
            piece = self.waiting.pop(max(fits, key=lambda n: self.waiting[n].size) if last else fits[0])
            row.append(piece)
            room -= piece.size

    def _draw(self) -> None:
        """Lets the next document wait, or a piece of those before it that were longer than a row."""
        ends = self._over or self.cursor == len(self._order())
        if self.held and (ends or len(self.held) > self.hold):
            rng = np.random.default_rng([self.seed, self.epoch, self.cursor, len(self.held)])
            self.waiting.append(self.held.pop(int(rng.integers(len(self.held)))))
            return
        pieces = self._next_visit()
        (self.held if len(pieces) > 1 else self.waiting).extend(pieces)

    @property
    def _begun(self) -> float:
        return self.epoch + self.cursor / max(1, len(self._order()))

    @property
    def _over(self) -> bool:
        return self._begun >= self.ends

    @property
    def passed(self) -> float:
        """Epochs, without what waits; to nine digits, so that a whole number of epochs is one."""
        left = math.fsum(piece.share for piece in itertools.chain(self.waiting, self.held))
        return max(0.0, round(self._begun - left, 9))

    def _next_visit(self) -> list[Piece]:
        while self.cursor == len(self._order()):
            self.epoch, self.cursor = self.epoch + 1, 0
        self.cursor += 1
        return self._pieces(*self._order()[self.cursor - 1].tolist())

    def _pieces(self, visit: int, index: int) -> list[Piece]:
        """All of a visit to a document."""
        lengths = self.documents.lengths(index)
        taken = [sizes[visit % len(sizes)] if sizes else None for sizes in lengths.thoughts]
        total = format.extent(lengths.text, taken, self._forms(visit, index, len(taken)))
        size = self.config.sequence_length
        starts = range(0, total, size)
        share = 1 / len(starts) / max(1, len(self._order()))
        return [Piece(visit, index, n, min(size, total - start), share) for n, start in enumerate(starts)]

    def _order(self) -> np.ndarray:
        """The visits (visit, document) of this epoch, shuffled.

        A document of weight w is visited about w times: up to epoch e, floor(e w + u) times, with a
        share u of its own, so that of documents of one source with weight 1/2 every epoch takes half.
        """
        if self._ordered is None or self._ordered[0] != self.epoch:
            weights = self.documents.weights
            shares = np.random.default_rng([self.seed, 0]).random(len(weights))
            first, last = (np.floor(e * weights + shares).astype(int) for e in (self.epoch, self.epoch + 1))
            index = np.repeat(np.arange(len(weights)), last - first)
            number = np.arange(len(index)) - np.repeat(np.cumsum(last - first) - (last - first), last - first)
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(index))
            self._ordered = self.epoch, np.stack([first[index] + number, index], 1)[order]
        return self._ordered[1]

    def _forms(self, visit: int, index: int, chunks: int) -> tuple[format.Form, ...]:
        config = self.config
        drawn = config.layout, config.posterior_share, config.raw_share, config.raw_chunks
        return _forms(self.seed, visit, index, chunks, *drawn)

    def lay_out(self, rows: Sequence[Row]) -> PackedRow:
        """The documents of all rows one behind the other."""
        pieces = [piece for row in rows for piece in row]
        if not pieces:
            return PackedRow(*np.zeros((4, 0), np.int64))
        ids, parts = (np.array([*itertools.chain(*x)]) for x in zip(*map(self._piece, pieces), strict=True))
        sizes = [piece.size for piece in pieces]
        # the first token's predecessor is in another document, or in another row
        starts = [0, *itertools.accumulate(sizes[:-1])]
        labels = format.labels(ids, parts, starts, self.config.loss_on)
        return PackedRow(ids, labels, np.repeat(np.arange(len(pieces)), sizes), parts)

    def _piece(self, piece: Piece) -> tuple[list[int], list[format.Part]]:
        document = self.documents[piece.document]
        forms = self._forms(piece.visit, piece.document, len(document.chunks))
        layout = format.lay_out(document, forms, self.controls, piece.visit)
        start = piece.part * self.config.sequence_length
        part = slice(start, start + piece.size)
        assert len(layout.ids[part]) == piece.size
        return layout.ids[part], layout.parts[part]

    def state(self) -> dict[str, Any]:
        waiting, held = ([list(piece) for piece in pieces] for pieces in (self.waiting, self.held))
        return {"epoch": self.epoch, "cursor": self.cursor, "waiting": waiting, "held": held}

    def load_state(self, state: dict[str, Any]) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        # checkpoints of earlier versions know neither the shares nor what is held
        self.waiting = [
            Piece(*values) if len(values) == len(Piece._fields) else self._pieces(*values[:2])[values[2]]
            for values in state["waiting"]
        ]
        self.held = [Piece(*values) for values in state.get("held", [])]


@functools.lru_cache(2**12)  # asked for twice: for a piece's size, and some batches later for its tokens
def _forms(seed: int, visit: int, index: int, chunks: int, layout: str, *shares: float) -> tuple[format.Form, ...]:
    rng = np.random.default_rng([seed, visit, index + 1])
    return tuple(format.draw_forms(chunks, layout, *shares, rng))  # pyright: ignore[reportCallIssue]


def by_length(row: PackedRow) -> PackedRow:
    """The same documents in order of their lengths: those of one length attend as one batch (attention)."""
    sizes = np.bincount(row.document_ids)
    order = np.argsort(sizes[row.document_ids], kind="stable")
    numbers = np.repeat(np.arange(len(sizes)), np.sort(sizes))
    return PackedRow(row.ids[order], row.labels[order], numbers, row.parts[order])


def positions(row: PackedRow) -> np.ndarray:
    """Positions that restart at every document."""
    index = np.arange(len(row.ids))
    starts = np.flatnonzero(np.diff(row.document_ids, prepend=-1))
    return index - starts[np.searchsorted(starts, index, side="right") - 1]
