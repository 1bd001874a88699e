"""Figures that are no curves of accuracy: what a run cost by part, the health of its E-steps, results of tasks."""

from __future__ import annotations

from collections.abc import Sequence

from latent_thoughts.stages.report.charts import Bars, Chart, Dots, Figure, Level
from latent_thoughts.stages.report.curves import curves, path, series
from latent_thoughts.stages.report.methods import DOTTED, INK, PALETTE, of
from latent_thoughts.stages.report.summary import LOOPS, Results
from latent_thoughts.stages.report.tasks import Task, tasks

PARTS = (("sample", "sampling", PALETTE["em"]), ("train", "training", PALETTE["second"]),
         ("evaluate", "evaluation", PALETTE["raw"]))  # fmt: skip


def figures(results: Results) -> list[Figure]:
    """All figures that the results have something for."""
    asked = tasks(results)
    found = [*curves(results), _variants(results), *_tasks(asked), *budgets(asked), _cost(results), *_health(results)]
    return [figure for figure in found if not figure.empty]


def _variants(results: Results) -> Dots:
    """Accuracy after the last iteration, with the recipe's settings and with one of them changed."""
    found = []
    if results.variants and (own := results.final("em")):
        lines = [("as the recipe says", PALETTE["em"], own)]
        lines += [(name.replace("_", " "), INK, results.variant(name)[-1]) for name in results.variants]
        found = [(label, colour, m) for label, colour, line in lines if (m := line.mean("accuracy"))]
    caption = "Share of right answers after the last iteration, with its standard error; one setting changed at a time."
    blocks = [("EM with other settings", found)] if found else []
    return Dots("variants", "variants", "One setting changed at a time", caption, blocks)


def _cost(results: Results) -> Bars:
    """Seconds of every method by part, means over seeds."""
    rows = []
    for method in results.methods:
        line = results.final(method)
        if line is None:
            continue
        amounts = [(label, c, m.value if (m := line.spent(f"seconds.{key}")) else 0.0) for key, label, c in PARTS]
        if any(amount for *_, amount in amounts):
            rows.append((of(method).short, amounts))
    slow = max((sum(a for *_, a in amounts) for _, amounts in rows), default=0)
    period, unit = (3600.0, "hours") if slow >= 7200 else (60.0, "minutes") if slow >= 120 else (1.0, "seconds")
    rows = [(label, [(part, c, a / period) for part, c, a in amounts]) for label, amounts in rows]
    caption = f"{unit.capitalize()} a seed; of EM, with the warm start and all iterations."
    return Bars("cost", "health", "What it cost, by part", caption, rows, unit)


def _health(results: Results) -> list[Chart]:
    method = next((m for m in reversed(LOOPS) if results.main(m)), None)
    line = path(results, method) if method else []
    shares = [
        ("accepted", "accepted", PALETTE["em"], "-"),
        ("thought_correct_chosen", "data’s own, chosen", PALETTE["given"], "-"),
        ("thought_correct_sampled", "data’s own, sampled", PALETTE["given"], (0, (4, 2))),
        ("unfinished", "unfinished", PALETTE["raw"], DOTTED),
    ]
    draws = [("ess", "effective", PALETTE["em"], "-"), ("distinct", "distinct", PALETTE["second"], (0, (4, 2)))]

    def chart(name: str, title: str, caption: str, parts: Sequence[tuple[str, str, str, object]], share: bool) -> Chart:
        found = [series(line, metric, label, colour, dash=dash) for metric, label, colour, dash in parts]
        return Chart(name, "health", title, caption, [s for s in found if s], share=share)

    caption = "Texts whose thought was accepted; draws that equal the data’s own thought; draws that found no end."
    first = chart("health_shares", "Shares of thoughts", caption, shares, True)
    caption = "Of K draws a text, how many differ, and how many count (effective sample size of the weights)."
    second = chart("health_draws", "Draws that count", caption, draws, False)
    if second.series:
        second.levels.append(Level("drawn (K)", INK, line[-1].samples, DOTTED))
    gain = [("gain_per_token", "gain", PALETTE["em"], "-")]
    caption = "How much likelier the accepted thoughts make their text, nats per token of it."
    return [first, second, chart("health_gain", "Gain of accepted thoughts", caption, gain, False)]


def _tasks(asked: list[Task]) -> list[Dots]:
    """The largest budget of every task, a row a model."""
    blocks = []
    for task in asked:
        rows = [(e.name, e.colour, e.results[-1].accuracy) for e in task.models if e.results]
        if rows:
            blocks.append((task.title, rows))
    return [Dots("tasks", "tasks", "Tasks", "Accuracy, with its standard error over questions and seeds.", blocks)]


def budgets(asked: list[Task]) -> list[Chart]:
    """Accuracy against thought tokens, for tasks that were asked with several budgets."""
    found = []
    for n, task in enumerate(asked):
        lines = [line for model in task.models if (line := model.curve())]
        name, caption = f"budget_{n}_{task.slug}", "Accuracy against the thought tokens a model may spend."
        found.append(Chart(name, "tasks", task.title, caption, lines, x="Thought tokens allowed"))
    return found
