"""Which of several evaluated models is better, and which differences are real.

A model is named by a folder in which it was evaluated: a run's iteration, a folder of tasks, or one task. Models are
compared pairwise on the same questions, of tasks and of held-out documents; p-values are adjusted for how many
comparisons are made. Where both models have several training seeds, a difference must stand out among seeds.

Text is compared by the bound of the largest K that both have, over the chunks that both were scored on. Where no
thought about a chunk ended, its bound is that of the empty thought: how many such chunks there are, and whose, stands
beside the difference.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latent_thoughts.config.evaluate import how
from latent_thoughts.places import below, relative
from latent_thoughts.stages.evaluate import statistics
from latent_thoughts.stages.evaluate.likelihood import NATS_PER_BIT
from latent_thoughts.stages.evaluate.statistics import Difference
from latent_thoughts.store import read_json, read_table
from latent_thoughts.types import UserError

LIKELIHOOD = "held-out text, bits per byte"
ANSWERS = ("held-out documents", "answers")
Key = tuple[str, str]  # task, and how it was asked


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a chunk of text: bits by K, and whether a thought about it ended, likewise."""

    bits: dict[int, float]
    finished: dict[int, bool]
    bytes: int


@dataclass(slots=True)
class Model:
    """What was found in a folder: grades by question, a mean for every training seed, by task and form; and the cost of
    text by chunk (document, index, hash of the text)."""

    name: str
    grades: dict[Key, dict[str, list[float]]] = field(default_factory=dict)
    figures: dict[Key, dict[str, Any]] = field(default_factory=dict)
    chunks: dict[tuple[str, int, str], Cost] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """First minus second, with p adjusted. `lower` tells that lower figures are better.

    `unfinished` counts the chunks of text for which no thought ended, of the first model and of the second.
    """

    task: str
    first: str
    second: str
    difference: Difference
    adjusted: float
    lower: bool = False
    unfinished: tuple[int, int] = (0, 0)

    @property
    def better(self) -> str | None:
        """The better model's name; None where no difference is shown."""
        if not self.adjusted < statistics.SIGNIFICANT:
            return None
        return self.first if (self.difference.value > 0) != self.lower else self.second


