"""A run's state for the terminal: what is done, what is being done, how the loss falls, and what looks unhealthy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from latent_thoughts.places import relative
from latent_thoughts.watch.reading import Part, Row, State

BLOCKS = "▁▂▃▄▅▆▇█"
WIDE = 48  # characters of the loss curve
SIGNS = {"done": ("✓", "green"), "working": ("▸", "bold yellow"), "open": ("·", "dim")}
STATUS = {"working": "bold green", "finished": "bold", "stopped": "bold red", "idle": "bold"}
NEXT = {
    "stopped": "Stopped: run the same command again, and it goes on from here.",
    "idle": "Idle: what was begun is complete, and the next command goes on from here.",
}
ALIKE = 0.75  # distinct thoughts a finished draw, below which draws are told to hardly differ
SILENT = 120.0  # seconds without a sign of life after which a run that works is told to be silent


def show(folder: Path, states: list[State], now: float, width: int) -> RenderableType:
    """One run in full; of several a line each, and in full those that work. `width` is the terminal's."""
    if len(states) == 1:
        return run(states[0], now, width)
    shown = [overview(folder, states, now), *(run(state, now, width) for state in states if state.working)]
    return Group(*(part for n, shown_part in enumerate(shown) for part in ([Text()] if n else []) + [shown_part]))


def overview(folder: Path, states: list[State], now: float) -> Table:
    table = _table("run", "state", "stages", "now")
    for state in states:
        done = sum(part.state == "done" for part in state.parts)
        name = relative(state.folder, folder) if state.folder != folder else state.folder.name
        doing = _doing(state) if state.working else ""
        table.add_row(Text(name), Text(state.status, STATUS[state.status]), f"{done}/{len(state.parts)}", Text(doing))
    return table


