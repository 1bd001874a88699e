"""Results of tasks as tables: Markdown for files, rich for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from latent_thoughts.config.evaluate import how
from latent_thoughts.stages.evaluate.compare import Comparison, Model
from latent_thoughts.stages.evaluate.repeated import shown as repeated
from latent_thoughts.stages.evaluate.statistics import SIGNIFICANT

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


def share(figure: dict[str, Any]) -> str:
    """A share in percent with its standard error."""
    error = "" if figure["se"] is None else f" ± {100 * figure['se']:.1f}"
    return f"{100 * figure['value']:.1f}{error} %"


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


def tasks_table(evaluations: Iterable[dict[str, Any]]) -> Table:
    return _table(
        "Tasks", HEADS, lines(evaluations), "± is the standard error over questions, and seeds where there are several."
    )


def places_table(counts: dict[str, Any]) -> Table:
    """Where in the documents thinking helps, by the largest K that was drawn."""
    names = [name for name in counts if name.endswith("_by_place")]
    last = max(names, key=lambda name: int(name.split("_")[1]))
    rows = []
    for p in counts[last]:
        error = "" if p["se"] is None else f" ± {p['se']:.3f}"
        rows.append([f"{p['from']:.0%} to {p['to']:.0%}", str(p["chunks"]), f"{p['gain_per_token']:+.3f}{error}"])
    k = last.split("_")[1]
    note = f"L_{k} − log p(x | c), nats a token, by where a chunk begins in its document."
    return _table("Gain of thinking", ("place", "chunks", "gain"), rows, note)


def comparison_tables(models: Sequence[Model], found: Sequence[Comparison]) -> list[Table]:
    """Every model with its figures, and every pair's difference with its verdict. Models go by letters."""
    letters = {m.name: chr(ord("A") + n) for n, m in enumerate(models)}
    figures = []
    for m in models:
        of_model = [[*key, str(f["n"]), str(f["seeds"]), share(f)] for key, f in m.figures.items()]
        figures += [[letters[m.name], m.name, *cells] for cells in of_model or [[""] * 5]]
    rows = []
    for c in found:
        d, unit = c.difference, 1 if c.lower else 100
        gap = f"{unit * d.value:+.3g} ({unit * d.low:+.3g} to {unit * d.high:+.3g})"
        better = "no difference shown" if c.better is None else f"{letters[c.better]} is better"
        pair = f"{letters[c.first]} − {letters[c.second]}"
        rows.append([c.task, pair, str(d.n), gap, f"{d.p:.2g}", f"{c.adjusted:.2g}", better])
    tests = ", ".join(dict.fromkeys(c.difference.test for c in found))
    note = f"Points of accuracy, or bits per byte (lower is better), with 95 % intervals. p: {tests}; adjusted: false "
    note += f"discovery rate; a difference is called real below {SIGNIFICANT}. Unless p is Welch's, training seeds are "
    note += "held fixed: it tells of other questions and texts, not of models that are trained anew. Welch's p "
    note += "tells of these, on the same questions."
    for c in found:
        if any(c.unfinished):
            first, second = letters[c.first], letters[c.second]
            note += (
                f"\n{first} − {second}: of {c.unfinished[0]} chunks no thought of {first} ended, of {c.unfinished[1]} "
                f"none of {second}; they count with the bound of the empty thought."
            )
    heads = ("what", "models", "n", "difference", "p", "adjusted", "verdict")
    shown = _table("Models", ("", "model", "task", "form", "n", "seeds", "accuracy"), figures, "")
    return [shown, _table("Differences", heads, rows, note)]


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> Table:
    table = Table(title=title, caption=note, title_justify="left", caption_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