def load(folder: Path) -> Model:
    """Raises UserError where no evaluation in the folder is complete, or more than one model was evaluated."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist")
    stages = _evaluated(folder)
    if not stages:
        raise UserError(f"{folder} holds no evaluation that is complete: run latent-thoughts evaluate first")
    models = sorted({str(_model_of(stage)) for stage in stages})
    if len(models) > 1:
        raise UserError(f"{folder} holds {len(models)} models, name one: {', '.join(models[:5])}")
    model, seeds = Model(str(folder)), dict[Key, dict[Path, dict[str, float]]]()
    for stage in stages:
        if (stage / "samples.parquet").exists():
            _add(seeds, stage)
        if (stage / "answers.parquet").exists():
            _add_answers(seeds, stage)
        for shard in sorted(stage.glob("likelihood-*.parquet")):
            model.chunks |= _costs(shard)
    for key, of_seeds in seeds.items():
        found = list(of_seeds.values())
        if any(grades.keys() != found[0].keys() for grades in found):
            raise UserError(f"{folder}: the seeds of {', '.join(key)} were asked different questions")
        model.grades[key] = {question: [grades[question] for grades in found] for question in found[0]}
        model.figures[key] = statistics.over_seeds(_table(model.grades[key], list(found[0])))
    return model


def _costs(shard: Path) -> dict[tuple[str, int, str], Cost]:
    """Raises UserError for a shard of an earlier version, which does not say which text it is of."""
    found, table = {}, read_table(shard)
    if "text" not in table.column_names:
        raise UserError(f"{shard} was written by an earlier version: run latent-thoughts evaluate again")
    for row in table.to_pylist():
        bits = {k: -bound / NATS_PER_BIT for k, bound in row["bounds"]}
        ended = {k: share > 0 for k, share in row["finished"]}
        found[row["doc_id"], row["chunk_index"], row["text"]] = Cost(bits, ended, row["bytes"])
    return found


def _evaluated(folder: Path) -> list[Path]:
    """The complete stages in a folder that asked a task or scored held-out text; not those set aside (NAME.KEY), by
    themselves or with their model."""
    evaluated = re.compile(r"samples\.parquet|likelihood-\d+\.parquet")
    stages = dict.fromkeys(path.parent for path in below(folder) if evaluated.fullmatch(path.name))
    gone = re.compile(r"/(tasks|fine_tune)\.[^/]*/|/[^/]*\.[^/]*$")
    return [
        s
        for s in stages
        if (s / "manifest.json").exists() and (s == folder or not gone.search(f"/{relative(s, folder)}"))
    ]


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


def _add_answers(seeds: dict[Key, dict[Path, dict[str, float]]], stage: Path) -> None:
    """Grades of the answers on held-out documents, where the recipe asked for them."""
    rows = read_table(stage / "answers.parquet", ["doc_id", "question", "gold", "right"]).to_pylist()
    if rows:
        means = {f"{row['doc_id']}\n{row['question']}\n{row['gold']}": float(row["right"]) for row in rows}
        seeds.setdefault(ANSWERS, {})[stage.parent] = means


def _table(grades: dict[str, list[float]], questions: Sequence[str]) -> np.ndarray:
    """(seeds, questions)"""
    return np.array([grades[question] for question in questions]).T


def compare(models: Sequence[Model]) -> list[Comparison]:
    """All pairs of models, in every task that both were asked: in the forms that both know, else in every pair of
    forms; and in text. Raises UserError where two were asked or scored on nothing in common, or are the same."""
    if len({Path(m.name).resolve() for m in models}) < len(models):
        raise UserError(f"a folder is named twice: {', '.join(m.name for m in models)}")
    found: dict[tuple[str, str, str], Difference] = {}
    unfinished: dict[tuple[str, str, str], tuple[int, int]] = {}
    for a, b in itertools.combinations(models, 2):
        for task in dict.fromkeys(t for t, _ in a.grades if any(t == other for other, _ in b.grades)):
            for one, other in _forms(a, b, task):
                first, second = a.grades[task, one], b.grades[task, other]
                if not (shared := sorted(first.keys() & second.keys())):
                    raise UserError(f"{a.name} and {b.name} were asked different questions of {task}")
                what = f"{task}, {one}" if one == other else f"{task}, {one} and {other}"
                found[what, a.name, b.name] = _difference(_table(first, shared), _table(second, shared))
        if a.chunks and b.chunks:
            k, gap, ended = _of_text(a, b)
            at = (f"{LIKELIHOOD} (L_{k})", a.name, b.name)
            found[at], unfinished[at] = gap, ended
    adjusted = statistics.significant(found)
    return [
        Comparison(*at, gap, adjusted[at], at in unfinished, unfinished.get(at, (0, 0))) for at, gap in found.items()
    ]


def _difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Of grades (seeds, questions)."""
    if min(len(first), len(second)) > 1:
        return statistics.over_training(first, second)
    return statistics.paired(first.mean(0), second.mean(0))


def _of_text(a: Model, b: Model) -> tuple[int, Difference, tuple[int, int]]:
    """The largest K that both have, the difference in bits per byte by its bound, and for how many chunks no thought
    of the one and of the other ended."""
    chunks = sorted(a.chunks.keys() & b.chunks.keys())
    if not chunks:
        raise UserError(f"{a.name} and {b.name} were scored on different held-out text")
    first, second = ([model.chunks[c] for c in chunks] for model in (a, b))
    if not (both := first[0].bits.keys() & second[0].bits.keys()):
        raise UserError(f"{a.name} and {b.name} have bounds of no K in common: see evaluate.bound")
    k, sizes = max(both), np.array([cost.bytes for cost in first], float)
    gaps = np.array([one.bits[k] - other.bits[k] for one, other in zip(first, second, strict=True)])
    documents = np.array([document for document, *_ in chunks])
    unfinished = (sum(not c.finished[k] for c in first), sum(not c.finished[k] for c in second))
    return k, statistics.paired_ratio(gaps, sizes, documents), unfinished


def _forms(a: Model, b: Model, task: str) -> list[tuple[str, str]]:
    first, second = ([form for t, form in model.grades if t == task] for model in (a, b))
    return [(f, f) for f in first if f in second] or list(itertools.product(first, second))
