"""Results of tasks as tables: Markdown for files, rich for the terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from latent_thoughts.config.evaluate import how
from latent_thoughts.stages.evaluate.compare import Comparison, Model
from latent_thoughts.stages.evaluate.repeated import shown as repeated
from latent_thoughts.stages.evaluate.statistics import SIGNIFICANT
from latent_thoughts.terminal import Grid, bound_name, figure, minus, percent

HEADS = (
    "task",
    "form",
    "thought tokens",
    "n",
    "samples",
    "seeds",
    "accuracy",
    "vote",
    "pass@k",
    "repeated in training",
)


def lines(evaluations: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    """One line a task, form and budget."""
    for e in evaluations:
        for r in e["results"]:
            yield [
                e["name"],
                how(e),
                "" if r["budget"] is None else f"≤ {r['budget']} ({r['thought_tokens']:.0f})",
                str(r["accuracy"]["n"]),
                str(e["samples"]),
                str(r["accuracy"]["seeds"]),
                share(r["accuracy"]),
                share(r["majority"]) if "majority" in r else "",
                ", ".join(f"{k}: {share(v)}" for k, v in r.get("pass_at", {}).items()),
                repeated(e["contamination"]),
            ]


def share(found: dict[str, Any]) -> str:
    """A share in percent with its standard error."""
    return percent(found["value"], found["se"])


def markdown(evaluations: Iterable[dict[str, Any]]) -> str:
    rows = [HEADS, ["---"] * len(HEADS), *lines(evaluations)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def curve(evaluation: dict[str, Any], path: Path) -> None:
    """Draws accuracy against the budget of thought tokens, with standard errors, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure((5.1, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="Thought tokens allowed", ylabel="Accuracy, %", title=evaluation["name"])
    lines = {"accuracy": "accuracy", "majority": "majority vote"}
    for name, label in lines.items():
        points = [(r["budget"], r[name]) for r in evaluation["results"] if name in r]
        if points:
            budgets, values = zip(*points, strict=True)
            errors = [100 * (v["se"] or 0) for v in values]
            axes.errorbar(budgets, [100 * v["value"] for v in values], errors, marker="o", capsize=2, label=label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})


def tasks_table(evaluations: Iterable[dict[str, Any]]) -> Grid:
    note = "± is the standard error over questions, and seeds where there are several."
    drop = ("pass@k", "repeated in training", "samples", "seeds", "vote")
    return Grid(HEADS, [*lines(evaluations)], words=("task", "form"), drop=drop, title="Tasks", notes=[note])


def places_table(counts: dict[str, Any]) -> Grid:
    """Where in the documents thinking helps, by the largest K that was drawn."""
    names = [name for name in counts if name.endswith("_by_place")]
    last = max(names, key=lambda name: int(name.split("_")[1]))
    rows = []
    for p in counts[last]:
        error = "" if p["se"] is None else f" ± {p['se']:.3f}"
        gain = minus(f"{p['gain_per_token']:+.3f}") + error
        rows.append([f"{p['from']:.0%} to {p['to']:.0%}", f"{p['chunks']:,}", gain])
    bound = bound_name(last.split("_")[1])
    note = f"{bound} − log p(x | c), nats a token, by where a chunk begins in its document."
    return Grid(("place", "chunks", "gain"), rows, title="Gain of thinking", notes=[note])


def comparison_tables(models: Sequence[Model], found: Sequence[Comparison]) -> list[Grid]:
    """Every model with its figures, and every pair's difference with its verdict. Models go by letters."""
    letters = {m.name: chr(ord("A") + n) for n, m in enumerate(models)}
    return [_models(models, letters), _differences(found, letters)]


def _models(models: Sequence[Model], letters: dict[str, str]) -> Grid:
    # commonpath would make s3:/ of s3://, and a name that is cut short ends with the last folder that is whole
    folder = os.path.commonprefix([m.name for m in models]).rpartition("/")[0]  # noqa: RUF071
    rows = []
    for m in models:
        of_model = [[*key, f"{f['n']:,}", str(f["seeds"]), share(f)] for key, f in m.figures.items()]
        shown = m.name.removeprefix(f"{folder}/") if folder else m.name
        rows += [[letters[m.name], shown, *cells] for cells in of_model or [[""] * 5]]
    heads = ("", "model", "task", "form", "n", "seeds", "accuracy")
    title = f"Models in {folder}" if folder else "Models"
    return Grid(heads, rows, words=("model", "task", "form"), drop=("seeds", "form"), title=title)


def _differences(found: Sequence[Comparison], letters: dict[str, str]) -> Grid:
    rows = []
    for c in found:
        d, (gap, unit) = c.difference, (_signed, "bits/byte") if c.lower else (_points, "points")
        gaps = f"{gap(d.value)} {unit}", f"{gap(d.low)} to {gap(d.high)}"
        better = "no difference shown" if c.better is None else f"{letters[c.better]} is better"
        pair = f"{letters[c.first]} − {letters[c.second]}"
        what = re.sub(r"L_(\d+)", lambda bound: bound_name(bound[1]), c.task)
        rows.append([what, pair, f"{d.n:,}", *gaps, _chance(d.p), _chance(c.adjusted), better])
    tests = ", ".join(dict.fromkeys(c.difference.test for c in found))
    notes = [
        f"Points of accuracy, or bits per byte (lower is better). p: {tests}; adjusted: false discovery rate; "
        f"a difference is called real below {SIGNIFICANT}. Unless p is Welch's, training seeds are "
        "held fixed: it tells of other questions and texts, not of models that are trained anew. Welch's p "
        "tells of these, on the same questions."
    ]
    for c in found:
        if any(c.unfinished):
            first, second = letters[c.first], letters[c.second]
            notes.append(
                f"{first} − {second}: of {c.unfinished[0]} chunks no thought of {first} ended, of {c.unfinished[1]} "
                f"none of {second}; they count with the bound of the empty thought."
            )
    heads = ("what", "models", "n", "difference", "95 % interval", "p", "adjusted", "verdict")
    drop = ("p", "n", "adjusted", "95 % interval")
    return Grid(heads, rows, words=("what", "verdict"), drop=drop, title="Differences", notes=notes)


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "") + figure(value + 0.0)  # without the sign of −0.0


def _points(share: float) -> str:
    return minus(f"{100 * share + 0.0:+.1f}")


def _chance(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"
