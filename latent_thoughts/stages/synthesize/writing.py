"""From settled questions to documents: thoughts in their places, paraphrases in chunks, and everything counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from latent_thoughts.config import Chunking, Recipe, Synthesize
from latent_thoughts.data import chunking, contamination
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.stages.synthesize.questions import Questions, Unit, Verdict
from latent_thoughts.teachers import checks
from latent_thoughts.teachers.base import Answer
from latent_thoughts.types import Document, ThoughtDocument, UserError

FATES = ("kept", "raw", "drop", "failed")
OF_THE_TEXT = ("oracle", "paraphrases")  # what came with a document does not fit its paraphrase


def of_paraphrases(config: Chunking) -> Chunking:
    """How paraphrases are chunked: they have no pieces of their own."""
    return config.model_copy(update={"mode": "document"}) if config.mode == "pieces" else config


def paraphrase(
    document: ThoughtDocument, text: str, method: str, config: Chunking, codec: Codec, meta: dict[str, Any]
) -> ThoughtDocument:
    """The document with another text. Raises UserError where it cannot be chunked."""
    meta = {k: v for k, v in document.meta.items() if k not in OF_THE_TEXT} | meta
    try:
        made = chunking.chunked(Document(document.id, text, meta), config, codec)
    except UserError as error:
        raise UserError(f"the paraphrase of document {document.id}: {error}") from None
    return replace(made, source=method)


def taker(method: str, config: Chunking, codec: Codec) -> Callable[[str], bool]:
    """Whether a reply can become a thought, or the text of a document: not every text is known to every tokenizer, and
    a lone surrogate, which JSON can bring, to none."""

    def takes(text: str) -> bool:
        try:
            text.encode()
            if method == "latent_thoughts":
                codec.encode(text)
            else:
                chunking.chunked(Document("", text), of_paraphrases(config), codec)
        except (UnicodeEncodeError, UserError):
            return False
        return True

    return takes


class Writer:
    def __init__(self, recipe: Recipe, config: Synthesize, questions: Questions, codec: Codec):
        self.config, self.questions, self.codec = config, questions, codec
        self.chunking = of_paraphrases(recipe.chunking)
        self.overlap = contamination.load(recipe.contamination)
        self.remove = recipe.contamination.remove

    def drops(self, verdict: Verdict) -> bool:
        return verdict.fate == "drop" or (verdict.fate == "failed" and self.config.failed == "drop")

    def removed(self, verdict: Verdict, tally: contamination.Tally) -> Verdict:
        """A reply that repeats an evaluation set is left out, where the recipe says so."""
        if verdict.fate == "kept" and tally.repeats(verdict.text) and self.remove:
            return Verdict("raw", faults=verdict.faults)
        return verdict

    def made(self, document: ThoughtDocument, units: Sequence[Unit], verdicts: Sequence[Verdict]) -> ThoughtDocument:
        if self.config.method == "latent_thoughts":
            kept = {u.index: v.text for u, v in zip(units, verdicts, strict=True) if v.fate == "kept"}
            thoughts = [(tuple(self.codec.encode(kept[n])),) if n in kept else () for n in range(len(document.chunks))]
            return replace(document, thoughts=tuple(thoughts), source="teacher")
        (verdict,) = verdicts
        if verdict.fate != "kept":
            return document
        meta = {"prompt": self.questions.prompt(document).name}
        return paraphrase(document, verdict.text, self.config.method, self.chunking, self.codec, meta)

    def totals(self, shards: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """A manifest's counts, of those in the shards: every fate and every check, those at zero too."""
        sums, tally = Counter[str](), contamination.Tally(self.overlap)
        for counts in shards:
            sums.update(counts["sums"])
            tally.add(counts["repeated"])
        names = ["documents", "documents_dropped", *FATES, *(f"fault_{name}" for name in checks.NAMES)]
        return {**{name: sums[name] for name in names}, **sums, **tally.counts("thoughts")}


class Shard:
    """What the documents of one shard become, added one by one: `documents`, rows of failures.jsonl, and counts.

    `open` questions about them are still to be asked.
    """

    def __init__(self, writer: Writer):
        self.writer = writer
        self.documents: list[ThoughtDocument] = []
        self.failures: list[dict[str, Any]] = []
        self.added = self.open = 0
        self._sums, self._tally = Counter[str](), contamination.Tally(writer.overlap)

    def add(self, document: ThoughtDocument, answers: Callable[[str], Answer | None]) -> None:
        writer, questions, counts = self.writer, self.writer.questions, self._sums
        units = questions.units(document)
        verdicts = [writer.removed(questions.verdict(document, unit, answers), self._tally) for unit in units]
        still = sum(verdict.fate == "open" for verdict in verdicts)
        self.added, self.open = self.added + 1, self.open + still
        self.failures += [
            {"doc_id": document.id, "chunk_index": u.index, "kind": v.failure.kind, "message": v.failure.message}
            for u, v in zip(units, verdicts, strict=True)
            if v.failure
        ]
        for verdict in verdicts:
            counts[verdict.fate] += 1
            counts.update(f"fault_{fault}" for fault in verdict.faults)
        if not still and not any(writer.drops(verdict) for verdict in verdicts):
            made = writer.made(document, units, verdicts)
            counts["thought_tokens"] += sum(len(ids) for kept in made.thoughts for ids in kept)
            counts["tokens"] += sum(len(chunk.ids) for chunk in made.chunks)
            self.documents.append(made)

    @property
    def counts(self) -> dict[str, Any]:
        dropped = self.added - len(self.documents)
        sums = {**self._sums, "documents": len(self.documents), "documents_dropped": dropped}
        return {"sums": sums, "repeated": self._tally.record(), "failures": self.failures}
