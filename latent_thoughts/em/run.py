"""A recipe and its folder: where every stage's input and output lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from latent_thoughts import examine, executors
from latent_thoughts.config import Recipe, Synthesize, Train
from latent_thoughts.config.base import parse
from latent_thoughts.data.corpus import Source
from latent_thoughts.places import place, relative
from latent_thoughts.stages import evaluate as evaluating
from latent_thoughts.stages import prepare as preparing
from latent_thoughts.stages import synthesize as synthesizing
from latent_thoughts.stages import train as training
from latent_thoughts.stages.synthesize.asking import Approve
from latent_thoughts.store import read_manifest
from latent_thoughts.types import Manifest

TRAINING = ("warm_start", "corpus")  # the splits that models are trained on
PARAPHRASES = ("wrap_baseline", "wrap_cot")


@dataclass(frozen=True)
class Run:
    """A recipe and its folder: knows where every stage's input and output lie."""

    recipe: Recipe
    folder: Path
    approve: Approve | None = None  # is shown what a teacher will cost, and raises UserError where it is too much
    home: Path | None = None  # where what is trained for this recipe alone lies, if elsewhere than in the run's folder

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
        return (self.home or self.folder) / "baselines" / name

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
        return self.train(config, [Source(self.warm_start / "synthesize", "warm_start")], folder or self.warm_start)

    def train_raw(self) -> Path:
        """The train stage of a model of text alone, as `em.raw` says."""
        folder = self.baseline("raw")
        self.train(self.recipe.raw_train, self.raw(*TRAINING), folder)
        return folder / "train"

    def train(
        self,
        config: Train,
        sources: list[Source],
        folder: Path,
        base: Path | None = None,
        continue_from: Path | None = None,
        seed: int | None = None,
    ) -> Manifest:
        """By default from the run's initial checkpoint, with its seed."""
        recipe, held_out = self.recipe, Source(self.prepared, "held_out")
        seed = recipe.seed if seed is None else seed
        where = (base or self.base, sources, folder / "train", seed, continue_from, held_out)
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
            before = [f for f in folder.parent.glob("iter_*") if f.name[5:].isdigit()]
            folders += sorted(f for f in before if int(f.name[5:]) < int(folder.name[5:]))
        for path in (f / stage for f in folders for stage in ("synthesize", "sample")):
            if (path / "manifest.json").exists():
                there = {name.rpartition("-")[0] for name in read_manifest(path).shards}
                found |= {f"{relative(path, self.folder)} {s}": Source(path, s) for s in TRAINING if s in there}
        return found
