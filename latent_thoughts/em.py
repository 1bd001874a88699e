"""EM: chains the stages in one run folder. Running it again resumes.

RUN/recipe.yaml
RUN/base  RUN/prepare                          initial checkpoint, documents
RUN/replies.sqlite                             every reply of a teacher
RUN/iter_00/{synthesize,train,evaluate}        warm start
RUN/iter_01/{sample,train,evaluate} ...        EM
RUN/baselines/METHOD/{train,evaluate}          and iter_.. for em_paper, synthesize for paraphrases
RUN/samples/PRESET_K/iter_..                   further E-steps, where the recipe asks for them
RUN/variants/NAME/iter_..                      EM with other settings, likewise
RUN/results.json  RUN/report.html
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latent_thoughts import examine, executors
from latent_thoughts.config import PRESETS, Recipe, Sample, Synthesize, Train
from latent_thoughts.config.base import parse
from latent_thoughts.data.corpus import Source
from latent_thoughts.places import place, relative
from latent_thoughts.runlog import provenance, save_recipe
from latent_thoughts.stages import evaluate as evaluating
from latent_thoughts.stages import prepare as preparing
from latent_thoughts.stages import sample as sampling
from latent_thoughts.stages import synthesize as synthesizing
from latent_thoughts.stages import train as training
from latent_thoughts.stages.synthesize.asking import Approve
from latent_thoughts.store import read_manifest, write_json
from latent_thoughts.types import Manifest, UserError

Row = dict[str, Any]
TRAINING = ("warm_start", "corpus")  # the splits that models are trained on
PARAPHRASES = ("wrap_baseline", "wrap_cot")


@dataclass(frozen=True)
class Run:
    """A recipe and its folder: knows where every stage's input and output lie."""

    recipe: Recipe
    folder: Path
    approve: Approve | None = None  # is shown what a teacher will cost, and raises UserError where it is too much

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

    def synthesized(self, method: str) -> Path:
        """The folder of a method's documents: thoughts are the warm start's, paraphrases a baseline's."""
        return (self.baseline(method) if method in PARAPHRASES else self.warm_start) / "synthesize"

    @property
    def documents(self) -> int:
        """Of the training splits, with thoughts or without."""
        shards = read_manifest(self.prepared).shards
        return sum(told["rows"] for name, told in shards.items() if name.rpartition("-")[0] in TRAINING)

    def raw(self, *splits: str) -> list[Source]:
        """Documents as they were prepared."""
        return [Source(self.prepared, split) for split in splits]

    def baseline(self, name: str) -> Path:
        return self.folder / "baselines" / name

    def synthesize(self, method: str | None = None) -> Manifest:
        """Thoughts for the warm start's documents, or paraphrases of them; by default what the recipe says."""
        config = self.recipe.synthesize
        if method is not None and method != config.method:  # another method's prompts are its own
            config = parse(Synthesize, config.model_dump() | {"method": method, "prompts": []}, "synthesize")
        store = place(config.store) if config.store else self.folder / "replies.sqlite"
        where = (self.prepared, self.base, ("warm_start",), self.synthesized(config.method), store)
        return synthesizing.synthesize(self.recipe, config, *where, self.approve)

    def train_warm_start(self, folder: Path | None = None, steps: int | None = None) -> Manifest:
        config = self.recipe.warm_start_train
        config = config if steps is None else config.with_budget("steps", steps)
        return self._train(config, [Source(self.warm_start / "synthesize", "warm_start")], folder or self.warm_start)

    def _train(self, config: Train, sources: list[Source], folder: Path, continue_from: Path | None = None) -> Manifest:
        recipe, held_out = self.recipe, Source(self.prepared, "held_out")
        where = (self.base, sources, folder / "train", recipe.seed, continue_from, held_out)
        return executors.together(recipe, training.train, config, recipe.model, *where)

    def evaluate(self, folder: Path, thinks: bool = True) -> Manifest:
        """Held-out text and answers, and every task of the recipe; `counts` have the tasks' results too."""
        model, recipe = folder / "train", self.recipe
        found = evaluating.evaluate(recipe, model, self.prepared, folder / "evaluate", thinks)
        trained_on = self._trained_on(folder) if recipe.evaluate.tasks or recipe.evaluate.fine_tune else {}
        asked = examine.ask(recipe, model, folder, thinks, trained_on)
        if thinks or (recipe.evaluate.fine_tune and recipe.evaluate.fine_tune.form != "latent"):
            asked += examine.fine_tune(recipe, model, folder, trained_on)
        return replace(found, counts={**found.counts, "tasks": asked})

    def _trained_on(self, folder: Path) -> dict[str, Source]:
        """The text and the thoughts that a model may have seen (in the continual regime, of earlier iterations too)."""
        found = {split: Source(self.prepared, split) for split in TRAINING}
        folders = [self.warm_start, folder]
        if self.recipe.em.regime == "continual":
            folders += sorted(f for f in folder.parent.glob("iter_*") if f.name < folder.name)
        for path in (f / stage for f in folders for stage in ("synthesize", "sample")):
            if (path / "manifest.json").exists():
                there = {name.rpartition("-")[0] for name in read_manifest(path).shards}
                found |= {f"{relative(path, self.folder)} {s}": Source(path, s) for s in TRAINING if s in there}
        return found


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

    def evaluate(self, number: int) -> tuple[Row, Manifest]:
        """An iteration's row and what was evaluated; the iteration must have been trained."""
        folder = self.iteration(number)
        evaluated, trained = self.run.evaluate(folder), read_manifest(folder / "train")
        sampled = read_manifest(folder / "sample") if number else None
        method, k = (self.method, self.config.k) if number else ("warm_start", 0)
        return row(self.run, method, number, k, trained, evaluated, sampled), evaluated

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


