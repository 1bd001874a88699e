"""Which of several evaluated models is better, and which differences are real.

A model is named by a folder in which it was evaluated: a run's iteration, a folder of tasks, or one task. Models are
compared pairwise on the same questions; p-values are adjusted for how many comparisons are made.

A chunk for which a model finished no thought has no bound (-inf: it would cost infinitely many bits). Text is compared
over the chunks that both models have a bound for; how many were left out, and by whose fault, stands beside the
difference. It flatters the model that finished less often: where the share is not small, the difference says little.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latent_thoughts.config.evaluate import how
from latent_thoughts.places import below
from latent_thoughts.stages.evaluate import statistics
from latent_thoughts.stages.evaluate.likelihood import NATS_PER_BIT
from latent_thoughts.stages.evaluate.statistics import Difference
from latent_thoughts.store import read_json, read_table
from latent_thoughts.types import UserError

LIKELIHOOD = "held-out text, bits per byte"
Key = tuple[str, str]  # task, and how it was asked


@dataclass(slots=True)
class Model:
    """What was found in a folder: mean grades by question, by task and form, and the cost of text in bits by chunk."""

    name: str
    grades: dict[Key, dict[str, float]] = field(default_factory=dict)
    figures: dict[Key, dict[str, Any]] = field(default_factory=dict)
    chunks: dict[tuple[str, int], tuple[float, int]] = field(default_factory=dict)  # bits, bytes


@dataclass(frozen=True, slots=True)
class Comparison:
    """First minus second, with p adjusted. `lower` tells that lower figures are better.

    `left_out` counts the chunks of text that could not be compared: those without a bound of the first model, of the
    second, and of either.
    """

    task: str
    first: str
    second: str
    difference: Difference
    adjusted: float
    lower: bool = False
    left_out: tuple[int, int, int] = (0, 0, 0)

    @property
    def better(self) -> str | None:
        """The better model's name; None where no difference is shown."""
        if not self.adjusted < statistics.SIGNIFICANT:
            return None
        return self.first if (self.difference.value > 0) != self.lower else self.second


def load(folder: Path) -> Model:
    """Raises UserError where nothing was evaluated in the folder, or more than one model was."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist")
    stages = _evaluated(folder)
    if not stages:
        raise UserError(f"{folder} holds no evaluation: run latent-thoughts evaluate first")
    models = sorted({str(_model_of(stage)) for stage in stages})
    if len(models) > 1:
        raise UserError(f"{folder} holds {len(models)} models, name one: {', '.join(models[:5])}")
    model, seeds = Model(str(folder)), dict[Key, dict[Path, dict[str, float]]]()
    for stage in stages:
        if (stage / "samples.parquet").exists():
            _add(seeds, stage)
        for shard in sorted(stage.glob("likelihood-*.parquet")):
            for row in read_table(shard).to_pylist():
                cost = -max(dict(row["bounds"]).items())[1] / NATS_PER_BIT
                model.chunks[row["doc_id"], row["chunk_index"]] = (cost, row["bytes"])
    for key, of_seeds in seeds.items():
        found = list(of_seeds.values())
        if any(grades.keys() != found[0].keys() for grades in found):
            raise UserError(f"{folder}: the seeds of {', '.join(key)} were asked different questions")
        model.grades[key] = {q: float(np.mean([g[q] for g in found])) for q in found[0]}
        names = list(found[0])
        model.figures[key] = statistics.over_seeds(np.array([[g[q] for q in names] for g in found]))
    return model


def _evaluated(folder: Path) -> list[Path]:
    """The stages in a folder that asked a task or scored held-out text; not those set aside (NAME.KEY)."""
    found = dict[Path, None]()
    for path in below(folder):
        stage = path.parent
        asked = path.name == "samples.parquet" and (stage / "manifest.json").exists()
        scored = path.name.startswith("likelihood-") and path.suffix == ".parquet"
        if (asked or scored) and (stage == folder or "." not in stage.name):
            found[stage] = None
    return list(found)


def _model_of(stage: Path) -> Path:
    """The folder of the model that a stage evaluated; of fine-tuned ones, which are seeds of one model, their
    parent's."""
    above = stage.parent.parent if stage.parent.name == "tasks" else stage.parent
    return above.parent.parent if _tuned(stage) else above