def run(state: State, now: float, width: int) -> RenderableType:
    parts: list[RenderableType] = [_title(state, now), _models(state, width)]
    if state.working and state.progress:
        parts.append(_progress(state.progress))
    parts += [Text(line) for line in _loss(state, min(WIDE, width // 2))]
    parts += [Text(f"! {line}", "yellow") for line in warnings(state, now)]
    if state.status in NEXT:
        parts.append(Text(NEXT[state.status], "dim"))
    return Group(*parts)


def _title(state: State, now: float) -> Text:
    text = Text.assemble((str(state.folder), "bold"), "  ", (state.status, STATUS[state.status]))
    if state.sign:
        text.append(f"  last sign {since(now - state.sign)} ago", "dim")
    return text


def _doing(state: State) -> str:
    part = next((part for part in state.parts if part.state == "working"), None)
    where = relative(part.folder, state.folder) if part else ""
    total, done = state.progress.get("total"), state.progress.get("done")
    return f"{where} {100 * done / total:.0f} %" if total and done is not None else where


def _models(state: State, width: int) -> Table:
    """A line a model: its stages with the seconds they took, and as many of its figures as there is room for."""
    columns = [name for name in ("synthesize", "sample", "train", "evaluate") if _any(state.rows, name)]
    first = " ".join(f"{SIGNS[part.state][0]} {part.name}" for part in state.first)
    heads = [first, *columns]
    lines = [[Text(row.name), *(_cell(row.parts.get(name)) for name in columns)] for row in state.rows]
    for head, stage, name, shown in FIGURES:
        values = [_figure(row, stage, name) for row in state.rows]
        cells = [Text("" if value is None else shown(value)) for value in values]
        wider = [[*line, cell] for line, cell in zip(lines, cells, strict=True)]
        if any(cells) and _width([*heads, head], wider) <= width:
            heads, lines = [*heads, head], wider
    table = _table(*heads)
    for line in lines:
        table.add_row(*line)
    return table


def _width(heads: list[str], lines: list[list[Text]]) -> int:
    """Of a table with two spaces between its columns, and one at either end."""
    return sum(max(len(head), *(len(line[n]) for line in lines)) + 2 for n, head in enumerate(heads)) + 2


def _any(rows: list[Row], name: str) -> bool:
    return any(name in row.parts for row in rows)


def _cell(part: Part | None) -> Text:
    if part is None:
        return Text("")
    sign, style = SIGNS[part.state]
    seconds = part.counts.get("seconds")
    took = f" {since(seconds)}" if isinstance(seconds, int | float) else ""
    return Text(f"{sign}{took}", style)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def plain(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


FIGURES = [  # (head, stage, count, how it is shown), the most telling first
    ("accuracy", "evaluate", "accuracy", percent),
    ("accepted", "sample", "accepted_share", percent),
    ("ESS", "sample", "mean_ess", plain),
    ("gain/token", "sample", "gain_per_token", plain),
    ("unfinished", "sample", "unfinished_share", percent),
    ("bits/byte", "evaluate", "nll_bits_per_byte", plain),
]


def _figure(row: Row, stage: str, name: str) -> float | None:
    part = row.parts.get(stage)
    value = part.counts.get(name) if part else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _progress(progress: dict[str, Any]) -> RenderableType:
    """What is being done: a bar, the rate and the time left."""
    done, total, rate = progress.get("done") or 0.0, progress.get("total"), progress.get("rate")
    grid = Table.grid(padding=(0, 2))
    unit = progress.get("unit", "")
    said = f"{done:,.0f} of {total:,.0f} {unit}" if total else f"{done:,.0f} {unit}"
    if rate:
        said += f"  {rate:,.3g}/s"
        said += f"  {since((total - done) / rate)} left" if total else ""
    bar = ProgressBar(total or None, done, width=30, pulse=not total)
    grid.add_row(Text(str(progress.get("work", "")), "bold"), bar, Text(said))
    figures = progress.get("figures") or {}
    shown = "  ".join(f"{name} {plain(value)}" for name, value in figures.items())
    return Group(grid, Text(shown, "dim")) if shown else grid


def _loss(state: State, width: int) -> Iterator[str]:
    """The loss as a curve of blocks, with where it began and where it is."""
    if not state.metrics or state.trained is None:
        return
    losses, last = [line["loss"] for line in state.metrics], state.metrics[-1]
    where = relative(state.trained, state.folder)
    fell = f"{plain(losses[0])} → {plain(losses[-1])}"
    yield f"loss  {sparkline(losses, width)}  {fell}  {where}, step {last.get('step')}"
    names = {"tokens_per_second": "tokens/s", "norm": "gradient norm", "lr": "lr", "mfu": "MFU", "memory_gb": "GB"}
    shown = [f"{label} {_many(last[name])}" for name, label in names.items() if isinstance(last.get(name), int | float)]
    if shown:
        yield "      " + "  ".join(shown)


def _many(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else plain(value)


def sparkline(values: list[float], width: int = WIDE) -> str:
    """Values as blocks, each the mean of its part of them."""
    width = min(width, len(values))
    edges = [round(n * len(values) / width) for n in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(BLOCKS[round((v - low) / (high - low or 1) * (len(BLOCKS) - 1))] for v in means)


def warnings(state: State, now: float) -> Iterator[str]:
    """What a person would want to know before waiting any longer."""
    if state.diverged is not None:
        yield f"training diverged: {relative(state.diverged, state.folder)}"
    if state.working and state.sign and now - state.sign > SILENT:
        yield f"no sign of life for {since(now - state.sign)}"
    for row in state.rows:
        unfinished, accepted = _figure(row, "sample", "unfinished_share"), _figure(row, "sample", "accepted_share")
        distinct = _figure(row, "sample", "mean_distinct")
        if unfinished is not None and unfinished > 0.3:
            yield f"{row.name}: {percent(unfinished)} of the draws found no end (sample.max_thought_tokens)"
        if accepted is not None and accepted < 0.1:
            yield f"{row.name}: only {percent(accepted)} of the texts got a thought that pays"
        finished = _finished(row)
        if distinct is not None and distinct < 1.5 and finished is not None and distinct < ALIKE * finished:
            yield f"{row.name}: draws hardly differ, {plain(distinct)} thoughts a text (sample.temperature)"


def _finished(row: Row) -> float | None:
    """Draws a text that came to an end: only these can differ."""
    draws, chunks, unfinished = (_figure(row, "sample", name) for name in ("draws", "chunks", "unfinished"))
    return None if draws is None or unfinished is None or not chunks else (draws - unfinished) / chunks


def since(seconds: float) -> str:
    """12 s, 3:05, 2:10:00."""
    if seconds < 60:
        return f"{max(0, seconds):.0f} s"
    return str(timedelta(seconds=round(seconds))).removeprefix("0:").removeprefix("0")


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for n, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if n == 0 else "right", no_wrap=True)
    return table