def em(recipe: Recipe, folder: Path, approve: Approve | None = None) -> list[Row]:
    """The whole run: warm start, iterations, baselines, results.json. Resumes where it was stopped."""
    if recipe.synthesize.method in PARAPHRASES:
        raise UserError(
            f"EM starts from thoughts: set synthesize.method to oracle or latent_thoughts, and put "
            f"{recipe.synthesize.method} among em.baselines"
        )
    save_recipe(recipe, folder)
    run = Run(recipe, folder, approve)
    run.prepare()
    run.synthesize()
    rows = [row(run, "warm_start", 0, 0, run.train_warm_start(), run.evaluate(run.warm_start))]
    loop = Loop(run, "em", recipe.sample, folder)
    rows += loop.rows()
    for name in recipe.em.baselines:
        rows += BASELINES[name](run, loop)
    rows += _more_samples(run)
    rows += _variants(run)
    rows.sort(key=lambda r: (METHODS.index(r["method"]), r.get("variant", ""), r["samples"], r["iteration"]))
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


def _variants(run: Run) -> Iterator[Row]:
    """EM with other settings, from the same warm start; their rows have the `variant`."""
    for name in run.recipe.em.variants:
        changed = replace(run, recipe=run.recipe.variant(name))
        for found in Loop(changed, "em", changed.recipe.sample, run.folder / "variants" / name).rows():
            yield {**found, "variant": name}


def _preset(run: Run, name: str) -> Sample:
    """The recipe's E-step with another preset's values; what no preset sets is kept."""
    values = Sample.model_validate({"preset": name}).model_dump(include={"preset", *PRESETS[name]})
    return run.recipe.sample.model_copy(update=values)


def _trained_tokens(run: Run, loop: Loop, unit: str) -> int:
    """Tokens, raw tokens or steps of the whole EM run, warm start included."""
    folders = [loop.iteration(n) / "train" for n in range(run.recipe.em.iterations + 1)]
    return sum(read_manifest(folder).counts[unit] for folder in folders)


