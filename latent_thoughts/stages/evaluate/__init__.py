"""evaluate: how likely a model finds held-out text, what it answers, and how it does on tasks (method, section 7).

latent-thoughts evaluate recipe.yaml --out RUN --iteration 1
"""

from __future__ import annotations

import time
from pathlib import Path

from latent_thoughts import model as models
from latent_thoughts.config import Recipe
from latent_thoughts.data import records
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.engines.load import loaded_engine
from latent_thoughts.runlog import track
from latent_thoughts.stages.evaluate.held_out import ANSWERS, Examiner, accuracy
from latent_thoughts.stages.evaluate.likelihood import SCORES, Scorer, summary
from latent_thoughts.store import Stage, read_manifest, stage_key
from latent_thoughts.types import Manifest, UserError

__all__ = ["evaluate"]

SHARD = 50  # documents scored between two that a killed evaluation keeps


def evaluate(recipe: Recipe, model: Path, prepared: Path, folder: Path, thinks: bool) -> Manifest:
    """Evaluates the model of train stage `model` on held-out documents. `thinks` is False for models trained on raw
    text: they answer directly, and their bound is their likelihood."""
    config = recipe.evaluate
    inputs = {"model": read_manifest(model), "prepare": read_manifest(prepared)}
    sampled = recipe.sample.model_dump(include={"max_thought_tokens", "context_chunks", "max_tokens"})
    engine = recipe.engine.model_dump(include={"kind", "scorer"})
    settings = [config.model_dump(exclude={"tasks"}), sampled, recipe.seed, recipe.model.dtype, thinks, engine]
    stage = Stage(folder, "evaluate", stage_key("evaluate", settings, inputs))
    if (manifest := stage.manifest) is not None:
        return manifest
    began = time.perf_counter()
    documents = records.documents(prepared, "held_out")[: config.documents]
    if not documents:
        raise UserError("no document is held out: raise data.held_out, or data.limit")
    tokenizer, controls = models.load_tokenizer(model / "model")
    parts = [documents[n : n + SHARD] for n in range(0, len(documents), SHARD)]
    names = [f"likelihood-{n:05}.parquet" for n in range(len(parts))]
    with loaded_engine(recipe, model / "model") as engine, track("evaluate", len(parts) + 1, "parts") as advance:
        scorer = Scorer(recipe, engine, controls, thinks)
        for name, part in zip(names, parts, strict=True):
            if stage.done(name) is None:
                stage.write(name, scorer.rows(part), SCORES, {})
            advance(1)
        if config.answer and stage.done("answers.parquet") is None:
            examiner = Examiner(recipe, engine, controls, Codec(tokenizer), thinks)
            stage.write("answers.parquet", examiner.grade(examiner.answer(documents)), ANSWERS, {})
        elif not config.answer:
            stage.write("answers.parquet", [], ANSWERS, {})
        advance(1)
    counts = summary([row for name in names for row in stage.rows(name)]) | accuracy(stage.rows("answers.parquet"))
    counts["seconds"] = time.perf_counter() - began
    return stage.close([*names, "answers.parquet"], counts)
