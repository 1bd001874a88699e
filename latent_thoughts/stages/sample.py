"""sample: the E-step over the corpus. One posterior shard and one thought shard a document shard.

latent-thoughts sample recipe.yaml --out RUN --iteration 1
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from latent_thoughts import executors, weights
from latent_thoughts import model as models
from latent_thoughts.config import Recipe, Sample
from latent_thoughts.data import contamination, records
from latent_thoughts.data.tokenizer import Codec, Controls
from latent_thoughts.engines.base import Engine
from latent_thoughts.engines.joint import Seeds, infer, tasks
from latent_thoughts.engines.load import loaded_engine, loaded_scorer
from latent_thoughts.executors.work import Do, Told
from latent_thoughts.places import place
from latent_thoughts.progress import track
from latent_thoughts.store import Stage, read_manifest, same_base, stage_key
from latent_thoughts.types import Manifest, Posterior, ThoughtDocument, UserError


def sample(
    recipe: Recipe,
    config: Sample,
    model: Path,
    prepared: Path,
    folder: Path,
    iteration: int,
    slices: tuple[int, int] = (0, 1),
    made: Callable[[Path, dict[str, dict[str, Any]]], None] = lambda folder, shards: None,
) -> Manifest:
    """Infers a thought for every target chunk of the corpus with the model of train stage `model`.

    `made` is told of thought shards as they are there: the folder, and what the manifest will say of them.

    `slices` = (n, of) takes every of-th shard from the n-th (continual regime). Shards that are
    there already are kept. Raises UserError where sampler and scorer disagree beyond `max_gap`, and
    where the documents are of another base model than `model`'s.
    """
    inputs = {"model": read_manifest(model), "prepare": read_manifest(prepared)}
    same_base(inputs["model"], inputs["prepare"])
    raw_model = place(config.raw_model) if config.raw_model else None
    if raw_model:
        inputs["raw_model"] = read_manifest(raw_model)
    temperature = config.temperature_at(iteration, recipe.em.iterations)
    config = config.model_copy(update={"k": config.k_at(iteration, recipe.em.iterations)})
    elsewhere = {"preset", "last_k", "temperature", "raw_model", "max_gap"}  # in the key, or without effect on results
    settings = config.model_dump(exclude=elsewhere)
    engines = recipe.engine.model_dump(include={"kind", "scorer"})
    everything = [settings, temperature, iteration, recipe.seed, recipe.model.dtype, slices, engines]
    everything += contamination.key(recipe.contamination)
    key = stage_key("sample", everything, inputs)
    stage = Stage(folder, "sample", key)
    if (manifest := stage.manifest) is not None:
        return manifest
    names = corpus_shards(inputs["prepare"], prepared, slices[1])[slices[0] :: slices[1]]
    if raw_model and _vocabulary(raw_model) != _vocabulary(model):
        raise UserError(f"sample.raw_model {raw_model} has another tokenizer than {model}: train it from the same base")
    work = Shards(recipe, config, stage, model, prepared, Seeds(recipe.seed, iteration), temperature)
    tally = contamination.Tally(contamination.load(recipe.contamination))
    totals, live, described = Totals(), Totals(), {}
    sizes = {name: inputs["prepare"].shards[name]["rows"] for name in names}
    with track("sample", sum(sizes.values()), "documents") as advance:

        def told(amount: float, counts: Mapping[str, Any]) -> None:
            live.add(counts)
            advance(amount, **live.shown())

        for result in executors.run(recipe, work, sizes, told):
            totals.add(result.counts)
            tally.add(result.counts["repeated"])
            described |= result.shards
            made(folder, {result.unit: result.shards[result.unit]})
    thought_names = [_posteriors(name) for name in names]
    figures = {**totals.sums, **health(totals.sums), **tally.counts("thoughts")}
    return stage.close(names + thought_names, figures, described, base=inputs["prepare"].base)


def _vocabulary(model: Path) -> dict[str, int]:
    return models.load_tokenizer(model / "model")[0].get_vocab()


def _posteriors(name: str) -> str:
    """The shard beside a thought shard."""
    return name.replace("corpus-", "posterior-")


def corpus_shards(manifest: Manifest, prepared: Path, slices: int) -> list[str]:
    """Names of the corpus's shards. Raises UserError where there are none, or too few for so many slices, at the first
    and not where none is left."""
    names = [name for name in manifest.shards if name.startswith("corpus-")]
    if not names:
        raise UserError(
            f"{prepared} holds no corpus: all documents are the warm start's or held out: lower data.warm_start or "
            "data.held_out"
        )
    if len(names) < slices:
        raise UserError(
            f"{prepared} holds {len(names)} corpus shards, too few for {slices} iterations with a slice each: lower "
            "em.iterations or data.shard_documents"
        )
    return names


@dataclass(frozen=True)
class Shards:
    """The stage's work for an executor: a unit is a document shard, and the thought shard made of it."""

    recipe: Recipe
    config: Sample
    stage: Stage
    model: Path
    prepared: Path
    seeds: Seeds
    temperature: float

    def files(self, unit: str) -> list[str]:
        return [unit, _posteriors(unit)]

    def set_up(self, stack: contextlib.ExitStack) -> Do:
        tokenizer, controls = models.load_tokenizer(self.model / "model")
        worker = Worker(self.config, self.seeds, controls, Codec(tokenizer), self.temperature)
        recipe, raw = self.recipe, self.config.raw_model
        if raw and (recipe.engine.kind, recipe.engine.scorer) == ("vllm", "vllm"):  # two, in one GPU's memory
            half = recipe.engine.model_copy(update={"vllm_memory": recipe.engine.vllm_memory / 2})
            recipe = recipe.model_copy(update={"engine": half})
        engine = stack.enter_context(loaded_engine(recipe, self.model / "model"))
        if raw:
            worker.raw = stack.enter_context(loaded_scorer(recipe, place(raw) / "model"))
        worker.overlap = contamination.load(self.recipe.contamination)
        worker.remove = self.recipe.contamination.remove
        manifest = read_manifest(self.prepared)

        def do(unit: str, told: Told) -> None:
            documents = [records.document_of(row) for row in records.read_rows(self.prepared, manifest, unit)]
            _write_shard(self.stage, unit, documents, worker, engine, told)

        return do


