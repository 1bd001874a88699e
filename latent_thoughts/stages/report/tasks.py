"""Results of the tasks that models were asked (`tasks` of a row), gathered by task and model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from latent_thoughts.config.evaluate import how
from latent_thoughts.stages.report.charts import Series
from latent_thoughts.stages.report.methods import of
from latent_thoughts.stages.report.summary import LOOPS, Line, Mean, Results, mean

Key = tuple[str, str]  # task, and how it was asked
Budgets = dict[int | None, dict[str, Any]]  # results by budget of thought tokens


@dataclass(frozen=True, slots=True)
class Result:
    """One budget of thought tokens (None where the form has no thoughts)."""

    budget: int | None
    accuracy: Mean
    thought_tokens: float | None


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    method: str
    results: list[Result]

    @property
    def colour(self) -> str:
        return of(self.method).colour

    def curve(self) -> Series | None:
        points = [(float(r.budget), r.accuracy) for r in self.results if r.budget is not None]
        look = of(self.method)
        return Series(self.name, self.colour, points, [], look.dash, look.marker) if len(points) > 1 else None


@dataclass(frozen=True, slots=True)
class Task:
    """A task asked in one way, and every model that was asked it so."""

    name: str
    form: str
    models: list[Model]

    @property
    def title(self) -> str:
        return f"{self.name} · {self.form}"

    @property
    def slug(self) -> str:
        return re.sub(r"\W+", "_", f"{self.name}_{self.form}").strip("_").lower()


def tasks(results: Results) -> list[Task]:
    """Every task with the models that were asked it, in the order of the table."""
    found: dict[Key, Task] = {}
    for line, name in _lines(results):
        for key, asked in _by_task(line).items():
            task = found.setdefault(key, Task(*key, []))
            task.models.append(Model(name, line.method, _results(asked)))
    return list(found.values())


def _lines(results: Results) -> list[tuple[Line, str]]:
    found = []
    for method in results.methods:
        for line in results.main(method) if method in LOOPS else [results.single(method)]:
            if line is not None:
                found.append((line, f"{line.name} {line.iteration}" if method in LOOPS else line.name))
    return found


def _by_task(line: Line) -> dict[Key, list[Budgets]]:
    """A line's results by task, one a seed. Of a row that has the same twice, asked with other budgets or k of pass@k,
    one counts."""
    found: dict[Key, list[Budgets]] = {}
    for row in line.rows.values():
        of_row: dict[Key, Budgets] = {}
        for task in row.get("tasks") or []:
            known = of_row.setdefault((task["name"], how(task)), {})
            known |= {result["budget"]: result for result in task["results"] if result["budget"] not in known}
        for key, asked in of_row.items():
            found.setdefault(key, []).append(asked)
    return found


def _results(asked: list[Budgets]) -> list[Result]:
    budgets: dict[int | None, list[dict[str, Any]]] = {}
    for of_seed in asked:
        for budget, result in of_seed.items():
            budgets.setdefault(budget, []).append(result)
    ordered = sorted(budgets.items(), key=lambda item: (item[0] is not None, item[0] or 0))
    return [Result(budget, _accuracy(entries), _thought_tokens(entries)) for budget, entries in ordered]


def _accuracy(entries: list[dict[str, Any]]) -> Mean:
    """One run's figure as the harness has it; over several seeds of the run, their mean and its error."""
    over = mean(entry["accuracy"]["value"] for entry in entries)
    assert over is not None
    if len(entries) > 1:
        return over
    only = entries[0]["accuracy"]
    return Mean(only["value"], only["se"], only["n"], "questions")


def _thought_tokens(entries: list[dict[str, Any]]) -> float | None:
    found = mean(entry.get("thought_tokens") for entry in entries)
    return None if found is None else found.value
