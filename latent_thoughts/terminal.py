"""What figures and tables look like on a terminal, for all commands alike."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 and C1, but for tab and newline
PIPED = 140  # columns where no terminal tells how many it has: enough for every table
MARK = "†"  # of cells that a note explains
WRAPPED = 14  # columns that words need at least


def printable(text: str) -> str:
    """What a model or a corpus said, for a terminal, which would obey the control characters in it."""
    return CONTROLS.sub("", text)


def output() -> Console:
    """Standard output. Where it is no terminal (nor COLUMNS set), it is as wide as tables want it."""
    known = "COLUMNS" in os.environ or (sys.stdout and sys.stdout.isatty())
    return Console(width=None if known else PIPED, highlight=False)


def figure(value: float) -> str:
    """Three digits, and all of them from 1,000 on: 0.249, 2.00, −64.0, 14,122. An integer is a count, and exact."""
    if isinstance(value, int) or abs(value) >= 999.5:
        return minus(f"{value:,.0f}")
    return minus(f"{value:#.3g}".rstrip("."))


def count(value: float) -> str:
    """A count in few characters: 950, 12.3 k, 3.00 M."""
    rounded = float(f"{value:.3g}")  # before the unit is chosen: 999,600 is 1.00 M, not 1,000 k
    for start, size, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if rounded >= start:
            return f"{rounded / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{value:.0f}"


def percent(share: float, error: float | None = None) -> str:
    behind = "" if error is None else f" ± {100 * error:.1f}"
    return minus(f"{100 * share:.1f}{behind} %")


def since(seconds: float) -> str:
    """12 s, 3:05, 2:10:00, 1 d 6 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole >= 86400:
        days, hours = divmod(round(whole / 3600), 24)
        return f"{days} d {hours} h"
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def minus(text: str) -> str:
    """A number's hyphen as the sign that it stands for."""
    return text.replace("-", "−")


def named(name: str, value: float) -> str:
    """A figure with its name, or before its unit: loss 0.249, 14,122 tokens/s."""
    return f"{figure(value)} {name}" if name.endswith("/s") or name == "GB" else f"{name} {figure(value)}"


def bound_name(samples: str) -> str:
    """L with K as its index: L₄."""
    return "L" + samples.translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


@dataclass(frozen=True, slots=True)
class Grid:
    """A table, to be printed. Cells are text and never markup, whatever is in them.

    Columns hold figures, on the right and whole; those of `words` stand on the left and may wrap. Where a terminal is
    too narrow, the columns of `drop` go, one after the other, and a note that begins with MARK where no cell with it is
    left.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    words: Collection[str] = ()
    drop: Sequence[str] = ()
    title: str = ""
    notes: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if self.title:
            yield Text(printable(self.title), "bold")
        lines = [[cell if isinstance(cell, Text) else Text(printable(cell)) for cell in row] for row in self.rows]
        kept = self.fitting(lines, options.max_width)
        headed = any(self.heads)
        table = (
            Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True) if headed else Table.grid(padding=(0, 2))
        )
        for n in kept:
            wraps = self.heads[n] in self.words
            justify = "left" if wraps or n == 0 else "right"
            table.add_column(Text(self.heads[n]), justify=justify, no_wrap=not wraps, overflow="fold")
        for line in lines:
            table.add_row(*[line[n] for n in kept])
        yield table
        marked = any(MARK in line[n].plain for line in lines for n in kept)
        for note in self.notes:
            if marked or not note.startswith(MARK):
                yield Text(printable(note), "dim")

    def fitting(self, lines: Sequence[Sequence[Text]], width: int) -> list[int]:
        """The columns that there is room for, by their numbers."""
        widths = [max(len(head), *(line[n].cell_len for line in lines), 0) for n, head in enumerate(self.heads)]
        widths = [
            min(wide, WRAPPED) if head in self.words else wide for wide, head in zip(widths, self.heads, strict=True)
        ]
        kept = list(range(len(self.heads)))
        for head in self.drop:
            if sum(widths[n] + 2 for n in kept) <= width:
                break
            kept = [n for n in kept if self.heads[n] != head]
        return kept
