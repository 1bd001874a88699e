"""What results.json says: its rows gathered over seeds, with means and standard errors.

A row is one model of one seed, a line is the same model over all seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latent_thoughts.config import PRESETS
from latent_thoughts.places import content
from latent_thoughts.stages.report.methods import METHODS, of
from latent_thoughts.store import read_json
from latent_thoughts.types import UserError

Row = dict[str, Any]

LOOPS = ("em_paper", "em")  # methods with iterations


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with its standard error (None where none is known). `over` says what the error is over."""

    value: float
    error: float | None = None
    n: int = 1
    over: str = "seeds"


def percents(value: float) -> str:
    """A share in percent, without decimals but for one near 0 and 100: 0.125 is 13, and 0.996 is not 100 but 99.6."""
    shown = round(100 * value, 6)  # 14.5 and not 14.499999999999998
    return f"{shown:.1f}" if 0 < shown < 2 or 98 < shown < 100 else f"{math.floor(shown + 0.5)}"


def mean(values: Iterable[float | None]) -> Mean | None:
    """Mean and standard error of the values that are there; None where there are none."""
    there = np.array([v for v in values if v is not None and math.isfinite(v)], float)
    if not len(there):
        return None
    error = float(there.std(ddof=1) / np.sqrt(len(there))) if len(there) > 1 else None
    return Mean(float(there.mean()), error, len(there))


def figure(row: Row, name: str) -> float | None:
    """A row's figure by its dotted name; None where it is missing, null or not finite."""
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


@dataclass(frozen=True, slots=True)
class Line:
    """One method, iteration and K: its rows, one a seed, and those its training builds on."""

    method: str
    iteration: int
    samples: int
    rows: dict[Any, Row]
    history: tuple[Line, ...] = ()

    @property
    def name(self) -> str:
        """For a reader."""
        return of(self.method).name

    @property
    def documents(self) -> float:
        """That there were to train on, with thoughts or without."""
        found = self.mean("documents")
        return found.value if found else 0.0

    def mean(self, name: str) -> Mean | None:
        """Over seeds. The accuracy of a single seed has the binomial error of its answers, which says nothing where
        all of them are right, or none is."""
        found = mean(figure(row, name) for row in self.rows.values())
        if found is None or found.n > 1 or name != "accuracy":
            return found
        counts = [figure(r, "accuracy_n") for r in self.rows.values() if figure(r, name) is not None]
        if not counts[0] or found.value in (0.0, 1.0):
            return found
        p, n = found.value, int(counts[0])
        return Mean(p, math.sqrt(max(0.0, p * (1 - p)) / max(1, n - 1)), n, "answers")

    def spent(self, *names: str) -> Mean | None:
        """Figures summed over everything this model cost: EM's iterations and their warm start included."""
        return mean(self._spent(seed, names) for seed in self.rows)

    def _spent(self, seed: Any, names: tuple[str, ...]) -> float | None:
        total = 0.0
        for line in (*self.history, self):
            values = [figure(line.rows.get(seed, {}), name) for name in names]
            if all(v is None for v in values):
                return None
            total += sum(v for v in values if v is not None)
        return total


@dataclass(frozen=True, slots=True)
class Results:
    run: dict[str, Any]
    rows: list[Row]
    recipe: dict[str, Any]
    recipe_text: str

    @property
    def seeds(self) -> list[Any]:
        return list(dict.fromkeys(row.get("seed") for row in self.rows))

    @property
    def bounds(self) -> list[str]:
        """The K of the reported bounds, smallest first."""
        found = {k for row in self.rows for k in row.get("bound_per_token") or {}}
        return sorted(found, key=lambda k: (len(k), k))

    def loop(self, method: str, samples: int) -> list[Line]:
        """The iterations of one EM run, in order; each knows its warm start and what came before."""
        return self._iterations([r for r in self._own if r.get("method") == method and _samples(r) == samples])

    def variant(self, name: str) -> list[Line]:
        """The iterations of EM with other settings."""
        return self._iterations([r for r in self.rows if r.get("variant") == name])

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(r["variant"] for r in self.rows if r.get("variant")))

    @property
    def cells(self) -> list[Line]:
        """Runs on other documents: the models of their baselines, by the number of documents."""
        names = dict.fromkeys((r["cell"], str(r["method"])) for r in self.rows if r.get("cell"))
        return sorted((self.cell(*name) for name in names), key=lambda line: line.documents)

    def cell(self, name: str, method: str | None = None) -> Line:
        rows = [r for r in self.rows if r.get("cell") == name and r.get("method") == (method or r.get("method"))]
        return Line(str(rows[0]["method"]) if rows else "", 0, 0, {r.get("seed"): r for r in rows})

    @property
    def _own(self) -> list[Row]:
        return [r for r in self.rows if not r.get("variant") and not r.get("cell")]

    def _iterations(self, rows: list[Row]) -> list[Line]:
        warm_start = self.single("warm_start")
        history = (warm_start,) if warm_start else ()
        lines: list[Line] = []
        for number in sorted({_iteration(r) for r in rows}):
            seeds = {r.get("seed"): r for r in rows if _iteration(r) == number}
            first = rows[0]
            lines.append(Line(str(first["method"]), number, _samples(first), seeds, (*history, *lines)))
        return lines

    def single(self, method: str) -> Line | None:
        """The line of a method without iterations."""
        rows = {r.get("seed"): r for r in self._own if r.get("method") == method}
        return Line(method, 0, 0, rows) if rows else None

    def samples(self, method: str) -> list[int]:
        """Every K that an EM method was run with."""
        return sorted({_samples(r) for r in self._own if r.get("method") == method})

    def main_samples(self, method: str) -> int | None:
        """The K of the run itself, not of its comparison of several K; None where there is no such run."""
        there = self.samples(method)
        preset = PRESETS["paper"] if method == "em_paper" else self.recipe.get("sample") or {}
        return preset["k"] if preset.get("k") in there else max(there, default=None)

    def main(self, method: str) -> list[Line]:
        samples = self.main_samples(method)
        return [] if samples is None else self.loop(method, samples)

    def final(self, method: str) -> Line | None:
        """A method's last model."""
        if method not in LOOPS:
            return self.single(method)
        return next(reversed(self.main(method)), None)

    @property
    def methods(self) -> list[str]:
        """In the order of METHODS; methods that this page does not know come last."""
        there = dict.fromkeys(str(r.get("method")) for r in self._own)
        return [m for m in METHODS if m in there] + [m for m in there if m not in METHODS]

    @property
    def has_sample_comparison(self) -> bool:
        return any(len(self.samples(method)) > 1 for method in LOOPS)


def _samples(row: Row) -> int:
    return int(row.get("samples") or 0)


def _iteration(row: Row) -> int:
    return int(row.get("iteration") or 0)


def load(folder: Path) -> Results:
    """Raises UserError where there is no results.json, or it is not one of ours."""
    import yaml

    path = folder / "results.json"
    if not path.exists():
        raise UserError(
            f"{folder} holds no results.json: latent-thoughts em, demo and experiment write it at their end; where you "
            "go stage by stage, latent-thoughts evaluate shows the figures of an iteration"
        )
    found = read_json(path)
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} holds no rows: it was not written by latent-thoughts")
    recipe = folder / "recipe.yaml"
    text = content(recipe).decode("utf-8", "replace") if recipe.exists() else ""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None  # the page shows the text as it is; only the run's own K is read from it
    return Results(found.get("run") or {}, rows, values if isinstance(values, dict) else {}, text)
