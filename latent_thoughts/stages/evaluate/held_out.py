"""Answers on held-out documents: the last chunk is written anew, and a pattern tells the answer in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from latent_thoughts.config import Recipe
from latent_thoughts.data import records
from latent_thoughts.data.tokenizer import Codec, Controls
from latent_thoughts.engines.base import Engine, Ids, in_order
from latent_thoughts.engines.joint import Answering, Seeds, Task, tasks
from latent_thoughts.stages.evaluate.likelihood import sample_of
from latent_thoughts.stages.evaluate.statistics import mean
from latent_thoughts.types import Draw, ThoughtDocument, UserError

ANSWERS = pa.schema(
    [
        ("doc_id", pa.string()),
        ("question", pa.string()),
        ("thought", pa.string()),
        ("text", pa.string()),
        ("answer", pa.string()),
        ("gold", pa.string()),
        ("oracle", pa.string()),
        ("right", pa.bool_()),
        ("known", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True)
class Answer:
    document: ThoughtDocument
    thought: Draw | None
    ids: Ids


class Examiner:
    """Asks one model about held-out documents, and grades what it says."""

    def __init__(self, recipe: Recipe, engine: Engine, controls: Controls, codec: Codec, thinks: bool):
        self.config, self.engine, self.controls, self.codec = recipe.evaluate, engine, controls, codec
        self.thinks, self.seeds, self.sample = thinks, Seeds(recipe.seed, -1), sample_of(recipe)

    def answer(self, documents: Sequence[ThoughtDocument]) -> list[Answer]:
        """Thinks about every document's last chunk and then writes it."""
        sample = self.sample
        how = Answering(
            self.controls, self.thinks, sample.max_thought_tokens, self.config.answer_tokens, self.config.temperature
        )
        jobs = []
        for task in map(self._task, documents):
            seeds = (self.seeds.draw(task.chunk, "think"), self.seeds.draw(task.chunk, "answer"))
            jobs.append(how.job(task.context, seeds))
        return [Answer(d, *found) for d, found in zip(documents, in_order(self.engine, jobs), strict=True)]

    def _task(self, document: ThoughtDocument) -> Task:
        target = [n == len(document.chunks) - 1 for n in range(len(document.chunks))]
        return next(tasks(document.chunks, target, self.controls, self.sample))

    def grade(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """One row an answer. Raises UserError where the pattern does not match a gold text."""
        assert self.config.answer is not None
        pattern, rows = re.compile(self.config.answer), []
        for a in answers:
            text, right = self.codec.decode(a.ids), gold(self.config.answer, a.document)
            found = pattern.search(text)
            rows.append(
                {
                    "doc_id": a.document.id,
                    "question": "".join(c.text for c in a.document.chunks[:-1]),
                    "thought": None if a.thought is None else self.codec.decode(a.thought.ids),
                    "text": text,
                    "answer": found.group(1) if found else None,
                    "gold": right,
                    "oracle": records.oracle(a.document).get(len(a.document.chunks) - 1),
                    "right": bool(found and found.group(1) == right),
                    "known": a.document.meta.get("known"),
                }
            )
        return rows


def gold(pattern: str, document: ThoughtDocument) -> str:
    """The answer that a document ends in. Raises UserError where the pattern does not match its last chunk."""
    text = document.chunks[-1].text
    if (found := re.search(pattern, text)) is None or found.group(1) is None:
        raise UserError(f"evaluate.answer does not match {text!r} of document {document.id}")
    return found.group(1)


def accuracy(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share of right answers, together and apart for documents that are `known` or not."""
    found: dict[str, Any] = {"accuracy_n": len(rows)}
    parts = {"": rows, "_known": [r for r in rows if r["known"] is True]}
    parts["_unknown"] = [r for r in rows if r["known"] is False]
    for name, part in parts.items():
        value, error = mean([r["right"] for r in part]) if part else (None, None)
        found[f"accuracy{name}"], found[f"accuracy{name}_se"] = value, error
    return found
