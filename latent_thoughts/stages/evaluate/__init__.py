"""evaluate: how likely a model finds held-out text, what it answers, and how it does on tasks (method, section 7).

latent-thoughts evaluate recipe.yaml --out RUN --iteration 1
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from latent_thoughts import executors
from latent_thoughts import model as models
from latent_thoughts.config import Recipe
from latent_thoughts.data import records
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.engines.load import loaded_engine
from latent_thoughts.executors.work import Do, Told
from latent_thoughts.progress import track
from latent_thoughts.stages.evaluate.held_out import ANSWERS, Examiner, accuracy
from latent_thoughts.stages.evaluate.likelihood import SCORES, Scorer, summary
from latent_thoughts.store import Stage, read_manifest, same_base, stage_key
from latent_thoughts.types import Manifest, UserError

__all__ = ["evaluate"]

ALL = "answers.parquet"
SHARD = 50  # documents scored between two that a killed evaluation keeps


def evaluate(recipe: Recipe, model: Path, prepared: Path, folder: Path, thinks: bool) -> Manifest:
    """Evaluates the model of train stage `model` on held-out documents. `thinks` is False for models trained on raw
    text: they answer directly, and their bound is their likelihood."""
    config = recipe.evaluate
    inputs = {"model": read_manifest(model), "prepare": read_manifest(prepared)}
    same_base(inputs["model"], inputs["prepare"])
    sampled = recipe.sample.model_dump(include={"max_thought_tokens", "context_chunks", "max_tokens"})
    engine = recipe.engine.model_dump(include={"kind", "scorer"})
    asked = config.model_dump(exclude={"tasks", "fine_tune", "thoughts_kept"})  # stages of their own, and the report's
    settings = [asked, sampled, recipe.seed, recipe.model.dtype, thinks, engine, SCORES.names]
    stage = Stage(folder, "evaluate", stage_key("evaluate", settings, inputs))
    if (manifest := stage.manifest) is not None:
        return manifest
    began = time.perf_counter()
    rows = sum(s["rows"] for name, s in inputs["prepare"].shards.items() if name.startswith("held_out-"))
    if not rows:
        raise UserError("no document is held out: raise data.held_out, or data.limit")
    names = [f"likelihood-{n:05}.parquet" for n in range(-(-min(rows, config.documents) // SHARD))]
    if not config.answer:
        stage.write(ALL, [], ANSWERS, {})
    units = dict.fromkeys([ALL, *names], 1.0)  # the longest first
    with track("evaluate", len(units), "parts") as advance:
        work, told = Parts(recipe, stage, model, prepared, thinks), lambda amount, counts: advance(amount)
        described = {n: d for result in executors.run(recipe, work, units, told) for n, d in result.shards.items()}
    counts = summary([row for name in names for row in stage.rows(name)]) | accuracy(stage.rows(ALL))
    counts["seconds"] = time.perf_counter() - began
    return stage.close([*names, ALL], counts, described)


@dataclass(frozen=True)
class Parts:
    """The stage's work for an executor: a unit is a part of the documents to score, or all of them to answer."""

    recipe: Recipe
    stage: Stage
    model: Path
    prepared: Path
    thinks: bool

    def files(self, unit: str) -> list[str]:
        return [unit]

    def set_up(self, stack: contextlib.ExitStack) -> Do:
        recipe, thinks = self.recipe, self.thinks
        documents = records.documents(self.prepared, "held_out")[: recipe.evaluate.documents]
        tokenizer, controls = models.load_tokenizer(self.model / "model")
        engine = stack.enter_context(loaded_engine(recipe, self.model / "model"))
        scorer = Scorer(recipe, engine, controls, thinks)
        examiner = Examiner(recipe, engine, controls, Codec(tokenizer), thinks)

        def do(unit: str, told: Told) -> None:
            if unit == ALL:
                self.stage.write(unit, examiner.grade(examiner.answer(documents)), ANSWERS, {})
            else:
                first = SHARD * int(unit.removeprefix("likelihood-").removesuffix(".parquet"))
                self.stage.write(unit, scorer.rows(documents[first : first + SHARD]), SCORES, {})
            told(1, {})

        return do
