"""EM: chains the stages in one run folder. Running it again resumes.

RUN/recipe.yaml
RUN/base  RUN/prepare                          initial checkpoint, documents
RUN/iter_00/{synthesize,train,evaluate}        warm start
RUN/iter_01/{sample,train,evaluate} ...        EM
RUN/baselines/METHOD/{train,evaluate}          and iter_.. for em_paper
RUN/samples/PRESET_K/iter_..                   further E-steps, where the recipe asks for them
RUN/results.json  RUN/report.html
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_thoughts.config import PRESETS, Recipe, Sample, Train
from latent_thoughts.data.corpus import Source
from latent_thoughts.runlog import provenance, save_recipe
from latent_thoughts.stages import evaluate as evaluating
from latent_thoughts.stages import prepare as preparing
from latent_thoughts.stages import sample as sampling
from latent_thoughts.stages import synthesize as synthesizing
from latent_thoughts.stages import train as training
from latent_thoughts.store import read_manifest, write_json
from latent_thoughts.types import Manifest

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A recipe and its folder: knows where every stage's input and output lie."""

    recipe: Recipe
    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def prepared(self) -> Path:
        return self.folder / "prepare"

    @property
    def warm_start(self) -> Path:
        return self.folder / "iter_00"

    def prepare(self) -> Manifest:
        base = preparing.initialise(self.recipe, self.base)
        return preparing.prepare(self.recipe, self.base, base, self.prepared)

    def synthesize(self) -> Manifest:
        folder = self.warm_start / "synthesize"
        return synthesizing.synthesize_oracle(self.prepared, self.base, ("warm_start",), folder)

    def train_warm_start(self, folder: Path | None = None, steps: int | None = None) -> Manifest:
        config = self.recipe.warm_start_train
        config = config if steps is None else config.with_budget("steps", steps)
        return self._train(config, [Source(self.warm_start / "synthesize", "warm_start")], folder or self.warm_start)

    def _train(self, config: Train, sources: list[Source], folder: Path, continue_from: Path | None = None) -> Manifest:
        recipe, held_out = self.recipe, Source(self.prepared, "held_out")
        where = (self.base, sources, folder / "train", recipe.seed, continue_from, held_out)
        return training.train(config, recipe.model, *where)

    def evaluate(self, folder: Path, thinks: bool = True) -> Manifest:
        return evaluating.evaluate(self.recipe, folder / "train", self.prepared, folder / "evaluate", thinks)


@dataclass(frozen=True)
class Loop:
    """One EM run: an E-step's settings, and the folder of its iterations (warm start shared)."""

    run: Run
    method: str
    config: Sample
    folder: Path

    def iteration(self, number: int) -> Path:
        return self.run.warm_start if number == 0 else self.folder / f"iter_{number:02}"

    @property
    def continual(self) -> bool:
        return self.run.recipe.em.regime == "continual"

    def sample(self, number: int) -> Manifest:
        """E-step of iteration `number`, with the model of the one before."""
        recipe = self.run.recipe
        slices = (number - 1, recipe.em.iterations) if self.continual else (0, 1)
        model, folder = self.iteration(number - 1) / "train", self.iteration(number) / "sample"
        return sampling.sample(recipe, self.config, model, self.run.prepared, folder, number, slices)

    def train(self, number: int) -> Manifest:
        """M-step of iteration `number`: from the initial checkpoint, or on from the last model."""
        folder = self.iteration(number)
        mix, run = self.run.recipe.em.mix, self.run
        sources = [
            Source(run.warm_start / "synthesize", "warm_start", mix.warm_start),
            Source(folder / "sample", "corpus", mix.thoughts),
            Source(run.prepared, "corpus", mix.raw),
        ]
        sources = [source for source in sources if source.weight]
        config, previous = self.run.recipe.train, None
        if self.continual:
            config = config.model_copy(update={"schedule": "wsd"})
            previous = self.iteration(number - 1) / "train" if number > 1 else None
        return run._train(config, sources, folder, previous)

    def rows(self) -> Iterator[Row]:
        """Runs all iterations; yields a results row after each."""
        for number in range(1, self.run.recipe.em.iterations + 1):
            sampled, trained = self.sample(number), self.train(number)
            evaluated = self.run.evaluate(self.iteration(number))
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
        "nll_per_token": e["nll_per_token"],
        "nll_raw_per_token": e["nll_raw_per_token"],
        "bits_per_byte": {name: e[f"{name}_bits_per_byte"] for name in _likelihoods(run)},
        "train_tokens": trained.counts["tokens"],
        "train_steps": trained.counts["step"],
        "thought_correct_sampled": s.get("thought_correct_sampled"),
        "thought_correct_chosen": s.get("thought_correct_chosen"),
        "ess": s.get("mean_ess"),
        "distinct": s.get("mean_distinct"),
        "unfinished": s.get("unfinished_share"),
        "accepted": s.get("accepted_share"),
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


