"""Which questions of a task the training data repeats: n-grams of words in common, in its text and in its thoughts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latent_thoughts.data import records
from latent_thoughts.data.contamination import FEWEST, Overlap, words
from latent_thoughts.data.corpus import Source
from latent_thoughts.data.tokenizer import Codec

TEXT, THOUGHTS, SHORT = "text", "thoughts", "too_short"


def search(rows: Sequence[dict[str, Any]], trained_on: Mapping[str, Source], tokenizer: Any) -> dict[str, set[str]]:
    """The questions (ids) that share an n-gram with some document of the sources, or with one of its thoughts; and
    those of so few words that they are not looked for within a text, of which nothing can be told."""
    asked = {r["question_id"]: r["question"] for r in rows}
    names, overlap = list(asked), Overlap({"task": asked.values()})
    codec, found = Codec(tokenizer), {TEXT: set[str](), THOUGHTS: set[str]()}
    found[SHORT] = {name for name, question in asked.items() if len(words(question)) < min(FEWEST, overlap.n)}
    for source in trained_on.values():
        for _, documents in records.shards(source.folder, source.split):
            for document in documents:
                thoughts = [codec.decode(z) for kept in document.thoughts for z in kept]
                for what, text in (
                    (TEXT, "".join(c.text for c in document.chunks)),
                    *((THOUGHTS, t) for t in thoughts),
                ):
                    found[what] |= {names[n] for n in overlap.matches(text).get("task", ())}
    return found


def mark(rows: Sequence[dict[str, Any]], found: Mapping[str, set[str]]) -> None:
    """Notes in every row (`repeated`) what was found of its question: nothing, where it is clean."""
    for row in rows:
        row["repeated"] = [what for what, ids in found.items() if row["question_id"] in ids]


def clean(rows: Sequence[dict[str, Any]]) -> set[str] | None:
    """The questions of marked rows of which nothing was found in any; None where there was no search."""
    if any(r["repeated"] is None for r in rows):
        return None
    return {r["question_id"] for r in rows} - {r["question_id"] for r in rows if r["repeated"]}


def counts(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]] | None:
    """For results, of marked rows: how many of the questions are repeated, by where; None where there was no search."""
    if any(r["repeated"] is None for r in rows):
        return None
    asked = {r["question_id"] for r in rows}
    return {
        what: {"questions": len({r["question_id"] for r in rows if what in r["repeated"]}), "of": len(asked)}
        for what in (TEXT, THOUGHTS, SHORT)
    }


def shown(contamination: Mapping[str, dict[str, int]] | None) -> str:
    if contamination is None:
        return "not checked"
    found = {what: c for what, c in contamination.items() if what != SHORT or c["questions"]}
    names = {SHORT: "too short to tell"}
    return ", ".join(f"{names.get(what, what)}: {c['questions']} of {c['of']}" for what, c in found.items())
