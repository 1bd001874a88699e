"""What is wrong with a reply, if anything. Counted and handled by policy (`synthesize.checks`); nothing is repaired."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from latent_thoughts.data.contamination import words
from latent_thoughts.data.tokenizer import CONTROL_TOKENS
from latent_thoughts.teachers.base import Completion

NAMES = ("unencodable", "refusal", "empty", "cut", "loop", "copied", "control")

_DECLINES = r"""
    i(
      \ (can\ ?not|can't|could\ not|couldn't|must\ (respectfully\ |politely\ )?decline|have\ to\ decline)
    | \ (won't|will\ not)(\ be\ able)?
    | ('m|\ am)\ (unable|not\ able|not\ comfortable|not\ allowed|not\ permitted)
    )\b (?!\ be\b)"""
_HELPS = (
    r"(help|assist|comply|fulfill?|provide|answer(?!\ for)|do\ (that|this|so)|continue|engage|generate|create|write)\b"
)
_SPEAKS = r"(give|offer|discuss|share|support|respond|process|complete|produce|proceed|participate|advise|talk|speak)\b"
_TOPIC = r"""(advice|guidance|opinions?|(that|this|these|those|such)(\ (request|topic|subject|content|question|kind|type
    |sort|information|matter|material|text|passage)s?)?)\s*([.!,;:]|$|(because|as|since|of|in|for|with)\b)"""
# How chat models open when they decline. A text about someone who is sorry, or a proof of what cannot be, is none.
_REFUSAL = re.compile(
    rf"""\W*(
      ((i'm|i\ am)\ )?(very\ |so\ |really\ )?(sorry|afraid)\b [^.!?]{{0,60}}?
      (\b{_DECLINES}|\bnot\ something\ (that\ )?i\ can\b)
    | ((i\ )?apologi[sz]e|(my\ )?apologies|unfortunately)\b [^.!?]{{0,40}}? \b{_DECLINES}
    | {_DECLINES}\ (to\ )?({_HELPS}|{_SPEAKS}[^.!?]{{0,30}}?\b{_TOPIC})
    | i\ (must|have\ to)\ (respectfully\ |politely\ )?decline\b (\ (to|this|that|your)\b|[.!]|$)
    | as\ an?\ (ai|(large\ )?language\ model|assistant)\b [^.]{{0,80}}? \b({_DECLINES}|i\ (do\ not|don't)\ have)
    | ((sorry|apologies)\b\W*(but\ )?)?(this|that|your|the)\ (request|question|content|prompt|text|passage)\b
      [^.!?]{{0,30}}?\ (violat\w+|against)\ [^.!?]{{0,30}}?\b(my|our|openai's|usage|content|safety)\b [^.!?]{{0,25}}?
      \b(polic(y|ies)|guidelines|terms)
    | ([^.!?]{{0,100}}[.!?]\s+)?please\ (provide|share|paste|send)\ (me\ )?(with\ )?(the|your|a)\ (full\ |actual\ )?
      (text|passage|document|context|content)\b (?!\ of)
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|<(start|end)_of_turn>|</?think(ing)?>|\[/?THINK\]|◁/?think▷|\[TOOL_CALLS\]|"
    + "|".join(map(re.escape, CONTROL_TOKENS))
)
# What reasoning models write before they answer, where their server leaves it in the reply. The opening mark may have
# stood in the prompt.
_REASONED = re.compile(r"</think(ing)?>|\[/THINK\]|◁/think▷")
_REASONS = re.compile(r"\s*(<think(ing)?>|\[THINK\]|◁think▷)")

LOOP_PERIOD = 50  # words in what repeats, at most
LOOP_COPIES = 4  # back to back
LOOP_WORDS = 20  # in all copies but the first, at least
COPY_WORDS = 8  # in a row that count as copied
COPY_SHARE = 0.8  # of the text's runs of words that a reply may repeat
LONGEST = 16  # characters for every token that was allowed: four times what such a reply has in English


def spoken(text: str) -> str:
    """A reply without the reasoning that its model wrote before it."""
    found = _REASONED.search(text)
    return text[found.end() if found else 0 :].strip()


def fault(
    reply: Completion,
    original: str,
    takes: Callable[[str], bool] = lambda text: True,
    max_tokens: float = float("inf"),
) -> str | None:
    """The name of the first check that a reply to `original` fails, None for a good one. `takes` tells whether the
    model's tokenizer can encode a text; where it cannot, no policy could accept the reply, so this comes first."""
    text = spoken(reply.text)
    if not takes(text):
        return "unencodable"
    if reply.finish in ("refusal", "content_filter") or _REFUSAL.match(text[:500].replace("’", "'")):
        return "refusal"
    if _REASONS.match(text):  # and never came to an end
        return "cut"
    cut = reply.finish == "length" or len(text) > LONGEST * max_tokens
    if not text:
        return "cut" if cut else "empty"
    if _CONTROL.search(text):
        return "control"
    found = words(text)
    if loops(found):
        return "loop"
    if cut:
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