def em(recipe: Recipe, folder: Path) -> list[Row]:
    """The whole run: warm start, iterations, baselines, results.json. Resumes where it was stopped."""
    save_recipe(recipe, folder)
    run = Run(recipe, folder)
    run.prepare()
    run.synthesize()
    rows = [row(run, "warm_start", 0, 0, run.train_warm_start(), run.evaluate(run.warm_start))]
    loop = Loop(run, "em", recipe.sample, folder)
    rows += loop.rows()
    for name in recipe.em.baselines:
        rows += BASELINES[name](run, loop)
    rows += _more_samples(run)
    rows.sort(key=lambda r: (METHODS.index(r["method"]), r["samples"], r["iteration"]))
    write_json(folder / "results.json", {"run": {**provenance(recipe), "seeds": [recipe.seed]}, "rows": rows})
    return rows


def _more_samples(run: Run) -> Iterator[Row]:
    """EM with every K of `em.samples`, in both presets; what the run has done already is not done again."""
    done = [run.recipe.sample, *([_preset(run, "paper")] if "em_paper" in run.recipe.em.baselines else [])]
    for k in run.recipe.em.samples:
        for method, preset in (("em", "default"), ("em_paper", "paper")):
            config = _preset(run, preset).model_copy(update={"k": k})
            if config in done:
                continue
            yield from Loop(run, method, config, run.folder / "samples" / f"{preset}_{k}").rows()


def _preset(run: Run, name: str) -> Sample:
    """The recipe's E-step with another preset's values; what no preset sets is kept."""
    values = Sample.model_validate({"preset": name}).model_dump(include={"preset", *PRESETS[name]})
    return run.recipe.sample.model_copy(update=values)


def _trained_tokens(run: Run, loop: Loop, unit: str) -> int:
    """Tokens, raw tokens or steps of the whole EM run, warm start included."""
    folders = [loop.iteration(n) / "train" for n in range(run.recipe.em.iterations + 1)]
    return sum(read_manifest(folder).counts[unit] for folder in folders)


def _raw(run: Run, loop: Loop, method: str, unit: str) -> Iterator[Row]:
    """The same documents without thoughts, for as many raw tokens, or tokens in all, as the whole EM run."""
    folder = run.folder / "baselines" / method
    config = run.recipe.raw_train.with_budget(unit, _trained_tokens(run, loop, unit))
    trained = run._train(config, [Source(run.prepared, split) for split in ("warm_start", "corpus")], folder)
    yield row(run, method, 0, 0, trained, run.evaluate(folder, thinks=False))


def _raw_tokens(run: Run, loop: Loop) -> Iterator[Row]:
    return _raw(run, loop, "raw_tokens", "raw_tokens")


def _raw_flops(run: Run, loop: Loop) -> Iterator[Row]:
    return _raw(run, loop, "raw_flops", "tokens")


def _warm_start_matched(run: Run, loop: Loop) -> Iterator[Row]:
    folder = run.folder / "baselines" / "warm_start_matched"
    trained = run.train_warm_start(folder, _trained_tokens(run, loop, "step"))
    yield row(run, "warm_start_matched", 0, 0, trained, run.evaluate(folder))


def _em_paper(run: Run, loop: Loop) -> Iterator[Row]:
    yield from Loop(run, "em_paper", _preset(run, "paper"), run.folder / "baselines" / "em_paper").rows()


def _oracle(run: Run, loop: Loop) -> Iterator[Row]:
    """The upper bound: the data's own thoughts for every document."""
    folder, splits = run.folder / "baselines" / "oracle", ("warm_start", "corpus")
    synthesizing.synthesize_oracle(run.prepared, run.base, splits, folder / "synthesize")
    sources = [Source(folder / "synthesize", split) for split in splits]
    trained = run._train(run.recipe.train, sources, folder)
    yield row(run, "oracle", 0, 0, trained, run.evaluate(folder))


BASELINES = {
    "raw_tokens": _raw_tokens,
    "raw_flops": _raw_flops,
    "warm_start_matched": _warm_start_matched,
    "em_paper": _em_paper,
    "oracle": _oracle,
}
METHODS = ("raw_tokens", "raw_flops", "warm_start", "warm_start_matched", "em_paper", "em", "oracle")
