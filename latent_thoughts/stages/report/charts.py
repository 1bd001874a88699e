"""What is drawn: every chart as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from latent_thoughts.stages.report.summary import Mean


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
    marker: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines. `group` is the part of the page it stands in."""

    name: str
    group: str
    title: str
    caption: str
    series: list[Series]
    levels: list[Level] = field(default_factory=list)
    share: bool = True  # a share is shown in percent, from 0 to 100
    x: str = "EM iteration"
    log: bool = False  # doublings of x

    @property
    def empty(self) -> bool:
        return not (self.series or self.levels)


@dataclass(frozen=True, slots=True)
class Bars:
    """A bar a row, in stacked parts: (part, colour, amount)."""

    name: str
    group: str
    title: str
    caption: str
    rows: list[tuple[str, list[tuple[str, str, float]]]]
    unit: str

    @property
    def empty(self) -> bool:
        return not self.rows


@dataclass(frozen=True, slots=True)
class Dots:
    """Figures with their error, a row each, in blocks under a title: (title, [(label, colour, mean)])."""

    name: str
    group: str
    title: str
    caption: str
    blocks: list[tuple[str, list[tuple[str, str, Mean]]]]

    @property
    def empty(self) -> bool:
        return not self.blocks


Figure = Chart | Bars | Dots