Each = Callable[[Posterior, float], None]  # told of every posterior, and of the documents it stands for


class Totals:
    """Sums of counts, and what of them is shown while the stage runs."""

    def __init__(self) -> None:
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.began = time.perf_counter()

    def add(self, counts: Mapping[str, Any]) -> None:
        for figure, value in counts.items():
            if figure != "repeated":  # which is a table
                self.sums[figure] += value

    def shown(self) -> dict[str, float]:
        figures, seconds = health(self.sums), time.perf_counter() - self.began
        named = {"ess": figures["mean_ess"], "accepted": figures["accepted_share"], "gain": figures["gain_per_token"]}
        named |= {"chunks/s": self.sums["chunks"] / seconds, "tokens/s": self.sums["draw_tokens"] / seconds}
        return {name: value for name, value in named.items() if value is not None}


def _write_shard(
    stage: Stage, name: str, documents: Sequence[ThoughtDocument], worker: Worker, engine: Engine, told: Told
) -> None:
    began = time.perf_counter()
    each: Each = lambda posterior, share: told(share, worker.counts([], [posterior]))  # noqa: E731
    posteriors, tally = worker.clean(worker.posteriors(engine, documents, each))
    thoughts = worker.choose(documents, posteriors)
    counts: dict[str, Any] = {**worker.counts(documents, posteriors), "repeated": tally.record()}
    counts |= {"documents": len(documents), "documents_left_out": len(documents) - len(thoughts)}
    counts["seconds"] = time.perf_counter() - began
    decode = worker.codec.decode
    stage.write(_posteriors(name), [records.posterior_row(p, decode) for p in posteriors], records.POSTERIORS, {})
    # The thought shard comes last: where it is there, its posteriors are too.
    stage.write(name, [records.document_row(d) for d in thoughts], records.DOCUMENTS, counts)


