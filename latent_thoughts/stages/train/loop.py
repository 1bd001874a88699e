"""Steps until the budget is spent: schedule, figures, checkpoints, and what stops a run."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from latent_thoughts.config import Train
from latent_thoughts.data.corpus import Corpus
from latent_thoughts.machine import out_of_memory
from latent_thoughts.metrics import Metrics
from latent_thoughts.progress import track
from latent_thoughts.stages.train import checkpoint, loader
from latent_thoughts.stages.train.figures import Speed
from latent_thoughts.stages.train.trainer import Diverged, Trainer
from latent_thoughts.store import write_json
from latent_thoughts.types import Interrupted, UserError


def loop(
    trainer: Trainer, folder: Path, held_out: Corpus | None = None, stopped: Callable[[], bool] = lambda: False
) -> None:
    """Trains until the budget is spent, with metrics and checkpoints in `folder`, the last of them of the last step.

    Raises Interrupted where it is `stopped` before that, after a checkpoint, Diverged after saving the batch, and
    UserError where memory does not suffice.
    """
    config, counters, ranks = trainer.config, trainer.counters, trainer.ranks
    speed, batches = Speed(trainer.objective, ranks, trainer.autocast, counters), loader.load(trainer.batches, ranks)
    total = config.budget[1]
    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(contextlib.closing(Metrics(folder, counters.step, config.tracker, ranks.main)))
        advance = stack.enter_context(track("train", total, config.budget[0]))
        done = min(total, counters.progress(config.budget) * total)
        advance(done)
        while (progress := counters.progress(config.budget)) < 1:
            if ranks.any(stopped()):
                metrics.sync()
                trainer.keep(folder)
                raise Interrupted(f"training stopped at step {counters.step}")
            if config.schedule == "wsd" and progress >= 1 - config.decay_share:
                _save_stable(trainer, folder)
            rate = learning_rate(config, counters.step, progress)
            figures = _step(trainer, next(batches), rate, folder)
            speed.count(counters)
            now = min(total, counters.progress(config.budget) * total)
            advance(now - done, **{name: figures[name] for name in ("loss",) if figures}, **speed.shown())
            done = now
            if counters.step % config.log_steps == 0:
                metrics.write({**asdict(counters), "lr": config.lr * rate, **figures, **speed.figures()})
            if counters.step % config.checkpoint_steps == 0:
                _checkpoint(trainer, folder, held_out, metrics)
        if config.schedule == "wsd":  # a run of few steps may end before its rate has fallen
            _save_stable(trainer, folder)
        if counters.step != trainer.saved:
            _checkpoint(trainer, folder, held_out, metrics)
    if counters.step < config.warmup_steps and ranks.main:
        how = f"({counters.step} of {config.warmup_steps} steps): the learning rate never reached train.lr"
        print(f"latent-thoughts: the training ended within its warm-up {how}", file=sys.stderr)


def _step(trainer: Trainer, batch: loader.Batch, rate: float, folder: Path) -> dict[str, float]:
    """A step's figures, or what a user should know of one that failed."""
    try:
        return trainer.step(batch, rate)
    except Diverged as error:
        _save_batch(error, trainer, folder)
        raise
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        rows = trainer.config.micro_rows or trainer.config.rows // trainer.ranks.size
        raise UserError(
            f"not enough memory for a training step: lower train.micro_rows (now {rows}) or set "
            "train.checkpoint_activations=true"
        ) from error


def _checkpoint(trainer: Trainer, folder: Path, held_out: Corpus | None, metrics: Metrics) -> None:
    step, loss = trainer.counters.step, None
    if held_out is not None:
        with trainer.averaged():
            loss = trainer.held_out_loss(held_out)
        metrics.write({"step": step, "held_out_loss": loss})
    metrics.sync()
    trainer.keep(folder, loss)
    if trainer.ranks.main:
        checkpoint.prune(folder, trainer.config.keep)


def _save_stable(trainer: Trainer, folder: Path) -> None:
    """The weights from before a wsd run's decay, once: a training that resumes within its decay has them already."""
    if not trainer.decaying:
        trainer.decaying = True
        trainer.save(folder / "stable")


def _save_batch(error: Diverged, trainer: Trainer, folder: Path) -> None:
    """Leaves the batch and its documents' ids beside the checkpoints; the error names the file."""
    path = folder / f"diverged_step_{error.step}_rank_{trainer.ranks.rank}.json"
    documents = sorted({trainer.batches.documents.name(n) for n in error.batch.documents})
    arrays = ("ids", "labels", "document_ids")
    micros = [{name: getattr(micro, name).tolist() for name in arrays} for micro in error.batch.micros]
    write_json(path, {"step": error.step, "documents": documents, "micro_batches": micros})
    error.args = (f"{error}; the batch and the ids of its {len(documents)} documents are in {path}",)


@contextlib.contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM came (in the main thread, where signals can be handled)."""
    flag: list[int] = []
    try:
        previous = signal.signal(signal.SIGTERM, lambda *_: flag.append(1))
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: bool(flag)
    finally:
        signal.signal(signal.SIGTERM, previous)


def learning_rate(config: Train, step: int, progress: float) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine to 0, constant, or warm-up-stable-decay."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    if config.schedule == "wsd":
        return warm * min(1.0, max(0.0, 1 - progress) / config.decay_share) if config.decay_share else warm
    return warm
