"""What long work shows: progress with rate and ETA, on a terminal, to another process and in a file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from latent_thoughts import places
from latent_thoughts.store import held_run
from latent_thoughts.terminal import figure, named

console = Console(stderr=True)
WIDE, NARROW = 100, 70  # columns from which on there is room for the rate, and for a bar


@dataclass(frozen=True, slots=True)
class Event:
    """How far a piece of work is. `figures` are shown behind the bar."""

    work: str
    done: float
    total: float
    unit: str
    figures: str = ""


Sink = Callable[[Event], None]
Advance = Callable[..., None]
_sink: Sink | None = None


@contextlib.contextmanager
def sent_to(sink: Sink) -> Iterator[None]:
    """Progress goes to `sink` instead of the terminal (from a worker process to its parent)."""
    global _sink
    previous, _sink = _sink, sink
    try:
        yield
    finally:
        _sink = previous


def columns(width: int) -> list[ProgressColumn]:
    """What a line shows on a terminal of this width. The figures alone are cut where they find no room: of columns that
    may wrap rich would make the bar, the count and the times narrow first."""
    whole = Column(no_wrap=True)
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    bar = BarColumn(bar_width=24 if width >= WIDE else 12, table_column=whole)
    rate = TextColumn("{task.fields[rate]}", table_column=whole)
    return [
        TextColumn("{task.description}", style="bold", markup=False, table_column=whole),
        *([bar] if width >= NARROW else []),
        MofNCompleteColumn(table_column=whole),
        *([rate] if width >= WIDE else []),
        TimeElapsedColumn(table_column=whole),
        TextColumn("left", table_column=whole),
        TimeRemainingColumn(table_column=whole),
        TextColumn("{task.fields[figures]}", style="dim", markup=False, table_column=rest),
    ]


class Bars:
    """A terminal display of events: one bar a name, with rate and ETA; plain lines without a terminal."""

    def __init__(self) -> None:
        shown = columns(console.width)
        self.progress = Progress(*shown, console=console, disable=not console.is_terminal, expand=True)
        self.tasks: dict[str, tuple[Any, str]] = {}

    def show(self, name: str, event: Event) -> None:
        label = f"{name}{event.work}"
        known = self.tasks.get(name)
        if known is None or known[1] != label:
            if known is not None:
                self.progress.remove_task(known[0])
            # the terminal display knows an open end as None
            total = event.total if math.isfinite(event.total) else None
            task = self.progress.add_task(label, total=total, rate="", figures="")
            self.tasks[name] = known = (task, label)
        task = self.progress.tasks[self.progress.task_ids.index(known[0])]
        rate = f"{figure(task.speed)} {event.unit}/s" if task.speed else ""
        self.progress.update(known[0], completed=event.done, rate=rate, figures=event.figures)
        if event.done >= event.total and not console.is_terminal:
            print(f"{label}: {event.done:,.0f} {event.unit}  {event.figures}".rstrip(), file=sys.stderr, flush=True)

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


class ProgressFile:
    """progress.json in the run folder that this process holds: how far it is, for `latent-thoughts watch`."""

    EVERY, STORED = 1.0, 20.0  # seconds between two writes, here and in a store
    RECENT = 60.0  # seconds over which the rate is taken

    def __init__(self, work: str, total: float, unit: str):
        self.head = {"work": work, "total": total if math.isfinite(total) else None, "unit": unit, "pid": os.getpid()}
        self.folder, self.began = held_run(), time.time()
        self.recent: deque[tuple[float, float]] = deque()

    def write(self, done: float, figures: Mapping[str, float], last: bool) -> None:
        now = time.monotonic()  # clocks may jump
        if self.folder is None:
            return
        every = self.STORED if places.remote(self.folder) else self.EVERY
        if self.recent and now - self.recent[-1][0] < every and not last:
            return
        self.recent.append((now, done))
        while len(self.recent) > 2 and now - self.recent[0][0] > self.RECENT:
            self.recent.popleft()
        then, before = self.recent[0]
        passed = now - then
        rate = (done - before) / passed if passed > 0 else None
        shown = {name: value for name, value in figures.items() if math.isfinite(value)}
        value = {**self.head, "done": done, "rate": rate, "began": self.began, "time": time.time(), "figures": shown}
        if places.remote(self.folder):
            places.write(self.folder / "progress.json", json.dumps(value).encode())
            return
        # Replaced as a whole, so that no reader sees half of it; not synced, since it is written anew in a second.
        temporary = self.folder / f".progress.json.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.replace(self.folder / "progress.json")


@contextlib.contextmanager
def sent_here() -> Iterator[Sink]:
    """Where this process shows progress: what it tells of itself, or another told it."""
    if _sink is not None:
        yield _sink
        return
    with Bars() as bars:
        yield lambda event: bars.show("", event)


@contextlib.contextmanager
def track(work: str, total: float, unit: str) -> Iterator[Advance]:
    """Progress of one piece of work: call the yielded function with the amount done, and figures."""
    done = 0.0
    last = 0.0

    with sent_here() as sink:
        kept = ProgressFile(work, total, unit)

        def advance(amount: float, **figures: float) -> None:
            nonlocal done, last
            done += amount
            kept.write(min(done, total), figures, done >= total)
            now = time.monotonic()
            if now - last > 0.2 or done >= total:
                last = now
                text = "  ".join(named(name, value) for name, value in figures.items())
                sink(Event(work, min(done, total), total, unit, text))

        yield advance
