"""Accuracy and likelihood as curves: against the iteration, the tokens and the time that were spent, and K."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from latent_thoughts.stages.report.charts import Chart, Level, Series
from latent_thoughts.stages.report.methods import DOTTED, METHODS, of
from latent_thoughts.stages.report.summary import LOOPS, Line, Mean, Results
from latent_thoughts.terminal import bound_name


@dataclass(frozen=True, slots=True)
class Axis:
    """What a curve is drawn against. Where models without iterations have a place on it they are points."""

    name: str
    label: str
    place: Callable[[Line], float | None]
    points: bool = True


def _spent(unit: float, *names: str) -> Callable[[Line], float | None]:
    def place(line: Line) -> float | None:
        found = line.spent(*names)
        return None if found is None else found.value / unit

    return place


# Of bounds with several K, which have one colour: the largest K first.
LOOKS = (("-", "o"), ((0, (5, 2)), "s"), ((0, (2, 1)), "D"), ((0, (6, 2, 1, 2)), "^"), ((0, (8, 1)), "v"))
ITERATION = Axis("iteration", "EM iteration", lambda line: float(line.iteration), points=False)
DOCUMENTS = Axis("documents", "Documents", lambda line: line.documents or None)
SAMPLES = Axis("samples", "K, thoughts sampled for each text", lambda line: float(line.samples), points=False)


def axes(results: Results) -> list[Axis]:
    """Tokens and time in the unit that suits the run."""
    finals = [line for m in results.methods if (line := results.final(m))]
    tokens = max((m.value for line in finals if (m := line.spent("train_tokens"))), default=0)
    seconds = max((m.value for line in finals if (m := line.spent("seconds.sample", "seconds.train"))), default=0)
    size, unit = (1e9, "billions") if tokens >= 2e9 else (1e6, "millions") if tokens >= 2e5 else (1e3, "thousands")
    period, name = (3600.0, "hours") if seconds >= 7200 else (60.0, "minutes") if seconds >= 120 else (1.0, "seconds")
    return [
        ITERATION,
        Axis("tokens", f"Tokens trained on, in {unit}, from the warm start on", _spent(size, "train_tokens")),
        Axis(
            "time",
            f"Sampling and training, {name} from the warm start on",
            _spent(period, "seconds.sample", "seconds.train"),
        ),
    ]


def curves(results: Results) -> list[Chart]:
    band = "Bands: standard error; thin lines: single seeds." if len(results.seeds) > 1 else "Bands: standard error."
    right = f"Share of right answers on held-out questions. {band}"
    known = "Every fact the question needs was in the warm start."
    unknown = "At least one fact was never in a given thought."
    found = []
    for axis in axes(results):
        found += [_answers(results, axis, "accuracy", "Held-out answers", right), _likelihood(results, axis)]
    found += [_by_samples(results, "accuracy", "Held-out answers", f"After the last iteration. {band}")]
    if results.bounds:
        k = results.bounds[-1]
        title, caption = "Likelihood of held-out text", f"{bound_name(k)} after the last iteration, nats per token."
        found.append(_by_samples(results, f"bound_per_token.{k}", title, caption))
    found.append(_by_documents(results))
    found.append(_answers(results, ITERATION, "accuracy_known", "Known facts only", known))
    found.append(_answers(results, ITERATION, "accuracy_unknown", "Needs an unknown fact", unknown))
    return found


def series(
    line: list[Line], metric: str, label: str, colour: str, axis: Axis = ITERATION, **look: Any
) -> Series | None:
    """A metric of a method's models as a curve; None where none has it."""
    placed = [(x, part) for part in line if (x := axis.place(part)) is not None]
    points = [(x, m) for x, part in placed if (m := part.mean(metric))]
    seeds = [
        [(x, v) for x, v in ((x, _one(part, metric, seed)) for x, part in placed) if v is not None]
        for seed in (line[-1].rows if line else [])
    ]
    return Series(label, colour, points, seeds, **look) if points else None


def _one(line: Line, metric: str, seed: Any) -> float | None:
    found = Line(line.method, line.iteration, line.samples, {seed: line.rows.get(seed, {})}).mean(metric)
    return found.value if found else None


def path(results: Results, method: str) -> list[Line]:
    """An EM run with its warm start as iteration 0."""
    loop = results.main(method)
    return [*loop[0].history, *loop] if loop else []


