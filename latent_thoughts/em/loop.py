"""E-step, M-step, evaluation, and again; and the row of results.json that each iteration gives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_thoughts import transfer
from latent_thoughts.config import OWN_RAW_MODEL, PRESETS, Sample
from latent_thoughts.data import pieces
from latent_thoughts.data.corpus import Source
from latent_thoughts.data.pieces import Ahead
from latent_thoughts.em.run import Run
from latent_thoughts.places import bench
from latent_thoughts.stages import sample as sampling
from latent_thoughts.store import read_manifest
from latent_thoughts.types import Manifest, UserError

Row = dict[str, Any]


class NoThoughts(UserError):
    """An E-step that gave its M-step nothing to train on."""


@dataclass(frozen=True)
class Loop:
    """One EM run: an E-step's settings, and the folder of its iterations (warm start shared)."""

    run: Run
    method: str
    config: Sample
    folder: Path

    def iteration(self, number: int) -> Path:
        """Raises UserError for one before the warm start."""
        if number < 0:
            raise UserError(f"there is no iteration {number}: 0 is the warm start")
        return self.run.warm_start if number == 0 else self.folder / f"iter_{number:02}"

    def e_step(self, number: int) -> Path:
        """Raises UserError for an E-step that the recipe does not have."""
        if number == 0:
            raise UserError("iteration 0 is the warm start, which has no E-step: give 1 or more")
        self._check(number)
        return self.iteration(number) / "sample"

    def m_step(self, number: int) -> Path:
        """Raises UserError for an M-step that the recipe does not have."""
        self._check(number)
        return self.iteration(number) / "train"

    def _check(self, number: int) -> None:
        if number > (last := self.run.recipe.em.iterations):
            raise UserError(
                f"iteration {number} is beyond em.iterations, which is {last}: K, temperature and slices are laid out "
                f"over them, so set em.iterations={number} or more"
            )

    @property
    def continual(self) -> bool:
        return self.run.recipe.em.regime == "continual"

    def ahead(self, number: int) -> Path:
        """Where the M-step's corpus is packed while the E-step runs."""
        return self.iteration(number) / ".packed"

    def _slice(self, number: int) -> tuple[int, int]:
        """Which shards of the corpus an iteration has: every of-th from the n-th, as (n, of)."""
        return (number - 1, self.run.recipe.em.iterations) if self.continual else (0, 1)

    def sample(self, number: int) -> Manifest:
        """E-step of iteration `number`, with the model of the one before."""
        recipe, slices = self.run.recipe, self._slice(number)
        folder, model = self.e_step(number), self.iteration(number - 1) / "train"
        with Ahead(self.ahead(number)) as ahead:
            made = sampling.sample(recipe, self._settings(), model, self.run.prepared, folder, number, slices, ahead)
        mix, draws = recipe.em.mix, int(made.counts.get("draws", 0))
        # the M-step would be the warm start once more
        if mix.thoughts and draws and made.counts["unfinished"] == draws:
            raise NoThoughts(
                f"{folder}: none of {draws:,} thoughts came to an end: raise sample.max_thought_tokens, or teach the "
                "warm start more (data.warm_start, em.warm_start)"
            )
        if made.counts.get("left_out_share") == 1 and not (mix.warm_start or mix.raw):
            raise NoThoughts(f"{folder}: none of {draws:,} thoughts was accepted, and em.mix has nothing beside them")
        if mix.thoughts and made.counts.get("left_out_share") == 1:
            print(
                f"latent-thoughts: {folder}: none of {draws:,} thoughts was accepted: no new one is trained on",
                file=sys.stderr,
            )
        return made

    def _settings(self) -> Sample:
        """With the raw model that gains are measured against, which may have to be trained first."""
        if self.config.raw_model != OWN_RAW_MODEL:
            return self.config
        return self.config.model_copy(update={"raw_model": str(self.run.train_raw())})

    def train(self, number: int) -> Manifest:
        """M-step of iteration `number`: from the initial checkpoint, or on from the last model (continual regime)."""
        folder = self.m_step(number).parent
        mix, run = self.run.recipe.em.mix, self.run
        sources = [
            Source(run.warm_start / "synthesize", "warm_start", mix.warm_start),
            Source(folder / "sample", "corpus", mix.thoughts, bench(self.ahead(number))),
            Source(run.prepared, "corpus", mix.raw, slice=self._slice(number)),
        ]
        sources = [source for source in sources if source.weight]
        config, last = run.recipe.train, self.iteration(number - 1) / "train"
        if not self.continual:
            trained = run.train(config, sources, folder)
        else:  # the warm start's documents are met again: in other forms and another order
            config, seed = config.model_copy(update={"schedule": "wsd"}), run.recipe.seed + (number << 32)
            if number == 1:  # the warm start's schedule is its own and has ended: its weights alone go on
                trained = run.train(config, sources, folder, base=last, seed=seed)
            else:
                config = config.model_copy(update={"warmup_steps": 0})
                trained = run.train(config, sources, folder, continue_from=last, seed=seed)
        pieces.forget(self.ahead(number))
        return trained

    def evaluate(self, number: int) -> tuple[Row, Manifest]:
        """An iteration's row and what was evaluated; the iteration must have been trained. Raises UserError where the
        recipe's K is not the one it was sampled with: the row would claim it."""
        folder = self.iteration(number)
        sampled = read_manifest(folder / "sample") if number else None
        if sampled is not None and (chunks := sampled.counts["chunks"]):
            drawn, asked = sampled.counts["draws"] / chunks, self.config.k_at(number, self.run.recipe.em.iterations)
            if drawn != asked:
                raise UserError(f"{folder} was sampled with K = {drawn:g}, not {asked}: give the run's own settings")
        evaluated, trained = self.run.evaluate(folder), read_manifest(folder / "train")
        method, k = (self.method, self.config.k) if number else ("warm_start", 0)
        return row(self.run, method, number, k, trained, evaluated, sampled), evaluated

    def rows(self) -> Iterator[Row]:
        """Runs all iterations; yields a results row after each."""
        for number in range(1, self.run.recipe.em.iterations + 1):
            sampled, trained = self.sample(number), self.train(number)
            evaluated = self.run.evaluate(self.iteration(number))
            if number > 1:  # the warm start is where further E-steps begin
                transfer.forget(self.iteration(number - 1) / "train" / "model")  # this machine's copy of a store's
            yield row(self.run, self.method, number, self.config.k, trained, evaluated, sampled)


