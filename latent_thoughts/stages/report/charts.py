"""What is drawn: every chart as plain data.

Colours are one a method, told apart by colour-blind readers, light enough for a dark page and dark
enough for a white one; dashes tell lines apart without colour.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from latent_thoughts.stages.report import svg
from latent_thoughts.stages.report.summary import LOOPS, Line, Mean, Results, bound_name

COLOURS = {
    "raw_tokens": "#66707b",
    "raw_flops": "#66707b",
    "wrap_baseline": "#7a5cc0",
    "wrap_cot": "#7a5cc0",
    "warm_start": "#0b7f5f",
    "warm_start_matched": "#b0458a",
    "em_paper": "#b95f00",
    "em": "#1f6fd0",
    "oracle": svg.INK,
}
DASHES = {
    "raw_flops": (0, (1, 2)),
    "wrap_cot": (0, (1, 2)),
    "oracle": (0, (1, 2)),
    "warm_start": (0, (5, 3)),
    "em_paper": (0, (6, 2)),
}
SHORT = {
    "raw_tokens": "raw, same tokens",
    "raw_flops": "raw, same compute",
    "wrap_baseline": "paraphrases",
    "wrap_cot": "paraphrases, reasoned",
    "warm_start": "warm start",
    "warm_start_matched": "warm start, longer",
    "em_paper": "EM, paper’s",
    "em": "EM",
    "oracle": "oracle thoughts",
}


@dataclass(frozen=True, slots=True)
class Series:
    """A line over x with its error; `seeds` are thin lines behind it."""

    label: str
    colour: str
    points: list[tuple[float, Mean]]
    seeds: list[list[tuple[float, float]]] = field(default_factory=list)
    dash: Any = "-"
    marker: str = "o"


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line: a model without iterations."""

    label: str
    colour: str
    value: float
    dash: Any = "-"


@dataclass(frozen=True, slots=True)
class Chart:
    name: str
    title: str
    caption: str
    series: list[Series]
    levels: list[Level]
    share: bool = True  # a share is shown in percent, from 0 to 100
    x: str = "EM iteration"


def charts(results: Results) -> list[Chart]:
    """All charts that the results have figures for."""
    band = "Bands: standard error; thin lines: single seeds." if len(results.seeds) > 1 else "Bands: standard error."
    found = [
        _answers(results, "accuracy", "Held-out answers", f"Share of right answers. {band}"),
        _answers(results, "accuracy_known", "Known facts only", "Every fact the question needs was in the warm start."),
        _answers(
            results, "accuracy_unknown", "Needs an unknown fact", "At least one fact was never in a given thought."
        ),
        _likelihood(results),
        _health_shares(results),
        _health_draws(results),
        _by_samples(results),
    ]
    return [chart for chart in found if chart.series or chart.levels]


def _series(line: list[Line], metric: str, label: str, colour: str, **look: Any) -> Series | None:
    points = [(float(part.iteration), m) for part in line if (m := part.mean(metric))]
    seeds = [
        [(x, v) for x, v in ((float(p.iteration), _one(p, metric, seed)) for p in line) if v is not None]
        for seed in (line[-1].rows if line else [])
    ]
    return Series(label, colour, points, seeds, **look) if points else None


def _one(line: Line, metric: str, seed: Any) -> float | None:
    found = Line(line.method, line.iteration, line.samples, {seed: line.rows.get(seed, {})}).mean(metric)
    return found.value if found else None


def _path(results: Results, method: str) -> list[Line]:
    """An EM run with its warm start as iteration 0."""
    loop = results.main(method)
    return [*loop[0].history, *loop] if loop else []


def _answers(results: Results, metric: str, title: str, caption: str) -> Chart:
    looks = {"em": {}, "em_paper": {"dash": DASHES["em_paper"], "marker": "s"}}
    series = [_series(_path(results, m), metric, SHORT[m], COLOURS[m], **looks[m]) for m in LOOPS]
    return Chart(metric, title, caption, [s for s in series if s], _levels(results, metric))


