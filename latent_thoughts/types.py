"""The plain types that flow between stages. Standard library and numpy only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class UserError(ValueError):
    """A mistake the user can mend. The command line shows it as one line, without a traceback."""


class InUse(UserError):
    """A run folder that another process holds."""


class Interrupted(Exception):
    """Work was asked to stop (SIGTERM) and has kept what it has; the same command goes on from there."""


@dataclass(frozen=True, slots=True)
class Document:
    """One source text.

    `pieces` are the document's own chunk borders, where it has them (joined they equal `text`).
    `thoughts` maps a piece's index to a thought that came with the data. It is read only where
    a recipe says `oracle`, and by the metrics that tell right thoughts from wrong ones.
    """

    id: str
    text: str
    meta: dict[str, Any] = field(default_factory=dict)
    pieces: tuple[str, ...] | None = None
    thoughts: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document: `text` starts at character `start`, and `ids` are its token ids."""

    doc_id: str
    index: int
    start: int
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ThoughtDocument:
    """A document in chunks, with the thoughts kept for each chunk, of which every visit takes one.

    `thoughts[i]` are chunk i's thoughts, each as token ids without the end token; visit v of training
    takes number v modulo their count. An empty thought is a thought (`S P E x`); where there is none
    at all the text stands alone (`x`). `source` says who thought them. `target` marks the chunks that
    thoughts are meant for; the others are context.
    """

    id: str
    chunks: tuple[Chunk, ...]
    thoughts: tuple[tuple[tuple[int, ...], ...], ...]
    target: tuple[bool, ...]
    source: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Draw:
    """One sampled thought.

    `ids` exclude the end token. `logprobs` (nats, under the distribution really sampled, so at its
    temperature) cover `ids`, and the end token where `finish` is "end"; `model_logprobs` are the
    same untempered. Other finishes: "length" (no end token within the limit), "control" (another
    control token came up) and "halt" (who asked wanted no more).
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    model_logprobs: tuple[float, ...] = ()

    @property
    def finished(self) -> bool:
        return self.finish == "end"


@dataclass(frozen=True, slots=True)
class ScoredDraw:
    """A draw under every distribution the weights need; all in nats.

    `log_posterior` = log q(z | c, x) and `log_prior` = log p(z | c), both untempered and with the
    end token; `log_x` = log p(x | c, z); `log_q` = the density it was sampled from.
    """

    draw: Draw
    proposal: str
    log_posterior: float
    log_prior: float
    log_x: float
    log_q: float


@dataclass(frozen=True, slots=True, eq=False)
class Posterior:
    """What the E-step knows about one chunk.

    `log_weights` and `gains` have one entry a draw (K). `kept` are the indices of the accepted draws,
    whose thoughts differ, in the order they were chosen. `raw_logprob` = log p(x | c) without a
    thought. `gap` is the mean |log q by the sampler - log q by the scorer| over finished draws that
    were scored anew, each under its own proposal; None where none was.
    """

    chunk: Chunk
    context_ids: tuple[int, ...]
    draws: tuple[ScoredDraw, ...]
    log_weights: np.ndarray
    gains: np.ndarray
    kept: tuple[int, ...]
    raw_logprob: float
    gap: float | None

    @property
    def chosen(self) -> int:
        """Index of the first accepted draw, -1 where none was accepted."""
        return self.kept[0] if self.kept else -1


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Documents one behind the other, T tokens in all, without padding.

    `labels` is -100 where there is no loss, and otherwise the token itself (not shifted).
    `document_ids` numbers the documents from 0. `parts` holds a `format.Part` a token.
    """

    ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray
    parts: np.ndarray


@dataclass(frozen=True, slots=True)
class Manifest:
    """Proof that a stage is complete, and of what.

    `key` fingerprints everything the output depends on. `shards` maps a file name to its number
    of rows and SHA-256. `counts` are the stage's own totals. `files` maps other files of the stage
    (a model's, by their path in its folder) to their SHA-256. `base` is the key of the initial
    checkpoint whose tokens the stage's ids are, where the stage says so.
    """

    stage: str
    key: str
    shards: dict[str, dict[str, Any]]
    counts: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    base: str | None = None
