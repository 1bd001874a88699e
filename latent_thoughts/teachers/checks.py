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
_REQUEST = r"""(that|this|these|those|such)\ (an?\ )?(request|topic|subject|content|question|kind|type|sort|information
    |matter|material|text|passage|conversation|story|essay|code)s?"""
_MATTER = rf"""(advice|guidance|opinions?|information|instructions|content|assistance|{_REQUEST})
    (\W*$|[.!,;:]|\ (because|as|since|of|in|for|with|on|about|that|to|or|without)\b)"""
_OBJECT = (
    r"(that|this|these|those|such)([.!,;:]|\W*$|\ (because|since|with\ you|for\ you|as\ (i|an?|it|that|this|such)\b))"
)
# Who cannot help, cannot help anybody; who cannot write may be about to say that a root is no fraction.
_HELPS = r"(help(?!\ (but|it|\w+ing)\b)|assist|comply|fulfill?|answer(?!\ for)|engage)\b"
_SPEAKS = r"(give|offer|provide|discuss|share|support|respond|continue|proceed|participate|advise|talk|speak)\b"
_MAKES = r"(generate|create|write|process|complete|produce)\b"
_OVER = r"(\W*$|[.!]\ (i|sorry|please)\b)"  # it goes on about the question, if at all
# How chat models open when they decline. A text about someone who is sorry, or a proof of what cannot be, is none.
_REFUSAL = re.compile(
    rf"""\W*(
      ((i'm|i\ am)\ )?(very\ |so\ |really\ )?(sorry|afraid)\b [^.!?]{{0,60}}?
      (\b{_DECLINES}|\bnot\ something\ (that\ )?i\ can\b)
    | ((i\ )?apologi[sz]e|(my\ )?apologies|unfortunately)\b [^.!?]{{0,40}}? \b{_DECLINES}
    | (?!i\ could){_DECLINES}\ (to\ )?(
        {_HELPS} | {_SPEAKS}[^.!?]{{0,30}}?\b({_MATTER}|{_OBJECT}) | {_MAKES}[^.!?]{{0,30}}?\b{_MATTER}
      | (do\ (that|this|so)(\ for\ you)?|continue|proceed){_OVER})
    | i\ (must|have\ to)\ (respectfully\ |politely\ )?decline (\ (to|this|that|your)\b|{_OVER})
    | as\ an?\ (ai|(large\ )?language\ model|assistant)\b [^.]{{0,80}}? \b({_DECLINES}|i\ (do\ not|don't)\ have)
    | ((sorry|apologies)\b\W*(but\ )?)?(this|that|your|the)\ (request|question|content|prompt|text|passage)
      (\ (for|about|to)\b[^.!?]{{0,30}}?)? (\ (may|might|could|would|appears\ to|seems\ to))?
      \ (violates?|(goes?|is)\ against)\ ((my|our|openai's)\b[^.!?]{{0,25}}?|((the|any)\ )?(usage|content|safety))
      \ (polic(y|ies)|guidelines|terms)
    | ([^.!?]{{0,100}}[.!?]\s+)?please\ (provide|share|paste|send)\ (me\ )?(with\ )?(the|your|a)\ (full\ |actual\ )?
      (text|passage|document|context|content) (\W*$|[.!:]|,?\ (so|and|that|which|you|to|for|first|below|here)\b)
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|<(start|end)_of_turn>|</?think(ing)?>|\[/?THINK\]|◁/?think▷|\[TOOL_CALLS\]|"
    + "|".join(map(re.escape, CONTROL_TOKENS))
)
# What reasoning models write before they answer, where their server leaves it in the reply. The opening mark may have
# stood in the prompt.
_OPENS = re.compile(r"<think(ing)?>|\[THINK\]|◁think▷")
_ENDS = re.compile(r"</think(ing)?>|\[/THINK\]|◁/think▷")
_STOPS = tuple(".!?…。！？")  # of a sentence

LOOP_PERIOD = 50  # words in what repeats, at most
LOOP_COPIES = 4  # back to back
LOOP_WORDS = 20  # in all copies but the first, at least
COPY_WORDS = 8  # in a row that count as copied
COPY_SHARE = 0.8  # of the text's runs of words that a reply may repeat
LONGEST = 16  # characters for every token that was allowed: four times what such a reply has in English


def spoken(text: str) -> str:
    """A reply without the reasoning that its model wrote before it.

    Where the prompt opened it, its end stands at a line's start, or right behind a sentence: a text may also speak of
    such a mark, and loses nothing then.
    """
    if (end := _ENDS.search(text)) is None:
        return text.strip()
    before = text[: end.start()]
    apart = before.rstrip(" \t").endswith("\n") or before.endswith(_STOPS) or not before.strip()
    reasoned = _OPENS.match(before.lstrip()) or (apart and not _OPENS.search(before))
    return text[end.end() if reasoned else 0 :].strip()


def says_something(text: str) -> bool:
    """Whether a reply has a text behind its reasoning."""
    said = spoken(text)
    return bool(said) and not _OPENS.match(said)


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
    if _OPENS.match(text):  # and never came to an end
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
