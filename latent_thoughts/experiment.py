"""The paper's experiments, each one command: a recipe's run for every seed, a report, and a verdict on its claims.

    latent-thoughts experiment bootstrap --size tiny --seeds 0,1,2 --out DIR

recipes/experiments/NAME.yaml says what is run at each size and what is claimed. What several cells need (documents, the
warm start) lies in one run folder a seed, and is made once.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

from latent_thoughts import seeds
from latent_thoughts.config import Recipe, load_recipe
from latent_thoughts.config.base import Dumper, Section, parse, read_yaml_file
from latent_thoughts.stages.report import report
from latent_thoughts.stages.report.differences import difference
from latent_thoughts.stages.report.summary import LOOPS, Line, Results, load
from latent_thoughts.store import read_json, run_lock, write_json
from latent_thoughts.types import UserError

MODEL = re.compile(
    r"(?:variant (?P<variant>\S+)|cell (?P<cell>\S+)|(?P<method>\w+))(?: (?P<iteration>\d+))?(?: K=(?P<k>\d+))?"
)
Size = Literal["tiny", "small", "paper"]


class Claim(Section):
    """`first` is better than `second`, by the final accuracy; without accuracy, by the bound.

    A model is named as in results.json: `METHOD`, `variant NAME` or `cell NAME`, and behind it an iteration where it is
    not the last, and `K=16` where it is not the run's own: `em 1`, `em_paper K=4`.
    """

    first: str
    second: str


class Experiment(Section):
    """A grid: settings of all sizes and of one size, dotted as on the command line, and the claims.

    A cell is a run of its own, on other documents; of it the baselines count. `equal_tokens` names a model as claims
    do: raw models of cells are trained for as many tokens as it was, with all it builds on, in the mean over seeds.
    """

    about: str
    recipes: dict[Size, str]
    set: dict[str, Any] = {}
    sizes: dict[Size, dict[str, Any]] = {}
    cells: dict[Size, dict[str, dict[str, Any]]] = {}
    equal_tokens: str | None = None
    claims: dict[str, Claim]

    def recipe(self, size: Size, overrides: list[str], cell: str | None = None) -> Recipe:
        """Of the run itself, or of a cell. Raises UserError where the experiment has no such size."""
        if size not in self.recipes:
            raise UserError(f"this experiment has no size {size} (it has {', '.join(self.recipes)})")
        given = map(_override, {**self.set, **self.sizes.get(size, {})}.items())
        last = map(_override, self.cells[size][cell].items()) if cell else []  # what makes it a cell
        return load_recipe(seeds.recipe_path(self.recipes[size]), [*given, *overrides, *last])


def _override(setting: tuple[str, Any]) -> str:
    import yaml

    name, value = setting
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=math.inf)
    return f"{name}={text.removesuffix('...' + chr(10))}"


def named(name: str) -> Experiment:
    """One that comes with the package, or a YAML file. Raises UserError naming those there are."""
    folder = seeds.recipe_path("experiments")
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.exists():
        there = ", ".join(sorted(found.stem for found in folder.glob("*.yaml")))
        raise UserError(f"there is no experiment {name} (there are {there}, or give a YAML file)")
    values = read_yaml_file(path, "experiment")
    return parse(Experiment, values if isinstance(values, dict) else {}, str(path))


def experiment(
    name: str, size: Size, numbers: list[int], out: Path, overrides: list[str], at_once: int | None = None
) -> None:
    """Runs all cells for every seed; ends with tables, figures, OUT/report.html and OUT/verdict.json. Resumes."""
    found = named(name)
    recipe = found.recipe(size, overrides)
    with run_lock(out):
        seeds.run(recipe, out, numbers, at_once)
        cells = found.cells.get(size, {})
        equal = budget(found.equal_tokens, load(out)) if cells and found.equal_tokens else []
        for cell in cells:
            seeds.run(found.recipe(size, [*overrides, *equal], cell), out / "cells" / cell, numbers, at_once)
        _join(out, list(cells))
        write_json(out / "verdict.json", {"claims": verdict(found.claims, load(out))})
        report(out)


def budget(model: str, results: Results) -> list[str]:
    """The setting that trains raw models for as many tokens as `model`. Raises UserError where that was not run."""
    line = line_of(model, results)
    tokens = line and line.spent("train_tokens")
    if tokens is None:
        raise UserError(f"equal_tokens: {model} was not run, so that no tokens can be equalled")
    return [f"em.raw.tokens={round(tokens.value)}"]


def _join(out: Path, cells: list[str]) -> None:
    """Puts the rows of the cells' baselines behind those of the run itself."""
    whole = read_json(out / "results.json")
    for cell in cells:
        rows = read_json(out / "cells" / cell / "results.json")["rows"]
        whole["rows"] += [{**row, "cell": cell} for row in rows if row["method"] != "warm_start"]
    write_json(out / "results.json", whole)


def verdict(claims: dict[str, Claim], results: Results) -> dict[str, dict[str, Any]]:
    """Of every claim both of whose models were run for two seeds or more: the mean difference over seeds, paired, with
    its 95 % interval (`differences.difference`). A claim holds where all of the interval is above zero; where none
    is known there is no verdict."""
    found = {name: _judged(claim, results) for name, claim in claims.items()}
    return {name: judged for name, judged in found.items() if judged}


def _judged(claim: Claim, results: Results) -> dict[str, Any] | None:
    first, second = (line_of(text, results) for text in (claim.first, claim.second))
    if first is None or second is None:
        return None
    metric = _metric(first, second, results)
    if metric is None:
        return None
    found = difference(first, second, metric, least=2)
    if found is None or found.interval is None or found.seeds < 2:
        return None
    return {
        "holds": found.interval[0] > 0, "difference": found.value, "ci95": list(found.interval),
        "n_seeds": found.seeds, "metric": metric, "first": claim.first, "second": claim.second,
    }  # fmt: skip


def _metric(first: Line, second: Line, results: Results) -> str | None:
    """Accuracy where both have it; else the bound with the most thoughts."""
    names = ["accuracy", *[f"bound_per_token.{k}" for k in reversed(results.bounds)]]
    return next((n for n in names if first.mean(n) and second.mean(n)), None)


def line_of(text: str, results: Results) -> Line | None:
    """The model that a claim names; None where it was not run. Raises UserError for a name that says nothing."""
    match = MODEL.fullmatch(text)
    if match is None:
        raise UserError(f"claims: {text!r} names no model: METHOD, variant NAME or cell NAME, an iteration, K=16")
    method, k = match["method"], match["k"]
    if match["variant"]:
        lines = results.variant(match["variant"])
    elif match["cell"]:
        cell = results.cell(match["cell"])
        lines = [cell] if cell.rows else []
    elif method in LOOPS:
        lines = results.main(method) if k is None else results.loop(method, int(k))
    else:
        single = results.single(method)
        lines = [single] if single else []
    if match["iteration"]:
        lines = [line for line in lines if line.iteration == int(match["iteration"])]
    return lines[-1] if lines else None