class Worker:
    """The E-step on lists of documents; knows nothing of shards."""

    def __init__(self, config: Sample, seeds: Seeds, controls: Controls, codec: Codec, temperature: float):
        self.config, self.seeds, self.controls = config, seeds, controls
        self.codec, self.temperature = codec, temperature
        self.raw: Engine | None = None
        self.overlap: contamination.Overlap | None = None  # with the evaluation sets
        self.remove = False  # accepted thoughts that repeat them

    def posteriors(self, engine: Engine, documents: Sequence[ThoughtDocument], each: Each) -> list[Posterior]:
        todo = [t for d in documents for t in tasks(d.chunks, d.target, self.controls, self.config)]
        share = len(documents) / max(1, len(todo))
        told = lambda posterior: each(posterior, share)  # noqa: E731
        found = infer(engine, todo, self.controls, self.config, self.seeds, self.temperature, told, self.raw)
        gaps = [p.gap for p in found if p.gap is not None]
        if gaps and not (gap := float(np.mean(gaps))) <= self.config.max_gap:  # NaN among it
            raise UserError(f"sampler and scorer differ by {gap:.3g} nats a thought, more than sample.max_gap")
        return found

    def clean(self, posteriors: Sequence[Posterior]) -> tuple[list[Posterior], contamination.Tally]:
        """What accepted thoughts repeat of the evaluation sets; without those, where they are to be removed."""
        tally, cleaned = contamination.Tally(self.overlap), []
        for p in posteriors:
            repeats = {n: tally.repeats(self.codec.decode(p.draws[n].draw.ids)) for n in p.kept}
            cleaned.append(replace(p, kept=tuple(n for n in p.kept if not (repeats[n] and self.remove))))
        return cleaned, tally

    def choose(self, documents: Sequence[ThoughtDocument], posteriors: list[Posterior]) -> list[ThoughtDocument]:
        """Documents with their chosen thoughts. One with a rejected chunk is left out, or keeps it raw."""
        chosen = {(p.chunk.doc_id, p.chunk.index): tuple(p.draws[n].draw.ids for n in p.kept) for p in posteriors}
        kept = []
        for document in documents:
            thoughts = tuple(chosen.get((document.id, c.index), ()) for c in document.chunks)
            missing = any(t and not z for t, z in zip(document.target, thoughts, strict=True))
            if missing and self.config.rejected == "skip":
                continue
            kept.append(replace(document, thoughts=thoughts, source="em"))
        return kept

    def counts(self, documents: Sequence[ThoughtDocument], posteriors: list[Posterior]) -> dict[str, float]:
        """Sums over chunks and draws, which add up over shards; `health` turns them into means."""
        counts: defaultdict[str, float] = defaultdict(float)
        oracle = {(d.id, index): text for d in documents for index, text in records.oracle(d).items()}
        for p in posteriors:
            finished = [d.draw for d in p.draws if d.draw.finished]
            tokens = len(p.chunk.ids)
            counts["chunks"] += 1
            counts["text_tokens"] += tokens
            counts["draws"] += len(p.draws)
            counts["unfinished"] += len(p.draws) - len(finished)
            counts["all_unfinished"] += not finished
            counts["draw_tokens"] += sum(len(d.draw.ids) for d in p.draws)
            counts["distinct"] += len({d.ids for d in finished})
            counts["ess"] += weights.effective_sample_size(p.log_weights)
            counts["max_share"] += float(weights.normalised(p.log_weights).max())
            counts["accepted"] += p.chosen >= 0
            counts["kept"] += len(p.kept)
            if p.gap is not None:
                counts["gap"] += p.gap
                counts["gap_chunks"] += 1
            counts["raw_logprob"] += p.raw_logprob
            if p.chosen >= 0:
                counts["gain"] += float(p.gains[p.chosen])
                counts["gain_tokens"] += tokens
            if (right := oracle.get((p.chunk.doc_id, p.chunk.index))) is not None:
                ids = tuple(self.codec.encode(right))
                counts["oracle_draws"] += len(p.draws)
                counts["oracle_right"] += sum(d.ids == ids for d in finished)
                counts["oracle_chosen"] += p.chosen >= 0
                counts["oracle_chosen_right"] += p.chosen >= 0 and p.draws[p.chosen].draw.ids == ids
        return dict(counts)


def health(totals: Mapping[str, float]) -> dict[str, float | None]:
    """Means of a stage's health figures; None where there is nothing to average."""

    def mean(name: str, over: str) -> float | None:
        return totals.get(name, 0) / totals[over] if totals.get(over) else None

    return {
        "mean_ess": mean("ess", "chunks"),
        "mean_distinct": mean("distinct", "chunks"),
        "mean_max_share": mean("max_share", "chunks"),
        "unfinished_share": mean("unfinished", "draws"),
        "thought_tokens": mean("draw_tokens", "draws"),
        "accepted_share": mean("accepted", "chunks"),
        "left_out_share": mean("documents_left_out", "documents"),
        "gain_per_token": mean("gain", "gain_tokens"),
        "mean_gap": mean("gap", "gap_chunks"),
        "thought_correct_sampled": mean("oracle_right", "oracle_draws"),
        "thought_correct_chosen": mean("oracle_chosen_right", "oracle_chosen"),
    }
