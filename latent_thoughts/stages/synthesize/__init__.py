"""synthesize: thoughts for document shards, or paraphrases of them.

    latent-thoughts synthesize recipe.yaml --out RUN [--yes]

Method `oracle` takes the thoughts that come with the data (a built-in world's, or `data.thought`); paraphrases under
`teacher.kind: data` come with it too; all else a teacher is asked. Every reply goes into the store first;
shards are written from the store alone.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latent_thoughts import executors
from latent_thoughts import model as models
from latent_thoughts.config import Chunking, Recipe, Synthesize
from latent_thoughts.data import chunking, contamination
from latent_thoughts.data.records import DOCUMENTS, document_of, document_row, oracle, shards
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.executors.work import Do, Told
from latent_thoughts.progress import track
from latent_thoughts.stages.synthesize.asking import Approve, Asking, estimate, price, refuse, settled_memory
from latent_thoughts.stages.synthesize.questions import Questions
from latent_thoughts.stages.synthesize.writing import Shard, Writer, of_paraphrases, paraphrase, taker
from latent_thoughts.store import Stage, atomic, read_manifest, read_rows, same_base, stage_key, write_json
from latent_thoughts.teachers import load, prompts
from latent_thoughts.teachers.replies import Replies, opened, payer_of
from latent_thoughts.types import Manifest, ThoughtDocument, UserError

# How a teacher is reached, and how fast, changes nothing about what it says.
_REACHING = {"base_url", "key_env", "concurrency", "requests_per_minute", "tokens_per_minute", "timeout", "retries"}
_REACHING |= {"batch_requests", "poll", "memory", "compile"}
LAG = 2  # questions for every one under way, after which those asked before them are looked at
_NOT_IN_KEY = {"prices", "cap", "store", "store_mb", "prompts"}


def synthesize(
    recipe: Recipe, config: Synthesize, prepared: Path, base: Path, splits: tuple[str, ...], folder: Path, store: Path,
    approve: Approve | None = None,
) -> Manifest:  # fmt: skip
    """Shards of the given splits with a teacher's thoughts, or paraphrased by it; `approve` is shown the estimate.

    Raises UserError where asking could not be finished (a cap, a teacher that is not there, requests that failed);
    what was answered is in the store, and the next run asks for the rest alone.
    """
    if config.method == "oracle" or config.teacher.kind == "data":
        return synthesize_given(recipe, config.method, prepared, base, splits, folder)
    asked, model = prompts.load(config.method, config.prompts), load.model_name(config)
    settings = config.model_dump(exclude=_NOT_IN_KEY | {"teacher"}) | {"model": model}
    settings |= {"teacher": config.teacher.model_dump(exclude=_REACHING), "prompts": [p.hash for p in asked]}
    everything = [settings, splits, recipe.seed, *contamination.key(recipe.contamination)]
    documents = _documents(prepared, base)
    if config.method != "latent_thoughts":
        everything += chunking.key(recipe.chunking)
    stage = Stage(folder, "synthesize", stage_key("synthesize", everything, {"prepare": documents}))
    if (manifest := stage.manifest) is not None:
        return manifest
    codec = Codec(models.load_tokenizer(base / "model")[0])
    questions = Questions(config, asked, model, recipe.seed, taker(config.method, recipe.chunking, codec))
    writer = Writer(recipe, config, questions, codec)
    write_json(folder / "prompts.json", [{**p.model_dump(), "hash": p.hash} for p in asked])
    with settled_memory(), opened(store, stage.key, payer_of(folder, store)) as replies:
        work = _Work(stage, prepared, splits, questions, writer, replies)
        _ask(config, work, approve)
        counts = work.finish()
        if config.method == "latent_thoughts" and not counts["kept"]:
            faults = {name.removeprefix("fault_"): n for name, n in counts.items() if name.startswith("fault_") and n}
            named = ", ".join(f"{n} {name}" for name, n in faults.items()) or "no reply was a thought"
            raise UserError(
                f"not one thought came of the teacher's replies ({named}): read some in {store}, and raise "
                "synthesize.max_tokens where they are cut, or change synthesize.prompts, the teacher or "
                "synthesize.checks"
            )
        used, prompt_tokens, completion_tokens = replies.spent()
        counts |= {"replies": used, "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        counts["cost"] = price(config.prices, prompt_tokens, completion_tokens)
        manifest = stage.close(work.names, counts, base=documents.base)
        replies.prune(config.store_mb * 2**20)
    return manifest


def _documents(prepared: Path, base: Path) -> Manifest:
    """Of the documents to think about. Raises UserError where they are of another base model than the one at hand."""
    same_base(read_manifest(base), documents := read_manifest(prepared))
    return documents


class _Work:
    """The shards of a stage: which are written, and the documents of those that are not."""

    def __init__(
        self,
        stage: Stage,
        prepared: Path,
        splits: tuple[str, ...],
        questions: Questions,
        writer: Writer,
        replies: Replies,
    ):
        self.stage, self.prepared, self.splits = stage, prepared, splits
        self.questions, self.writer, self.replies = questions, writer, replies
        shards = read_manifest(prepared).shards
        self.names = [name for split in splits for name in shards if name.startswith(f"{split}-")]
        self.begun: dict[str, Shard | None] = {}  # None: something is missing, `write` is to look again

    def waiting(self) -> Iterator[tuple[str, list[ThoughtDocument]]]:
        """Shards that are not written yet, one at a time."""
        for split in self.splits:
            yield from shards(self.prepared, split, lambda name: self.stage.done(name) is None)

    def documents(self) -> Iterator[ThoughtDocument]:
        return (document for _, part in self.waiting() for document in part)

    def asked(self) -> Iterator[ThoughtDocument]:
        """The documents to ask about. While a teacher takes its time for them, those are settled whose answers must
        long be there, and their shards written."""
        behind: deque[tuple[str, ThoughtDocument, int, bool]] = deque()
        waiting = 0
        for name, part in self.waiting():
            for n, document in enumerate(part, 1):
                yield document
                units = len(self.questions.units(document))
                behind.append((name, document, units, n == len(part)))
                waiting += units
                while waiting - behind[0][2] >= LAG * self.writer.config.teacher.concurrency:
                    name_, settled, units, last = behind.popleft()
                    self._settle(name_, settled, last)
                    waiting -= units

    def _settle(self, name: str, document: ThoughtDocument, last: bool) -> None:
        shard = self.begun.setdefault(name, Shard(self.writer))
        if shard is not None:
            try:
                shard.add(document, self.replies.get)
            except UserError:  # is raised by `write`, when nothing is under way any more
                shard = self.begun[name] = None
        if shard is not None and shard.open:
            shard = self.begun[name] = None
        if last:
            del self.begun[name]
            if shard is not None:
                self._close(name, shard)

    def write(self) -> int:
        """Writes every shard whose questions are all answered, failed ones too; how many questions are open."""
        still, begun = 0, self.begun
        self.begun = {}
        for name, part in self.waiting():
            shard = begun.get(name) or Shard(self.writer)
            for document in part[shard.added :]:
                shard.add(document, self.replies.get)
            still += shard.open
            self._close(name, shard)
        return still

    def _close(self, name: str, shard: Shard) -> None:
        if not shard.open and not (shard.failures and self.writer.config.failed == "error"):
            self.stage.write(name, [document_row(d) for d in shard.documents], DOCUMENTS, shard.counts)

    def failures(self) -> Iterator[dict[str, Any]]:
        """Every request that failed, of shards that are written and of those that are not."""
        for name in self.names:
            if (counts := self.stage.done(name)) is not None:
                yield from counts["failures"]
        for _, part in self.waiting():
            shard = Shard(self.writer)
            for document in part:
                shard.add(document, self.replies.get)
            yield from shard.failures

    def finish(self) -> dict[str, Any]:
        """Names what failed in failures.jsonl; the totals of all shards. Raises UserError where nothing was to fail."""
        kinds, first, path = Counter[str](), None, self.stage.shard("failures.jsonl")
        with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for failure in self.failures():
                kinds[failure["kind"]] += 1
                first = first or failure
                file.write(json.dumps(failure, ensure_ascii=False) + "\n")
        if first and self.writer.config.failed == "error":
            named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            raise UserError(
                f"{kinds.total()} of the questions failed ({named}), first document {first['doc_id']}, chunk "
                f"{first['chunk_index']}: {first['message'].rstrip('.')}. All else is answered and kept, and {path} "
                "names what failed. Run again to ask for that alone, or set synthesize.failed to raw or drop"
            )
        return self.writer.totals(self.stage.done(name) or {} for name in self.names)


def _ask(config: Synthesize, work: _Work, approve: Approve | None) -> None:
    """Asks, writes what is answered, and asks again where a reply was not good enough, until nothing is open."""
    expected = estimate(config, work.questions, work.documents, work.replies)
    if not work.names:
        raise UserError("there are no documents to ask about: set data.warm_start above 0")
    still = expected.open
    if still and approve is not None:
        approve(expected)
    if still:
        asking = Asking(config, work.questions, work.replies)
        with load.loaded(config, work.replies.notes) as teacher:
            while still:
                answered = asking.ask(teacher, work.asked(), still)
                if asking.stopped:
                    raise refuse(asking.stopped, work.replies)
                still = work.write()
                if still and not answered:
                    raise UserError(
                        f"{config.teacher.model} left all of {still:,} questions unanswered; run again to go on"
                    )
    work.write()


def synthesize_given(
    recipe: Recipe, method: str, prepared: Path, base: Path, splits: tuple[str, ...], folder: Path
) -> Manifest:
    """Shards of the given splits with the thoughts, or in the paraphrases, that came with the data.

    Raises UserError where none came.
    """
    inputs = {"prepare": _documents(prepared, base)}
    settings = [method, splits, *contamination.key(recipe.contamination)]
    if method != "oracle":
        settings += chunking.key(recipe.chunking)
    stage = Stage(folder, "synthesize", stage_key("synthesize", settings, inputs))
    if (manifest := stage.manifest) is not None:
        return manifest
    described = inputs["prepare"].shards
    units = {n: described[n]["rows"] for split in splits for n in described if n.startswith(f"{split}-")}
    counts, tally, made = Counter[str](), contamination.Tally(contamination.load(recipe.contamination)), {}
    with track("synthesize", sum(units.values()), "documents") as advance:
        work, told = Given(recipe, method, stage, prepared, base), lambda amount, counts: advance(amount)
        for result in executors.run(recipe, work, units, told):
            counts.update(result.counts["sums"])
            tally.add(result.counts["repeated"])
            made |= result.shards
    if method == "oracle" and not counts["thoughts"]:
        if not units:
            raise UserError("the warm start has no documents: raise data.warm_start, or lower data.held_out")
        raise UserError("no document of the warm start has a thought: set data.thought to the column that holds them")
    return stage.close(list(units), dict(counts) | tally.counts("thoughts"), made, base=inputs["prepare"].base)


@dataclass(frozen=True)
class Given:
    """Work for an executor: a unit is a document shard, with what came with its documents put in."""

    recipe: Recipe
    method: str
    stage: Stage
    prepared: Path
    base: Path

    def files(self, unit: str) -> list[str]:
        return [unit]

    def set_up(self, stack: contextlib.ExitStack) -> Do:
        codec = Codec(models.load_tokenizer(self.base / "model")[0])
        config, manifest = self.recipe.contamination, read_manifest(self.prepared)
        overlap, chunked = contamination.load(config), of_paraphrases(self.recipe.chunking)

        def do(unit: str, told: Told) -> None:
            tally = contamination.Tally(overlap)
            part = [document_of(row) for row in read_rows(self.prepared, manifest, unit)]
            if self.method == "oracle":
                rows = [with_oracle(document, codec, tally, config.remove) for document in part]
            else:
                rows = [
                    with_paraphrase(document, self.method, chunked, codec, tally, config.remove) for document in part
                ]
            found = [z for row in rows for kept in row.thoughts for z in kept]
            sums = {"documents": len(rows), "thoughts": len(found), "thought_tokens": sum(map(len, found))}
            counts = {"sums": sums, "repeated": tally.record()}
            self.stage.write(unit, [document_row(row) for row in rows], DOCUMENTS, counts)
            told(len(rows), {})

        return do


def with_oracle(
    document: ThoughtDocument, codec: Codec, tally: contamination.Tally, remove: bool = False
) -> ThoughtDocument:
    known = {n: text for n, text in oracle(document).items() if document.target[n]}
    known = {n: text for n, text in known.items() if not (tally.repeats(text) and remove)}
    thoughts = tuple((tuple(codec.encode(known[n])),) if n in known else () for n in range(len(document.chunks)))
    return replace(document, thoughts=thoughts, source="oracle")


def with_paraphrase(
    document: ThoughtDocument, method: str, config: Chunking, codec: Codec, tally: contamination.Tally,
    remove: bool = False,
) -> ThoughtDocument:  # fmt: skip
    """The document as it was where its paraphrase repeats an evaluation set and is to be removed.

    Raises UserError where the document brought none.
    """
    text = (document.meta.get("paraphrases") or {}).get(method)
    if text is None:
        raise UserError(f"document {document.id} came without a paraphrase for {method}: set synthesize.teacher.kind")
    if tally.repeats(text) and remove:
        return document
    return paraphrase(document, text, method, config, codec, {})