def _levels(results: Results, metric: str) -> list[Level]:
    found = []
    for method in results.methods:
        line = results.single(method)
        if method not in LOOPS and method in SHORT and line and (m := line.mean(metric)):
            found.append(Level(SHORT[method], COLOURS[method], m.value, DASHES.get(method, "-")))
    return found


def _likelihood(results: Results) -> Chart:
    series: list[Series | None] = []
    top = results.bounds[-1] if results.bounds else "1"
    for method in LOOPS:
        path, colour = _path(results, method), COLOURS[method]
        name = SHORT[method]
        for k in results.bounds:
            if method == "em" or k == top:
                dash = "-" if k == top else (0, (5, 2))
                series.append(_series(path, f"bound_per_token.{k}", f"{name}, {bound_name(k)}", colour, dash=dash))
        if method == "em":
            without = _series(path, "nll_per_token", f"{name}, no thought", colour, dash=(0, (1, 1.5)), marker="")
            series.append(_negative(without) if without else None)
    levels = [Level(v.label, v.colour, -v.value, v.dash) for v in _levels(results, "nll_per_token") if "raw" in v.label]
    levels += [v for v in _levels(results, f"bound_per_token.{top}") if v.label == SHORT["oracle"]]
    caption = "Nats per token, higher is better. L₄: the bound with 4 thoughts. It can rise while answers get worse."
    return Chart("bound", "Likelihood of held-out text", caption, [s for s in series if s], levels, share=False)


def _negative(series: Series) -> Series:
    points = [(x, Mean(-m.value, m.error, m.n, m.over)) for x, m in series.points]
    seeds = [[(x, -y) for x, y in line] for line in series.seeds]
    return Series(series.label, series.colour, points, seeds, series.dash, series.marker)


def _health_shares(results: Results) -> Chart:
    path = results.main("em") or results.main("em_paper")
    parts = [
        ("accepted", "accepted", COLOURS["em"], "-"),
        ("thought_correct_chosen", "correct, chosen", COLOURS["warm_start"], "-"),
        ("thought_correct_sampled", "correct, sampled", COLOURS["warm_start"], (0, (4, 2))),
        ("unfinished", "unfinished", COLOURS["raw_tokens"], (0, (1, 1.5))),
    ]
    series = [_series(path, metric, label, colour, dash=dash) for metric, label, colour, dash in parts]
    caption = "Texts whose thought was accepted; draws that equal the data’s own thought; draws that found no end."
    return Chart("health_shares", "Health of the E-step: shares", caption, [s for s in series if s], [])


def _health_draws(results: Results) -> Chart:
    path = results.main("em") or results.main("em_paper")
    parts = [("ess", "effective", COLOURS["em"], "-"), ("distinct", "distinct", COLOURS["em_paper"], (0, (4, 2)))]
    series = [s for metric, label, c, d in parts if (s := _series(path, metric, label, c, dash=d))]
    levels = [Level("drawn (K)", svg.INK, path[-1].samples, (0, (1, 2)))] if series else []
    caption = "Of K draws a text, how many differ, and how many count (effective sample size of the weights)."
    return Chart("health_draws", "Health of the E-step: draws", caption, series, levels, share=False)


def _by_samples(results: Results) -> Chart:
    series = []
    for method in LOOPS:
        finals = [results.loop(method, k)[-1] for k in results.samples(method)]
        points = [(float(line.samples), m) for line in finals if (m := line.mean("accuracy"))]
        if len(points) > 1:
            dash, marker = (DASHES["em_paper"], "s") if method == "em_paper" else ("-", "o")
            series.append(Series(SHORT[method], COLOURS[method], points, [], dash, marker))
    caption = "Share of right answers after the last iteration. ± standard error."
    return Chart("samples", "More thoughts per text", caption, series, [], x="K, thoughts sampled for each text")