def _name(metric: str, axis: Axis) -> str:
    metric = "bound" if metric.startswith("bound") else metric
    return metric if axis is ITERATION else f"{metric}_by_{axis.name}"


def _answers(results: Results, axis: Axis, metric: str, title: str, caption: str) -> Chart:
    found = [_main(path(results, method), method, metric, axis) for method in LOOPS]
    levels, points = _singles(results, metric, axis)
    shown = [s for s in (*points, *found) if s]
    group = axis.name if metric == "accuracy" else "known"
    return Chart(_name(metric, axis), group, title, caption, shown, levels, x=axis.label)


def _main(line: list[Line], method: str, metric: str, axis: Axis) -> Series | None:
    look = of(method)
    return series(line, metric, look.short, look.colour, axis, dash=look.dash, marker=look.marker)


def _singles(results: Results, metric: str, axis: Axis) -> tuple[list[Level], list[Series]]:
    """Models without iterations: horizontal lines, or points where they have a place on the axis."""
    levels, points = [], []
    for method in results.methods:
        line, look = results.single(method), of(method)
        if method in LOOPS or method not in METHODS or line is None or (m := line.mean(metric)) is None:
            continue
        if not axis.points:
            levels.append(Level(look.short, look.colour, m.value, look.dash, look.marker))
        elif method != "warm_start" or not any(results.main(loop) for loop in LOOPS):  # else a curve begins there
            found = _main([line], method, metric, axis)
            points += [found] if found else []
    return levels, points


def _likelihood(results: Results, axis: Axis) -> Chart:
    top = results.bounds[-1] if results.bounds else "1"
    found: list[Series | None] = []
    for method in LOOPS:
        line, look = path(results, method), of(method)
        all_k = method == "em" and axis is ITERATION
        looks = zip(reversed(results.bounds), itertools.cycle(LOOKS)) if all_k else [(top, (look.dash, look.marker))]
        for k, (dash, marker) in looks:
            label = f"{look.short}, {bound_name(k)}"
            found.append(series(line, f"bound_per_token.{k}", label, look.colour, axis, dash=dash, marker=marker))
        if all_k:
            without = series(line, "nll_per_token", f"{look.short}, no thought", look.colour, dash=DOTTED, marker="x")
            found.append(_negative(without) if without else None)
    levels, points = _singles(results, f"bound_per_token.{top}", axis)
    shown = ("raw", "oracle")
    levels = [level for level in levels if level.label.startswith(shown)]
    points = [point for point in points if point.label.startswith(shown)]
    caption = (
        f"Nats per token, higher is better. {bound_name(top)}: the bound with {top} thoughts; of raw models, their "
        "likelihood. It can rise while answers get worse."
    )
    lines = [s for s in (*points, *found) if s]
    title = "Likelihood of held-out text"
    return Chart(_name("bound", axis), axis.name, title, caption, lines, levels, share=False, x=axis.label)


def _negative(line: Series) -> Series:
    points = [(x, Mean(-m.value, m.error, m.n, m.over)) for x, m in line.points]
    seeds = [[(x, -y) for x, y in seed] for seed in line.seeds]
    return Series(line.label, line.colour, points, seeds, line.dash, line.marker)


def _by_samples(results: Results, metric: str, title: str, caption: str) -> Chart:
    found = []
    for method in LOOPS:
        line = _main([results.loop(method, k)[-1] for k in results.samples(method)], method, metric, SAMPLES)
        if line and len(line.points) > 1:
            found.append(line)
    share = metric == "accuracy"
    name, label = _name(metric, SAMPLES), SAMPLES.label
    return Chart(name, "samples", title, caption, found, share=share, x=label, log=True)


def _by_documents(results: Results) -> Chart:
    """Raw text of more and more documents, and where EM ends with those it had."""
    line = series(results.cells, "accuracy", "raw text", of("raw").colour, DOCUMENTS)
    own = results.final("em") if line else None
    level = own.mean("accuracy") if own else None
    levels = [Level(f"EM on {own.documents:,.0f}", of("em").colour, level.value)] if own and level else []
    title, caption = "How much raw text it would take", "Share of right answers of raw text alone, by its documents."
    name, label = "accuracy_by_documents", DOCUMENTS.label
    return Chart(name, "known", title, caption, [line] if line else [], levels, x=label, log=True)
