"""Which questions of a task the training data repeats: n-grams of words in common, in its text and in its thoughts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latent_thoughts.data import records
from latent_thoughts.data.contamination import Overlap
from latent_thoughts.data.corpus import Source
from latent_thoughts.data.tokenizer import Codec

TEXT, THOUGHTS = "text", "thoughts"


def search(rows: Sequence[dict[str, Any]], trained_on: Mapping[str, Source], tokenizer: Any) -> dict[str, set[str]]:
    """The questions (ids) that share an n-gram with some document of the sources, or with one of its thoughts."""
    asked = {r["question_id"]: r["question"] for r in rows}
    names, overlap = list(asked), Overlap({"task": asked.values()})
    codec, found = Codec(tokenizer), {TEXT: set[str](), THOUGHTS: set[str]()}
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


def counts(rows: Sequence[dict[str, Any]], found: Mapping[str, set[str]]) -> dict[str, dict[str, int]]:
    """For results: how many of the questions are repeated, by where."""
    of = len({r["question_id"] for r in rows})
    return {what: {"questions": len(ids), "of": of} for what, ids in found.items()}


def shown(contamination: Mapping[str, dict[str, int]] | None) -> str:
    if contamination is None:
        return "not checked"
    return ", ".join(f"{what}: {c['questions']} of {c['of']}" for what, c in contamination.items())
