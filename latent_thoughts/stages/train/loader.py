"""Batches on their way to the model, laid out ahead in worker processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from latent_thoughts.data.packing import Batches, by_length
from latent_thoughts.machine import without_main
from latent_thoughts.parallel import Ranks
from latent_thoughts.types import PackedRow


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of a batch, in micro-batches, in which documents of one length stand side by side.

    `documents` are the numbers of its documents. `state` and `passed` (epochs) are the stream's after the
    batch: what a checkpoint holds is the place of the last batch that was trained on, however many are ahead.
    """

    micros: list[PackedRow]
    documents: list[int]
    state: dict[str, Any]
    passed: float


class Stream(IterableDataset):  # pyright: ignore[reportMissingTypeArgument]
    """All batches from `batches`' place on; the n-th comes from worker n modulo their number."""

    def __init__(self, batches: Batches, ranks: Ranks):
        self.batches, self.ranks = batches, ranks

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        batches, turn = self.batches, 0
        while True:
            rows = batches.plan()[self.ranks.rank :: self.ranks.size]
            if turn == number:
                size = batches.config.micro_rows or len(rows)
                micros = [by_length(batches.lay_out(rows[n : n + size])) for n in range(0, len(rows), size)]
                documents = [piece.document for row in rows for piece in row]
                yield Batch(micros, documents, batches.state(), batches.passed)
            turn = (turn + 1) % workers


def load(batches: Batches, ranks: Ranks) -> Iterator[Batch]:
    """Batches in order, whatever the number of workers.

    SIGTERM to all processes of a job stops the one that trains, which then needs its workers to end in order: they
    begin with it blocked, and of their own, since a fork of a process that has run torch's threads may hang.
    """
    workers = batches.config.workers
    if not workers:
        return iter(Stream(batches, ranks))
    stream = DataLoader(Stream(batches, ranks), None, num_workers=workers, multiprocessing_context="spawn")
    resource_tracker.ensure_running()  # whose start unblocks it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        with without_main():
            return iter(stream)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
