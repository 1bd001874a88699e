"""What is said of every method, and how it looks in a figure.

Colours are told apart by colour-blind readers; the page has a lighter set for dark screens. Dashes and markers tell
lines apart without colour, and methods that share one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

INK = "#1d1b19"  # drawn with this colour, it becomes the text colour of wherever the figure is shown
PALETTE = {  # the names are the page's CSS variables
    "raw": "#6b6f76",
    "paraphrase": "#7a5cc0",
    "warm": "#0b7f5f",
    "longer": "#a8407f",
    "paper": "#b35c00",
    "em": "#1f62c4",
    "given": "#826500",  # this and the next are of no method
    "second": "#0b7285",
}
DOTTED, DASHED = (0, (1, 2)), (0, (5, 3))
LONGEST = 60  # characters of a name


@dataclass(frozen=True, slots=True)
class Method:
    """`name` heads its lines in tables, `short` those in figures; `title` is for the page's title, `in_words` for what
    is said of EM and it."""

    name: str
    meaning: str
    short: str
    title: str
    in_words: str
    colour: str = INK
    dash: Any = "-"
    marker: str = "o"


METHODS = {
    "raw": Method(
        name="Raw text",
        meaning="the documents without thoughts, trained as the recipe says",
        short="raw text",
        title="raw text",
        in_words="raw text",
        colour=PALETTE["raw"],
    ),
    "raw_tokens": Method(
        name="Raw text, same raw tokens",
        meaning="the documents without thoughts, for as many raw tokens as the whole EM run",
        short="raw, same tokens",
        title="raw text",
        in_words="raw text for the same raw tokens",
        colour=PALETTE["raw"],
        dash=DASHED,
        marker="s",
    ),
    "raw_flops": Method(
        name="Raw text, same compute",
        meaning="the documents without thoughts, for as many tokens in all as the whole EM run",
        short="raw, same compute",
        title="raw text",
        in_words="raw text for the same compute",
        colour=PALETTE["raw"],
        dash=DOTTED,
        marker="D",
    ),
    "raw_repeat": Method(
        name="Raw text, repeated",
        meaning="the warm start’s documents without their thoughts, for as many tokens as the warm start",
        short="raw, repeated",
        title="repeated raw text",
        in_words="the warm start’s documents as raw text",
        colour=PALETTE["raw"],
        dash=(0, (8, 2)),
        marker="^",
    ),
    "raw_fresh": Method(
        name="Raw text, fresh",
        meaning="all documents without thoughts, for as many tokens as the warm start",
        short="raw, fresh",
        title="fresh raw text",
        in_words="all documents as raw text",
        colour=PALETTE["raw"],
        dash=(0, (5, 2, 1, 2)),
        marker="v",
    ),
    "wrap_baseline": Method(
        name="Paraphrases",
        meaning="a teacher’s paraphrases of the warm start’s documents, for as many tokens as the warm start",
        short="paraphrases",
        title="paraphrases",
        in_words="a teacher’s paraphrases",
        colour=PALETTE["paraphrase"],
    ),
    "wrap_cot": Method(
        name="Paraphrases with reasoning",
        meaning="a teacher’s paraphrases with reasoning written out, for as many tokens as the warm start",
        short="paraphrases, reasoned",
        title="paraphrases with reasoning",
        in_words="a teacher’s paraphrases with reasoning",
        colour=PALETTE["paraphrase"],
        dash=DOTTED,
        marker="D",
    ),
    "warm_start": Method(
        name="Warm start",
        meaning="the few documents whose thoughts are given; where EM starts",
        short="warm start",
        title="the warm start",
        in_words="the warm start it began with",
        colour=PALETTE["warm"],
        dash=DASHED,
    ),
    "warm_start_matched": Method(
        name="Warm start, as long as EM",
        meaning="the same few documents, for as many steps as the whole EM run",
        short="warm start, longer",
        title="the warm start trained as long",
        in_words="the warm start trained as long",
        colour=PALETTE["longer"],
    ),
    "em_paper": Method(
        name="EM, paper’s E-step",
        meaning="EM whose E-step draws from the posterior alone and keeps every chosen thought",
        short="EM, paper’s",
        title="EM with the paper’s E-step",
        in_words="EM with the paper’s E-step",
        colour=PALETTE["paper"],
        dash=(0, (6, 2)),
        marker="s",
    ),
    "em": Method(
        name="EM",
        meaning="the model thinks of thoughts for the other documents itself, and is trained on them",
        short="EM",
        title="EM",
        in_words="EM",
        colour=PALETTE["em"],
    ),
    "oracle": Method(
        name="Oracle thoughts",
        meaning="the data’s own thoughts for every document: what perfect thoughts would give",
        short="oracle thoughts",
        title="oracle thoughts",
        in_words="oracle thoughts",
        colour=INK,
        dash=DOTTED,
        marker="^",
    ),
}


def of(method: str) -> Method:
    """A method that is not ours is called by its own name, which may be a path, of which the end says most."""
    own = method if len(method) <= LONGEST else f"…{method[-LONGEST:]}"
    return METHODS.get(method) or Method(own, "", own, own, own)