def row(
    run: Run,
    method: str,
    iteration: int,
    samples: int,
    trained: Manifest,
    evaluated: Manifest,
    sampled: Manifest | None = None,
) -> Row:
    """One row of results.json (docs/formats.md)."""
    e, s = evaluated.counts, sampled.counts if sampled else {}
    return {
        "method": method,
        "iteration": iteration,
        "samples": samples,
        "seed": run.recipe.seed,
        "accuracy": e["accuracy"],
        "accuracy_n": e["accuracy_n"],
        "accuracy_known": e["accuracy_known"],
        "accuracy_unknown": e["accuracy_unknown"],
        "bound_per_token": {str(k): e[f"bound_{k}_per_token"] for k in run.recipe.evaluate.bound},
        "bound_unfinished": {str(k): e[f"bound_{k}_unfinished"] for k in run.recipe.evaluate.bound},
        "nll_per_token": e["nll_per_token"],
        "nll_raw_per_token": e["nll_raw_per_token"],
        "bits_per_byte": {name: e[f"{name}_bits_per_byte"] for name in _likelihoods(run)},
        "tasks": e["tasks"],
        "documents": run.documents,
        "train_tokens": trained.counts["tokens"],
        "train_steps": trained.counts["step"],
        "thought_correct_sampled": s.get("thought_correct_sampled"),
        "thought_correct_chosen": s.get("thought_correct_chosen"),
        "ess": s.get("mean_ess"),
        "distinct": s.get("mean_distinct"),
        "unfinished": s.get("unfinished_share"),
        "accepted": s.get("accepted_share"),
        "left_out": s.get("left_out_share"),
        "gain_per_token": s.get("gain_per_token"),
        "sample_tokens": s.get("draw_tokens"),
        "seconds": {
            "sample": s.get("seconds", 0.0),
            "train": trained.counts["seconds"],
            "evaluate": e["seconds"],
        },
    }


def _likelihoods(run: Run) -> list[str]:
    return ["nll", "nll_raw", *(f"bound_{k}" for k in run.recipe.evaluate.bound)]


def with_preset(run: Run, name: str) -> Sample:
    """The recipe's E-step with another preset's values; what no preset sets is kept."""
    values = Sample.model_validate({"preset": name}).model_dump(include={"preset", *PRESETS[name]})
    return run.recipe.sample.model_copy(update=values)
