"""Chains what evaluating a model on tasks takes: asking, fine-tuning for every seed and asking again.

FOLDER/tasks/TASK-FORM/                            a task asked of the model as it is
FOLDER/fine_tune/documents                         a task's training split
FOLDER/fine_tune/seed_N/{train,tasks/TASK-FORM}    fine-tuned on it, and asked
FOLDER/fine_tune/results.json                      all seeds together
FOLDER/model-HASH                                  a model by name or file, as a folder
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latent_thoughts import executors
from latent_thoughts import model as models
from latent_thoughts.config import Recipe
from latent_thoughts.data.corpus import Source
from latent_thoughts.places import place, version
from latent_thoughts.provenance import provenance
from latent_thoughts.stages import train as training
from latent_thoughts.stages.evaluate import asking, fine_tuning
from latent_thoughts.stages.train.trainer import Diverged
from latent_thoughts.store import read_json, write_json
from latent_thoughts.transfer import complete
from latent_thoughts.types import UserError

Results = dict[str, Any]


def ask(
    recipe: Recipe, model: Path, folder: Path, thinks: bool = True, trained_on: Mapping[str, Source] | None = None
) -> list[Results]:
    """The results of every task of the recipe. A model that was not taught to think is asked the plain forms."""
    asked = [b for b in recipe.evaluate.tasks if thinks or b.form != "latent"]
    calls = [(recipe, b, model, folder / "tasks" / asking.name_of(b), trained_on) for b in asked]
    return [manifest.counts for manifest in executors.calls(recipe, asking.ask_task, calls)]


def fine_tune(
    recipe: Recipe, model: Path, folder: Path, trained_on: Mapping[str, Source] | None = None
) -> list[Results]:
    """Fine-tunes train stage `model` on a task's training split, once a seed, and asks the task."""
    config = recipe.evaluate.fine_tune
    if config is None:
        return []
    benchmark, folder = config.asked, folder / "fine_tune"
    prepared = fine_tuning.documents(recipe, config, model, folder / "documents")
    settings, source = fine_tuning.training(config, prepared), Source(folder / "documents", fine_tuning.SPLIT)
    seeds, asked = [recipe.seed + n for n in range(config.seeds)], []
    for seed in seeds:
        where = folder / f"seed_{seed}"
        with _named("evaluate.fine_tune.train"):
            executors.together(recipe, training.train, settings, recipe.model, model, [source], where / "train", seed)
        asked.append(where / "tasks" / asking.name_of(benchmark))
        one, seen = benchmark.model_copy(update={"seed": seed}), {**(trained_on or {}), "fine_tune": source}
        executors.calls(recipe, asking.ask_task, [(recipe, one, where / "train", asked[-1], seen)])
    return [asking.joined(benchmark, asked, seeds, folder)]


@contextlib.contextmanager
def _named(section: str) -> Iterator[None]:
    """A training that diverges names settings of `train`, which are here those of another section."""
    try:
        yield
    except Diverged as error:
        error.args = (str(error).replace("train.", f"{section}."),)
        raise


def evaluate_model(recipe: Recipe, model: str, folder: Path) -> list[Results]:
    """Asks the recipe's tasks of a folder, a hub name or a GGUF file. Puts a row into FOLDER/results.json."""
    if not recipe.evaluate.tasks:
        raise UserError("evaluate.tasks is empty: name the tasks to ask")
    where = place(model)
    if not where.is_dir():
        where = folder / f"model-{_fingerprint(model, where)}"
        if not complete(where):
            plain, tokenizer = models.load_plain(recipe.model.model_copy(update={"base": model, "tokenizer": None}))
            models.save(plain, tokenizer, where)
    found = ask(recipe, where, folder)
    record(
        recipe, folder, {"method": f"model {model}", "iteration": 0, "samples": 0, "seed": recipe.seed, "tasks": found}
    )
    return found


def _fingerprint(model: str, file: Path) -> str:
    """Of a model's name and, where it is a file here, of what is in it: one model's answers are not another's."""
    content = version(file) if file.is_file() else ""
    return hashlib.sha256(f"{model}\n{content}".encode()).hexdigest()[:12]


def record(recipe: Recipe, folder: Path, row: Results) -> None:
    """Puts a row into FOLDER/results.json, in place of that of the same model if it is there."""
    path, same = folder / "results.json", ("method", "variant", "cell", "iteration", "samples", "seed")
    known = read_json(path) if path.exists() else {"run": {**provenance(recipe), "seeds": [recipe.seed]}, "rows": []}
    rows = [r for r in known["rows"] if [r.get(n) for n in same] != [row.get(n) for n in same]]
    write_json(path, {**known, "rows": [*rows, row]})
