"""The figures as SVG and PNG: thin frame, light grid, names beside the lines' ends instead of a legend."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_thoughts.stages.report import svg
from latent_thoughts.stages.report.charts import Bars, Chart, Dots, Figure, Series
from latent_thoughts.stages.report.methods import INK, PALETTE
from latent_thoughts.stages.report.parts import figures
from latent_thoughts.stages.report.summary import Results
from latent_thoughts.store import atomic

SIZE = (5.1, 3.4)  # inches; small on purpose: at the width of the page's columns its text is as large as the page's
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": INK,
    "lines.solid_capstyle": "round",
    "lines.dash_capstyle": "butt",
}
GAP = 0.072  # between two labels, as a share of the axes' height
MUTED = 0.72
LONGEST = 30  # characters of a name
GLYPHS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "x": "×"}  # markers, before the names of their lines
NAMED = 0.154  # of the figure's width, for the name of a part
FEW = 0.25  # shares that are all below have a scale of their own
MANY = 8  # iterations that have a tick each
LEFT, RIGHT = 0.095, 0.36  # of the figure's width, for the scale (at least) and for the names


@dataclass(frozen=True, slots=True)
class Drawn:
    """A finished figure for the page."""

    name: str
    group: str
    title: str
    caption: str
    svg: str


def write_figures(results: Results, folder: Path) -> list[Drawn]:
    """Writes every chart as SVG (transparent) and PNG (white)."""
    import matplotlib

    found = []
    for chart in figures(results):
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": chart.name}):
            figure, text = draw(chart), io.StringIO()
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
            with atomic(folder / f"{chart.name}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=200, facecolor="white")
            with atomic(folder / f"{chart.name}.svg") as temporary:
                temporary.write_text(svg.standalone(text.getvalue()), encoding="utf-8")
        embedded = svg.embedded(text.getvalue(), f"Chart: {chart.title}. {chart.caption}", PALETTE)
        found.append(Drawn(chart.name, chart.group, chart.title, chart.caption, embedded))
    return found


def _name(text: str) -> dict[str, Any]:
    """A name as text, not as a formula; a model's may be a path."""
    return {"s": _cut(text), "parse_math": False}


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST else f"…{name[-LONGEST:]}"


def draw(chart: Figure) -> Any:
    """A matplotlib figure."""
    if isinstance(chart, Bars):
        return _bars(chart)
    return _dots(chart) if isinstance(chart, Dots) else _lines(chart)


def _empty(chart: Figure, height: float = SIZE[1]) -> tuple[Any, Any]:
    """A figure with its title, and axes whose margins are the same in inches whatever its height."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(SIZE[0], height))
    below, above = 0.44 / height, 0.39 / height
    left = LEFT if isinstance(chart, Chart) else 0.30
    right = RIGHT if isinstance(chart, Chart) else 0.13
    axes = figure.add_axes((left, below, 1 - left - right, 1 - below - above))
    figure.text(0.012, 1 - 0.155 / height, chart.title, fontsize=11, fontweight="bold", va="center")
    return figure, axes


def _fit(figure: Any, axes: Any, before: Sequence[Any], behind: Sequence[Any] = ()) -> None:
    """Narrows the axes where the names before them, or the scale's figures, or the names behind need more room."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer, place = FigureCanvasAgg(figure).get_renderer(), axes.get_position()

    def widest(names: Sequence[Any]) -> float:
        return max((name.get_window_extent(renderer).width for name in names), default=0.0) / figure.bbox.width

    left, right = max(place.x0, widest(before) + 0.03), min(place.x1, 1 - widest(behind) - 0.03)
    axes.set_position((left, place.y0, right - left, place.height))


def _lines(chart: Chart) -> Any:
    figure, axes = _empty(chart)
    labels = [(level.value, level.label, level.colour, level.marker) for level in chart.levels]
    for level in chart.levels:
        axes.plot([0, 1], [level.value] * 2, transform=axes.get_yaxis_transform(), color=level.colour, zorder=2,
                  linewidth=1.3, linestyle=level.dash, marker=level.marker, markersize=4, clip_on=False)  # fmt: skip
    for series in chart.series:
        _line(axes, series)
        labels.append((series.points[-1][1].value, series.label, series.colour, series.marker))
    _frame(axes, chart)
    _fit(figure, axes, axes.get_yticklabels(), _labels(axes, labels, chart.share))
    return figure


