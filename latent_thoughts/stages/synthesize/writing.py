"""From settled questions to documents: thoughts in their places, paraphrases in chunks, and everything counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from latent_thoughts.config import Recipe, Synthesize
from latent_thoughts.data import chunking, contamination
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.stages.synthesize.questions import Questions, Unit, Verdict
from latent_thoughts.teachers import checks
from latent_thoughts.teachers.base import Answer
from latent_thoughts.types import Document, ThoughtDocument, UserError

FATES = ("kept", "raw", "drop", "failed")


@dataclass
class Written:
    """What documents became. `open` questions are still to be asked; `failures` are rows of failures.jsonl."""

    documents: list[ThoughtDocument] = field(default_factory=list)
    open: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)


class Writer:
    def __init__(self, recipe: Recipe, config: Synthesize, questions: Questions, codec: Codec):
        self.config, self.questions, self.codec = config, questions, codec
        mode = "document" if recipe.chunking.mode == "pieces" else recipe.chunking.mode
        self.chunking = recipe.chunking.model_copy(update={"mode": mode})  # paraphrases have no pieces of their own
        self.overlap = contamination.load(recipe.contamination)
        self.remove = recipe.contamination.remove

    def write(self, documents: Sequence[ThoughtDocument], answers: Callable[[str], Answer | None]) -> Written:
        written, counts = Written(), Counter[str]()
        tally = contamination.Tally(self.overlap)
        for document in documents:
            units = self.questions.units(document)
            verdicts = [self._removed(self.questions.verdict(document, unit, answers), tally) for unit in units]
            written.open += sum(verdict.fate == "open" for verdict in verdicts)
            written.failures += [
                {"doc_id": document.id, "chunk_index": u.index, "kind": v.failure.kind, "message": v.failure.message}
                for u, v in zip(units, verdicts, strict=True)
                if v.failure
            ]
            for verdict in verdicts:
                counts[verdict.fate] += 1
                counts.update(f"fault_{fault}" for fault in verdict.faults)
            if not any(self._drops(verdict) for verdict in verdicts) and not any(v.fate == "open" for v in verdicts):
                made = self._made(document, units, verdicts)
                counts["thought_tokens"] += sum(len(ids) for kept in made.thoughts for ids in kept)
                counts["tokens"] += sum(len(chunk.ids) for chunk in made.chunks)
                written.documents.append(made)
        counts["documents"] = len(written.documents)
        counts["documents_dropped"] = len(documents) - len(written.documents)
        written.counts = {"sums": dict(counts), **tally.figures(), "failures": written.failures}
        return written

    def _drops(self, verdict: Verdict) -> bool:
        return verdict.fate == "drop" or (verdict.fate == "failed" and self.config.failed == "drop")

    def _removed(self, verdict: Verdict, tally: contamination.Tally) -> Verdict:
        """A reply that repeats an evaluation set is left out, where the recipe says so."""
        if verdict.fate == "kept" and tally.repeats(verdict.text) and self.remove:
            return Verdict("raw", faults=verdict.faults)
        return verdict

    def _made(self, document: ThoughtDocument, units: Sequence[Unit], verdicts: Sequence[Verdict]) -> ThoughtDocument:
        if self.config.method == "latent_thoughts":
            kept = {u.index: v.text for u, v in zip(units, verdicts, strict=True) if v.fate == "kept"}
            thoughts = [(tuple(self.codec.encode(kept[n])),) if n in kept else () for n in range(len(document.chunks))]
            return replace(document, thoughts=tuple(thoughts), source="teacher")
        (verdict,) = verdicts
        if verdict.fate != "kept":
            return document
        meta = {k: v for k, v in document.meta.items() if k != "oracle"}
        meta["prompt"] = self.questions.prompt(document).name
        try:
            made = chunking.chunked(Document(document.id, verdict.text, meta), self.chunking, self.codec)
        except UserError as error:
            raise UserError(f"the paraphrase of document {document.id}: {error}") from None
        return replace(made, source=self.config.method)

    def totals(self, shards: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """A manifest's counts, of those in the shards: every fate and every check, those at zero too."""
        sums, tally = Counter[str](), contamination.Tally(self.overlap)
        for counts in shards:
            sums.update(counts["sums"])
            tally.add(counts["texts"], counts["rows"])
        names = ["documents", "documents_dropped", *FATES, *(f"fault_{name}" for name in checks.NAMES)]
        return {**{name: sums[name] for name in names}, **sums, **tally.counts("thoughts")}
