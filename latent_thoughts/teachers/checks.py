"""What is wrong with a reply, if anything. Counted and handled by policy (`synthesize.checks`); nothing is repaired."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from latent_thoughts.data.contamination import words
from latent_thoughts.data.tokenizer import CONTROL_TOKENS
from latent_thoughts.teachers.base import Completion

NAMES = ("unencodable", "refusal", "empty", "cut", "loop", "copied", "control")

_DECLINES = r"(can\ ?not|can['’]t|won['’]t|will\ not|am\ unable|am\ not\ able|must\ decline)"
# How chat models open when they decline. A text about someone who is sorry, or a proof of what cannot be, is none.
_REFUSAL = re.compile(
    rf"""\W*(
      ((i['’]m|i\ am)\ )?(very\ |so\ |really\ )?(sorry|afraid)\b [^.!?]{{0,60}}? \bi\ {_DECLINES}
    | ((i\ )?apologi[sz]e|apologies|unfortunately)\b [^.!?]{{0,40}}? \bi\ {_DECLINES}
    | i\ {_DECLINES}\ (to\ )?(help|assist|comply|fulfil|provide|answer|do\ that|continue|engage|generate|create|write)\b
    | as\ an\ ai\b [^.]{{0,80}}? {_DECLINES}
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|<(start|end)_of_turn>|" + "|".join(map(re.escape, CONTROL_TOKENS))
)

LOOP_PERIOD = 50  # words in what repeats, at most
LOOP_COPIES = 4  # back to back
LOOP_WORDS = 20  # in all copies but the first, at least
COPY_WORDS = 8  # in a row that count as copied
COPY_SHARE = 0.8  # of the text's runs of words that a reply may repeat


def fault(reply: Completion, original: str, takes: Callable[[str], bool] = lambda text: True) -> str | None:
    """The name of the first check that a reply to `original` fails, None for a good one. `takes` tells whether the
    model's tokenizer can encode a text; where it cannot, no policy could accept the reply, so this comes first."""
    text = reply.text.strip()
    if not takes(text):
        return "unencodable"
    if reply.finish in ("refusal", "content_filter") or _REFUSAL.match(text):
        return "refusal"
    if not text:
        return "cut" if reply.finish == "length" else "empty"
    if _CONTROL.search(text):
        return "control"
    found = words(text)
    if loops(found):
        return "loop"
    if reply.finish == "length":
        return "cut"
    return "copied" if copies(found, words(original)) else None


def loops(found: Sequence[str]) -> bool:
    """Whether a run of up to 50 words stands four times back to back somewhere, repeating twenty words or more."""
    if len(found) < LOOP_WORDS:
        return False
    known: dict[str, int] = {}
    numbers = np.array([known.setdefault(word, len(known)) for word in found])
    for period in range(1, min(LOOP_PERIOD, len(found) // LOOP_COPIES) + 1):
        differs = np.flatnonzero(numbers[period:] != numbers[:-period])
        edges = np.concatenate([[-1], differs, [len(found) - period]])
        if int(np.diff(edges).max()) - 1 >= max(LOOP_WORDS, period * (LOOP_COPIES - 1)):
            return True
    return False


def copies(found: Sequence[str], original: Sequence[str]) -> bool:
    """Whether a reply hands back the text: all its words, or most of its runs of eight words."""
    if list(found) == list(original):
        return True
    runs = _runs(original)
    return bool(runs) and len(runs & _runs(found)) >= COPY_SHARE * len(runs)


def _runs(found: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(found[n : n + COPY_WORDS]) for n in range(len(found) - COPY_WORDS + 1)}
