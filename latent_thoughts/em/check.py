"""What can be known right after `prepare`, so that nobody trains a warm start first to be told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from latent_thoughts.data import records
from latent_thoughts.data.format import room_for_context
from latent_thoughts.em.run import Run
from latent_thoughts.engines.joint import tasks
from latent_thoughts.model import load_tokenizer
from latent_thoughts.stages.evaluate.held_out import gold
from latent_thoughts.stages.sample import corpus_shards
from latent_thoughts.store import read_manifest
from latent_thoughts.types import UserError


def check(run: Run) -> None:
    """Raises UserError where a later stage of `em` would: for a split without documents, chunks that do not fit, and
    answers that the recipe's pattern does not find."""
    recipe, manifest = run.recipe, read_manifest(run.prepared)
    if not manifest.counts.get("held_out_documents"):
        raise UserError("no document is held out: raise data.held_out, or data.limit")
    for one in _loops(run):
        em = one.recipe.em
        if em.iterations:
            corpus_shards(manifest, run.prepared, em.iterations if em.regime == "continual" else 1)
    if recipe.evaluate.answer is not None:
        for document in records.documents(run.prepared, "held_out")[: recipe.evaluate.documents]:
            gold(recipe.evaluate.answer, document)
    for one in _loops(run):
        _fit(one)


def _loops(run: Run) -> Iterator[Run]:
    yield run
    for name in run.recipe.em.variants:
        yield replace(run, recipe=run.recipe.variant(name))


def _fit(run: Run) -> None:
    """Reads the documents only where chunking alone does not say that all fit."""
    sample, longest = run.recipe.sample, range(run.recipe.chunking.max_tokens)
    if room_for_context(longest, sample.max_thought_tokens, sample.max_tokens) >= 1:
        return
    _, controls = load_tokenizer(run.base / "model")
    for split in ("corpus", "held_out"):
        for _, documents in records.shards(run.prepared, split):
            for d in documents:
                for _ in tasks(d.chunks, d.target, controls, sample):
                    pass
