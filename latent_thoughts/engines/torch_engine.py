"""The in-process engine: any Hugging Face causal LM whose attention can be replaced, CPU or CUDA.

A context is encoded once for all that stands behind it, a prompt once for all its draws. Draws of
many jobs grow together; one that ends makes room for the next. Nothing is padded but attention.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from latent_thoughts.config import Engine
from latent_thoughts.engines.base import Job
from latent_thoughts.engines.limits import Limits
from latent_thoughts.engines.passes import Passes
from latent_thoughts.engines.schedule import Schedule
from latent_thoughts.engines.work import Work
from latent_thoughts.machine import give_freed_memory_back, out_of_memory
from latent_thoughts.types import UserError

TIDY = 10.0  # seconds
LEAST = 64  # tokens of a pass below which less in hand saves next to nothing


class TorchEngine:
    """Runs jobs within the limits of `settings`; where memory does not suffice it halves them and goes on."""

    one_numerics = True

    def __init__(self, model: Any, settings: Engine | None = None):
        self.passes = Passes(model)
        settings = settings or Engine()
        self.limits = Limits.of(settings, self.passes)
        self.passes.replays &= settings.graphs
        self.tidied = time.monotonic()

    @torch.inference_mode()
    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        todo = [Work(n, job, next(job.program)) for n, job in enumerate(jobs)]
        first = {}  # jobs with one stem run together
        for work in todo:
            first.setdefault(work.job.stem, work.index)
        todo.sort(key=lambda w: (first[w.job.stem], w.size(), w.index))
        while todo:
            try:
                for work in Schedule(self.passes, self.limits, todo).run():
                    yield work.index, work.result
                    self._tidy()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._halve(error)
            todo = [w for w in todo if not w.told]

    def _tidy(self) -> None:
        """Keys and values of all lengths come and go: without this the heap has more and more holes (docs/log.md)."""
        if self.passes.device.type == "cpu" and time.monotonic() - self.tidied > TIDY:
            give_freed_memory_back()
            self.tidied = time.monotonic()

    def _halve(self, error: Exception) -> None:
        if self.limits.sequences == 1 and self.limits.pass_tokens <= LEAST:
            first = " ".join(str(error).splitlines()[:1])
            raise UserError(f"not enough memory for a single sequence: {first}") from None
        self.limits = self.limits.halved()
        if self.passes.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"latent-thoughts: out of memory; going on with {self.limits}", file=sys.stderr)