def _text_alone(
    run: Run, method: str, sources: list[Source], unit: str | None = None, amount: int = 0
) -> Iterator[Row]:
    """A model of text without thoughts, trained on `amount` raw tokens, or tokens in all; else as `em.raw` says."""
    config = run.recipe.raw_train
    trained = run._train(config.with_budget(unit, amount) if unit else config, sources, run.baseline(method))
    yield row(run, method, 0, 0, trained, run.evaluate(run.baseline(method), thinks=False))


def _raw(run: Run, loop: Loop) -> Iterator[Row]:
    return _text_alone(run, "raw", run.raw(*TRAINING))


def _raw_tokens(run: Run, loop: Loop) -> Iterator[Row]:
    amount = _trained_tokens(run, loop, "raw_tokens")
    return _text_alone(run, "raw_tokens", run.raw(*TRAINING), "raw_tokens", amount)


def _raw_flops(run: Run, loop: Loop) -> Iterator[Row]:
    return _text_alone(run, "raw_flops", run.raw(*TRAINING), "tokens", _trained_tokens(run, loop, "tokens"))


def _like_warm_start(run: Run, method: str, sources: list[Source]) -> Iterator[Row]:
    """For as many tokens as the warm start."""
    return _text_alone(run, method, sources, "tokens", read_manifest(run.warm_start / "train").counts["tokens"])


def _raw_repeat(run: Run, loop: Loop) -> Iterator[Row]:
    return _like_warm_start(run, "raw_repeat", run.raw("warm_start"))


def _raw_fresh(run: Run, loop: Loop) -> Iterator[Row]:
    return _like_warm_start(run, "raw_fresh", run.raw(*TRAINING))


def _paraphrased(run: Run, method: str) -> Iterator[Row]:
    """A teacher's paraphrases of the warm start's documents."""
    run.synthesize(method)
    return _like_warm_start(run, method, [Source(run.synthesized(method), "warm_start")])


def _wrap_baseline(run: Run, loop: Loop) -> Iterator[Row]:
    return _paraphrased(run, "wrap_baseline")


def _wrap_cot(run: Run, loop: Loop) -> Iterator[Row]:
    return _paraphrased(run, "wrap_cot")


def _warm_start_matched(run: Run, loop: Loop) -> Iterator[Row]:
    folder = run.baseline("warm_start_matched")
    trained = run.train_warm_start(folder, _trained_tokens(run, loop, "step"))
    yield row(run, "warm_start_matched", 0, 0, trained, run.evaluate(folder))


def _em_paper(run: Run, loop: Loop) -> Iterator[Row]:
    yield from Loop(run, "em_paper", _preset(run, "paper"), run.baseline("em_paper")).rows()


def _oracle(run: Run, loop: Loop) -> Iterator[Row]:
    """The upper bound: the data's own thoughts for every document."""
    folder, splits = run.baseline("oracle"), ("warm_start", "corpus")
    synthesizing.synthesize_given(run.recipe, "oracle", run.prepared, run.base, splits, folder / "synthesize")
    sources = [Source(folder / "synthesize", split) for split in splits]
    trained = run._train(run.recipe.train, sources, folder)
    yield row(run, "oracle", 0, 0, trained, run.evaluate(folder))


BASELINES = {
    "raw": _raw,
    "raw_tokens": _raw_tokens,
    "raw_flops": _raw_flops,
    "raw_repeat": _raw_repeat,
    "raw_fresh": _raw_fresh,
    "warm_start_matched": _warm_start_matched,
    "wrap_baseline": _wrap_baseline,
    "wrap_cot": _wrap_cot,
    "em_paper": _em_paper,
    "oracle": _oracle,
}
METHODS = (
    *("raw", "raw_tokens", "raw_flops", "raw_repeat", "raw_fresh", "wrap_baseline", "wrap_cot"),
    *("warm_start", "warm_start_matched", "em_paper", "em", "oracle"),
)