def _line(axes: Any, series: Series) -> None:
    for seed in series.seeds if len(series.seeds) > 1 else []:
        axes.plot(*zip(*seed, strict=True), color=series.colour, linewidth=0.7, alpha=0.45, zorder=3)
    x, y = [p[0] for p in series.points], [p[1].value for p in series.points]
    error = [p[1].error or 0.0 for p in series.points]
    if any(error):
        low, high = ([a + s * b for a, b in zip(y, error, strict=True)] for s in (-1, 1))
        if len(x) > 1:
            axes.fill_between(x, low, high, color=series.colour, alpha=0.16, linewidth=0, zorder=1)
        else:
            axes.vlines(x, low, high, color=series.colour, linewidth=1.6, alpha=0.6, zorder=4)
    axes.plot(x, y, color=series.colour, linestyle=series.dash, linewidth=2.2, zorder=4)
    if series.marker:  # apart from the line, so that a dashed one has whole markers
        some = max(1, len(x) // MANY)
        axes.plot(x, y, color=series.colour, marker=series.marker, markersize=4.5, markevery=some, linestyle="none",
                  zorder=5)  # fmt: skip


def _bare(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_alpha(0.35)
    axes.tick_params(length=0, pad=5)
    axes.set_axisbelow(True)


def _mute(axes: Any) -> None:
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label):
        label.set_alpha(MUTED)


def _frame(axes: Any, chart: Chart) -> None:
    _bare(axes)
    axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.8)
    _y_axis(axes, chart)
    _x_axis(axes, chart)
    _mute(axes)


def _y_axis(axes: Any, chart: Chart) -> None:
    """Shares from 0 to 100 %, or where all are few from 0 to the largest; others as far as they go."""
    from matplotlib.ticker import MaxNLocator

    if not chart.share:
        axes.margins(y=0.08)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        return _alike(axes.yaxis)
    most = max(_highest(chart), 0.01)
    top = 1.0 if most >= FEW else 1.1 * most
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1] if top == 1 else MaxNLocator(5).tick_values(0, top))
    axes.set_ylim(-0.02 * top, 1.04 * top)
    return _alike(axes.yaxis, 100, " %")


def _highest(chart: Chart) -> float:
    """Of all that is drawn, errors and single seeds included."""
    means = [m.value + (m.error or 0.0) for series in chart.series for _, m in series.points]
    seeds = [y for series in chart.series for seed in series.seeds for _, y in seed]
    return max([*means, *seeds, *(level.value for level in chart.levels)], default=0.0)


