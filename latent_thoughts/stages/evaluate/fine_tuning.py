"""A task's training split as documents in the form that it is asked in, for the M-step to train on (method, section 7).

latent   BOS question  S P reasoning E  answer EOS
cot      BOS question  reasoning answer EOS
direct   BOS question  answer EOS
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latent_thoughts import model as models
from latent_thoughts.config import BUDGETS, FineTune, Recipe, Train, parse
from latent_thoughts.data import records
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.stages.evaluate import tasks
from latent_thoughts.store import Stage, read_manifest, stage_key
from latent_thoughts.types import Chunk, Manifest, ThoughtDocument

SPLIT, NAME = "train", "train-00000.parquet"
BATCH, EPOCHS = 64, 5  # the paper's; a batch in documents
PAPER: dict[str, Any] = {"lr": 1e-4, "loss_on": "targets", "weight_decay": 0.01, "sequence_length": 1024}


def training(config: FineTune, documents: Manifest) -> Train:
    """The M-step's settings; as many rows a batch as hold about 64 documents, unless the recipe says."""
    layout = {"layout": "prior" if config.form == "latent" else "raw"}
    budget = {} if any(name in config.train for name in BUDGETS) else {"epochs": EPOCHS}
    train = parse(Train, {**PAPER, **budget, **layout, **config.train}, "evaluate.fine_tune.train")
    if "rows" in config.train:
        return train
    tokens = BATCH * documents.counts["tokens"] / documents.counts["documents"]
    return train.model_copy(update={"rows": max(1, round(tokens / train.sequence_length))})


def documents(recipe: Recipe, config: FineTune, model: Path, folder: Path) -> Manifest:
    """Writes the training split's documents. Raises UserError for a data set that is missing."""
    benchmark = config.asked
    data = tasks.files_key(benchmark)
    settings = [config.model_dump(include={"task", "form", "limit"}), data]
    stage = Stage(folder, "fine_tune", stage_key("fine_tune", settings, {"model": read_manifest(model)}))
    if (manifest := stage.manifest) is not None:
        return manifest
    codec = Codec(models.load_tokenizer(model / "model")[0])
    made = [document(codec, n, parts, config.form) for n, parts in enumerate(tasks.solved(benchmark, config.limit))]
    stage.write(NAME, [records.document_row(d) for d in made], records.DOCUMENTS, {})
    tokens = sum(_tokens(d) for d in made)
    return stage.close([NAME], {"documents": len(made), "tokens": tokens})


def document(codec: Codec, number: int, parts: tasks.Parts, form: str) -> ThoughtDocument:
    answer = f"{parts.reasoning if form == 'cot' else ''} {parts.answer}"
    thoughts = (tuple(codec.encode(parts.reasoning)),) if form == "latent" else ()
    name, start = f"train-{number:05}", len(parts.question)
    chunks = (
        Chunk(name, 0, 0, parts.question, tuple(codec.encode(parts.question))),
        Chunk(name, 1, start, answer, tuple(codec.encode(answer))),
    )
    return ThoughtDocument(name, chunks, ((), thoughts), (False, True), "task")


def _tokens(document: ThoughtDocument) -> int:
    def parts() -> Iterator[int]:
        yield from (len(c.ids) for c in document.chunks)
        yield from (len(z) for kept in document.thoughts for z in kept)

    return sum(parts())