def _tuned(stage: Path) -> bool:
    """Whether a task was asked of a fine-tuned model: FOLDER/fine_tune/seed_N/tasks/TASK."""
    return stage.parent.name == "tasks" and stage.parent.parent.parent.name == "fine_tune"


def _add(seeds: dict[Key, dict[Path, dict[str, float]]], stage: Path) -> None:
    """Grades of one task's folder: means over a question's samples, by task and budget. What differs in its `budgets`
    or `pass_at` alone was answered alike, and counts once."""
    results, tuned = read_json(stage / "results.json"), _tuned(stage)
    asked = how(results | ({"fine_tuned": True, "seed": None} if tuned else {}))  # its samples have a seed of their own
    found: dict[Key, dict[str, list[float]]] = {}
    for row in read_table(stage / "samples.parquet", ["question_id", "budget", "grade"]).to_pylist():
        key = (results["name"], asked + ("" if row["budget"] is None else f" ≤ {row['budget']}"))
        found.setdefault(key, {}).setdefault(row["question_id"], []).append(row["grade"])
    for key, grades in found.items():
        means = {question: float(np.mean(values)) for question, values in grades.items()}
        seeds.setdefault(key, {}).setdefault(stage.parent, means)


def compare(models: Sequence[Model]) -> list[Comparison]:
    """All pairs of models, in every task that both were asked: in the forms that both know, else in every pair of
    forms. Raises UserError where two were asked different questions."""
    found: dict[tuple[str, str, str], Difference] = {}
    left_out: dict[tuple[str, str, str], tuple[int, int, int]] = {}
    for a, b in itertools.combinations(models, 2):
        for task in dict.fromkeys(t for t, _ in a.grades if any(t == other for other, _ in b.grades)):
            for one, other in _forms(a, b, task):
                first, second = a.grades[task, one], b.grades[task, other]
                if not (shared := sorted(first.keys() & second.keys())):
                    raise UserError(f"{a.name} and {b.name} were asked different questions of {task}")
                what = f"{task}, {one}" if one == other else f"{task}, {one} and {other}"
                gap = statistics.paired([first[q] for q in shared], [second[q] for q in shared])
                found[what, a.name, b.name] = gap
        if a.chunks.keys() & b.chunks.keys():
            at = (LIKELIHOOD, a.name, b.name)
            found[at], left_out[at] = _of_text(a, b)
    adjusted = statistics.significant(found)
    return [
        Comparison(*at, gap, adjusted[at], at in left_out, left_out.get(at, (0, 0, 0))) for at, gap in found.items()
    ]


def _of_text(a: Model, b: Model) -> tuple[Difference, tuple[int, int, int]]:
    """The difference in bits per byte over the chunks that both have a bound for, and how many are left out."""
    chunks = sorted(a.chunks.keys() & b.chunks.keys())
    table = np.array([(a.chunks[c][0], b.chunks[c][0], a.chunks[c][1]) for c in chunks])
    there = np.isfinite(table[:, :2])
    both = there.all(1)
    left_out = (int((~there[:, 0]).sum()), int((~there[:, 1]).sum()), int((~both).sum()))
    if not both.any():
        return Difference(math.nan, math.nan, math.nan, 1.0, 0, "none"), left_out
    first, second, sizes = table[both].T
    documents = np.array([doc for doc, _ in chunks])[both]
    return statistics.paired_ratio(first - second, sizes, documents), left_out


def _forms(a: Model, b: Model, task: str) -> list[tuple[str, str]]:
    first, second = ([form for t, form in model.grades if t == task] for model in (a, b))
    return [(f, f) for f in first if f in second] or list(itertools.product(first, second))
