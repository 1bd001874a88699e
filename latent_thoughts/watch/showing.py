"""A run's state for the terminal: what is done, what is being done, how the loss falls, and what looks unhealthy."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from latent_thoughts.places import relative
from latent_thoughts.terminal import Grid, figure, named, percent, since
from latent_thoughts.watch.reading import Part, Row, State

BLOCKS = "▁▂▃▄▅▆▇█"
WIDE, BAR = 48, 30  # characters of the loss curve and of the bar, at most
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


def overview(folder: Path, states: list[State], now: float) -> Grid:
    rows = []
    for state in states:
        done = sum(part.state == "done" for part in state.parts)
        name = relative(state.folder, folder) if state.folder != folder else state.folder.name
        doing = _doing(state) if state.working else ""
        rows.append([name, Text(state.status, STATUS[state.status]), f"{done}/{len(state.parts)}", doing])
    return Grid(("run", "state", "stages", "now"), rows)


def run(state: State, now: float, width: int) -> RenderableType:
    parts: list[RenderableType] = [_title(state, now), _models(state)]
    if state.working and state.progress:
        parts += _progress(state.progress, width)
    parts += [Text(line) for line in _loss(state, width)]
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


def _models(state: State) -> Grid:
    """A line a model: its stages with the seconds they took, and as many of its figures as there is room for."""
    stages = [name for name in ("synthesize", "sample", "train", "evaluate") if _any(state.rows, name)]
    first = " ".join(f"{SIGNS[part.state][0]} {part.name}" for part in state.first)
    known = [f for f in FIGURES if any(_figure(row, f[1], f[2]) is not None for row in state.rows)]
    lines = []
    for row in state.rows:
        values = [(shown, _figure(row, stage, name)) for _, stage, name, shown in known]
        told = ["" if value is None else shown(value) for shown, value in values]
        lines.append([row.name, *(_cell(row.parts.get(name)) for name in stages), *told])
    heads = [head for head, *_ in known]
    return Grid([first, *stages, *heads], lines, drop=heads[::-1])


def _any(rows: list[Row], name: str) -> bool:
    return any(name in row.parts for row in rows)


def _cell(part: Part | None) -> Text:
    if part is None:
        return Text("")
    sign, style = SIGNS[part.state]
    seconds = part.counts.get("seconds")
    took = f" {since(seconds)}" if isinstance(seconds, int | float) else ""
    return Text(f"{sign}{took}", style)


FIGURES = [  # (head, stage, count, how it is shown), the most telling first
    ("accuracy", "evaluate", "accuracy", percent),
    ("accepted", "sample", "accepted_share", percent),
    ("ESS", "sample", "mean_ess", figure),
    ("gain/token", "sample", "gain_per_token", figure),
    ("unfinished", "sample", "unfinished_share", percent),
    ("bits/byte", "evaluate", "nll_bits_per_byte", figure),
]


def _figure(row: Row, stage: str, name: str) -> float | None:
    part = row.parts.get(stage)
    value = part.counts.get(name) if part else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _progress(progress: dict[str, Any], width: int) -> Iterator[Text]:
    """What is being done: a bar where there is room for it, the rate and the time left."""
    done, total, rate = progress.get("done") or 0.0, progress.get("total"), progress.get("rate")
    work, unit = str(progress.get("work", "")), progress.get("unit", "")
    said = [f"{done:,.0f} of {total:,.0f} {unit}" if total else f"{done:,.0f} {unit}"]
    if rate:
        said.append(f"{figure(rate)}/s")
        said += [f"{since((total - done) / rate)} left"] if total else []
    room = min(BAR, width - len("  ".join([work, "", *said])))
    full = min(room, round(room * done / total)) if total else 0
    if total and room >= 8:
        rest = f"  {'  '.join(said)}"
        yield Text.assemble((work, "bold"), "  ", ("━" * full, "green"), ("─" * (room - full), "dim"), rest)
    else:
        yield from map(Text, _wrapped([work, *said], width))
    figures = progress.get("figures") or {}
    yield from (Text(line, "dim") for line in _wrapped([named(*item) for item in figures.items()], width))


def _loss(state: State, width: int) -> Iterator[str]:
    """The loss as a curve of blocks, with where it began and where it is."""
    if not state.metrics or state.trained is None:
        return
    losses, last = [line["loss"] for line in state.metrics], state.metrics[-1]
    where = f"{relative(state.trained, state.folder)}, step {last.get('step')}"
    fell = f"{figure(losses[0])} → {figure(losses[-1])}"
    yield from _wrapped(["loss", sparkline(losses, min(WIDE, width // 2)), fell, where], width)
    names = {"tokens_per_second": "tokens/s", "norm": "gradient norm", "lr": "lr", "mfu": "MFU", "memory_gb": "GB"}
    shown = [named(label, last[name]) for name, label in names.items() if isinstance(last.get(name), int | float)]
    yield from _wrapped(shown, width, "      ")


def _wrapped(parts: Iterable[str], width: int, indent: str = "") -> list[str]:
    """Lines of parts, none of which is broken at a line's end: textwrap knows no-break spaces."""
    kept = "  ".join(part.replace(" ", "\u00a0") for part in parts)
    lines = textwrap.wrap(kept, width, initial_indent=indent, subsequent_indent=indent or "      ")
    return [line.replace("\u00a0", " ") for line in lines]


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
            yield f"{row.name}: draws hardly differ, {figure(distinct)} thoughts a text (sample.temperature)"


def _finished(row: Row) -> float | None:
    """Draws a text that came to an end: only these can differ."""
    draws, chunks, unfinished = (_figure(row, "sample", name) for name in ("draws", "chunks", "unfinished"))
    return None if draws is None or unfinished is None or not chunks else (draws - unfinished) / chunks
