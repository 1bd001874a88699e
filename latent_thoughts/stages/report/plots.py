"""The figures as SVG and PNG: thin frame, light grid, names beside the lines' ends instead of a legend."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_thoughts.stages.report import svg
from latent_thoughts.stages.report.charts import INK, PALETTE, Bars, Chart, Dots, Figure, Series
from latent_thoughts.stages.report.parts import figures
from latent_thoughts.stages.report.summary import Results, percents
from latent_thoughts.store import atomic

SIZE = (5.1, 3.4)  # inches; small on purpose: scaled down to a phone's width its text can still be read
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
    return {"s": text if len(text) <= LONGEST else f"…{text[-LONGEST:]}", "parse_math": False}


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


def _fit(figure: Any, axes: Any, names: Sequence[Any]) -> None:
    """Moves the axes' left edge to the right where the names before it, or the scale's figures, need more room."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer, place = FigureCanvasAgg(figure).get_renderer(), axes.get_position()
    widest = max((name.get_window_extent(renderer).width for name in names), default=0.0) / figure.bbox.width
    left = max(place.x0, widest + 0.03)
    axes.set_position((left, place.y0, place.x1 - left, place.height))


def _lines(chart: Chart) -> Any:
    figure, axes = _empty(chart)
    labels = [(level.value, level.label, level.colour) for level in chart.levels]
    for level in chart.levels:
        axes.axhline(level.value, color=level.colour, linewidth=1.3, linestyle=level.dash, alpha=0.9, zorder=2)
    for series in chart.series:
        _line(axes, series)
        labels.append((series.points[-1][1].value, series.label, series.colour))
    _frame(axes, chart)
    _fit(figure, axes, axes.get_yticklabels())
    _labels(axes, labels, chart.share)
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
        axes.plot(x, y, color=series.colour, marker=series.marker, markersize=4.5, linestyle="none", zorder=5)


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
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    _bare(axes)
    axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.8)
    if chart.share:
        axes.set_ylim(-0.02, 1.04)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))
    else:
        axes.margins(y=0.08)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}".replace("-", "−")))
    xs = sorted({x for series in chart.series for x, _ in series.points})
    iterations = chart.x == "EM iteration"
    if chart.log:
        axes.set_xscale("log", base=2)
    if chart.log or len(xs) == 1 or (iterations and len(xs) <= MANY):
        axes.set_xticks(xs)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(MANY if iterations else 5, integer=iterations))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: "start" if v == 0 and iterations else f"{v:g}"))
    if xs:
        axes.set_xlabel(chart.x, labelpad=6)
        axes.set_xlim(*_room(xs, chart.log))
    else:
        axes.set_xticks([])
    _mute(axes)


def _room(xs: list[float], log: bool) -> tuple[float, float]:
    """Limits that keep markers off the frame, also for a single point."""
    if log:
        return xs[0] / 1.2, xs[-1] * 1.2
    pad = 0.04 * (xs[-1] - xs[0] or 1.0)
    return xs[0] - pad, xs[-1] + pad


def _labels(axes: Any, labels: list[tuple[float, str, str]], share: bool) -> None:
    """Names and values beside the lines' ends, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    wanted = sorted(((value - low) / (high - low), value, label, colour) for value, label, colour in labels)
    places: list[float] = []
    for place, *_ in wanted:
        places.append(max(place, places[-1] + GAP) if places else max(place, 0.0))
    # What was pushed out at the top comes down again, taking those below along.
    ceiling = 1.0
    for n in reversed(range(len(places))):
        places[n] = min(places[n], ceiling)
        ceiling = places[n] - GAP
    for shown, (place, value, label, colour) in zip(places, wanted, strict=True):
        figure = (f"{percents(value)} %" if share else _short(value)).replace("-", "−")
        axes.plot([1.005, 1.03], [place, shown], transform=axes.transAxes, color=colour, linewidth=0.8,
                  clip_on=False, alpha=0.8)  # fmt: skip
        axes.text(1.04, shown, **_name(f"{figure}  {label}"), transform=axes.transAxes, color=colour,
                  fontsize=8.6, va="center", ha="left")  # fmt: skip


def _short(value: float) -> str:
    """Two decimals, or as many as a small figure needs for three digits."""
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}".removesuffix(".00")


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
    for n, (part, colour) in enumerate(named):
        axes.text(left + n * 0.154, 1.0, f"■ {part}", transform=top, color=colour, fontsize=8.6, va="top")
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
    from matplotlib.ticker import FuncFormatter
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
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %"))
    _mute(axes)
    return figure