def _x_axis(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    xs = sorted({x for series in chart.series for x, _ in series.points})
    if not xs:
        axes.set_xticks([])
        return
    iterations = chart.x == "EM iteration"
    if chart.log:
        axes.set_xscale("log", base=2)
    ticks = xs
    if not (chart.log or len(xs) == 1 or (iterations and len(xs) <= MANY)):
        found = MaxNLocator(MANY if iterations else 5, integer=iterations).tick_values(xs[0], xs[-1])
        ticks = [tick for tick in found if xs[0] <= tick <= xs[-1]]
    axes.set_xticks(ticks)
    axes.minorticks_off()
    axes.set_xlabel(chart.x, labelpad=6)
    axes.set_xlim(*_room(xs, chart.log))
    _alike(axes.xaxis)
    if iterations and xs[0] == 0:
        axes.set_xticks(ticks, ["start", *(f"{tick:.0f}" for tick in ticks[1:])])


def _alike(axis: Any, scale: float = 1, unit: str = "") -> None:
    """Figures of an axis with as many decimals as its ticks need, the same for all. A single tick is no round figure:
    three digits of it are shown."""
    from matplotlib.ticker import FuncFormatter

    ticks = [scale * tick for tick in axis.get_majorticklocs()]
    ticks = [float(f"{tick:.3g}") for tick in ticks] if len(ticks) == 1 else ticks
    decimals = max((len(f"{tick:.6f}".rstrip("0").partition(".")[2]) for tick in ticks), default=0)
    axis.set_major_formatter(FuncFormatter(lambda v, _: _minus(f"{scale * v:.{decimals}f}{unit}")))


def _minus(figure: str) -> str:
    return figure.replace("-", "−")


def _room(xs: list[float], log: bool) -> tuple[float, float]:
    """Limits that keep markers off the frame, also for a single point."""
    if log:
        return xs[0] / 1.2, xs[-1] * 1.2
    pad = 0.04 * (xs[-1] - xs[0] or 1.0)
    return xs[0] - pad, xs[-1] + pad


def _labels(axes: Any, labels: list[tuple[float, str, str, str]], share: bool) -> list[Any]:
    """Markers, values and names beside the lines' ends, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    wanted = sorted(((value - low) / (high - low), value, *look) for value, *look in labels)
    decimals = 1 if share else _decimals([value for value, *_ in labels])
    places: list[float] = []
    for place, *_ in wanted:
        places.append(max(place, places[-1] + GAP) if places else max(place, 0.0))
    # What was pushed out at the top comes down again, taking those below along.
    ceiling = 1.0
    for n in reversed(range(len(places))):
        places[n] = min(places[n], ceiling)
        ceiling = places[n] - GAP
    names = []
    for shown, (place, value, label, colour, marker) in zip(places, wanted, strict=True):
        figure = _minus(f"{100 * value:.1f} %" if share else f"{value:.{decimals}f}")
        axes.plot([1.005, 1.03], [place, shown], transform=axes.transAxes, color=colour, linewidth=0.8,
                  clip_on=False, alpha=0.8)  # fmt: skip
        name = f"{GLYPHS.get(marker, '')} {figure}  {_cut(label)}".lstrip()
        look = {"parse_math": False, "color": colour, "fontsize": 8.6, "va": "center"}
        names.append(axes.text(1.04, shown, name, transform=axes.transAxes, **look))
    return names


def _decimals(values: list[float]) -> int:
    """Of figures that stand together: none where all are whole, else two, or what the smallest needs for two digits."""
    if all(value == round(value) for value in values):
        return 0
    smallest = min(abs(value) for value in values if value)
    return max(2, min(6, 1 - math.floor(math.log10(smallest))))


def _bars(chart: Bars) -> Any:
    from matplotlib.transforms import blended_transform_factory

    figure, axes = _empty(chart, 1.3 + 0.27 * len(chart.rows))
    names = []
    for n, (label, parts) in enumerate(reversed(chart.rows)):
        begin = 0.0
        for _, colour, amount in parts:
            axes.barh(n, amount, left=begin, height=0.56, color=colour, linewidth=0)
            begin += amount
        axes.annotate(f"{begin:.3g}", (begin, n), (5, 0), textcoords="offset points", va="center", fontsize=8.6)
        names.append(_before(axes, n, label))
    _fit(figure, axes, names)
    named = list(dict.fromkeys((part, colour) for _, parts in chart.rows for part, colour, _ in parts))
    left, top = axes.get_position().x0, blended_transform_factory(figure.transFigure, axes.transAxes)
    left = min(left, 0.97 - NAMED * len(named))
    for n, (part, colour) in enumerate(named):
        axes.text(left + n * NAMED, 1.0, f"■ {part}", transform=top, color=colour, fontsize=8.6, va="top")
    _bare(axes)
    axes.set_yticks([])
    axes.set_ylim(-0.6, len(chart.rows) + 0.35)  # room for the names of the parts
    axes.grid(axis="x", color=INK, alpha=0.13, linewidth=0.8)
    axes.set_xlabel(chart.unit.capitalize(), labelpad=6)
    _mute(axes)
    return figure


def _before(axes: Any, y: float, label: str, **look: Any) -> Any:
    """A row's name, left of the axes."""
    style = {"va": "center", "ha": "right", "fontsize": 8.6, **look}
    return axes.text(-0.02, y, **_name(label), transform=axes.get_yaxis_transform(), **style)


def _dots(chart: Dots) -> Any:
    from matplotlib.transforms import blended_transform_factory

    lines = sum(len(rows) + 1.3 for _, rows in chart.blocks)
    figure, axes = _empty(chart, 1.0 + 0.2 * lines)
    edge, names = blended_transform_factory(figure.transFigure, axes.transData), []
    y = 0.0
    for title, rows in chart.blocks:
        y -= 1.3
        axes.text(0.012, y, **_name(title), transform=edge, va="center", fontweight="bold", fontsize=8.6)
        for label, colour, found in rows:
            y -= 1
            error = found.error or 0.0
            axes.plot([found.value - error, found.value + error], [y, y], color=colour, linewidth=2, alpha=0.5)
            axes.plot([found.value], [y], color=colour, marker="o", markersize=5)
            names.append(_before(axes, y, label, color=colour))
            axes.text(1.02, y, f"{100 * found.value:.1f} %", transform=axes.get_yaxis_transform(), va="center",
                      fontsize=8.6)  # fmt: skip
    _fit(figure, axes, names)
    _bare(axes)
    axes.set_yticks([])
    axes.set_ylim(y - 0.8, 0)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.grid(axis="x", color=INK, alpha=0.13, linewidth=0.8)
    _alike(axes.xaxis, 100, " %")
    _mute(axes)
    return figure
