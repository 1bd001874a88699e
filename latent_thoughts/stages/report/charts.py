"""What is drawn: every chart as plain data.

Colours are one a method, told apart by colour-blind readers; the page has a lighter set for dark screens. Dashes and
markers tell lines apart without colour.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from latent_thoughts.stages.report.summary import Mean

INK = "#1d1b19"  # drawn with this colour, it becomes the text colour of wherever the figure is shown
PALETTE = {  # the names are the page's CSS variables
    "raw": "#6b6f76",
    "paraphrase": "#7a5cc0",
    "warm": "#0b7f5f",
    "longer": "#a8407f",
    "paper": "#b35c00",
    "em": "#1f62c4",
}
COLOURS = {
    "raw": PALETTE["raw"],
    "raw_tokens": PALETTE["raw"],
    "raw_flops": PALETTE["raw"],
    "raw_repeat": PALETTE["raw"],
    "raw_fresh": PALETTE["raw"],
    "wrap_baseline": PALETTE["paraphrase"],
    "wrap_cot": PALETTE["paraphrase"],
    "warm_start": PALETTE["warm"],
    "warm_start_matched": PALETTE["longer"],
    "em_paper": PALETTE["paper"],
    "em": PALETTE["em"],
    "oracle": INK,
}
DASHES = {
    "raw_flops": (0, (1, 2)),
    "raw_fresh": (0, (1, 2)),
    "wrap_cot": (0, (1, 2)),
    "oracle": (0, (1, 2)),
    "warm_start": (0, (5, 3)),
    "em_paper": (0, (6, 2)),
}
MARKERS = {"em_paper": "s", "raw_flops": "D", "raw_fresh": "D", "wrap_cot": "D", "oracle": "^"}
SHORT = {
    "raw": "raw text",
    "raw_tokens": "raw, same tokens",
    "raw_flops": "raw, same compute",
    "raw_repeat": "raw, repeated",
    "raw_fresh": "raw, fresh",
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
