"""train: the M-step, continued pretraining on documents with their thoughts.

    latent-thoughts train recipe.yaml --out RUN --iteration 1
    torchrun --nproc-per-node 8 -m latent_thoughts.cli train recipe.yaml --out RUN --iteration 1

Batches, dropout and schedule depend on the seed and the step alone, so a run that was killed and
resumed from its checkpoint ends with the same weights as one that was not (on GPUs up to rounding: some of their
kernels add up in any order).
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from latent_thoughts import model as models
from latent_thoughts import parallel, transfer
from latent_thoughts.config import UNREAD, Model, Train
from latent_thoughts.data import corpus
from latent_thoughts.data.corpus import Corpus, Source
from latent_thoughts.data.packing import Batches
from latent_thoughts.machine import free_memory, give_freed_memory_back, keep_freed_memory
from latent_thoughts.optim import optimizers
from latent_thoughts.parallel import Ranks, all_or_none
from latent_thoughts.places import bench, remote
from latent_thoughts.progress import sent_to
from latent_thoughts.provenance import model_card
from latent_thoughts.stages.train import checkpoint, layers, lean
from latent_thoughts.stages.train.loop import loop, terminated
from latent_thoughts.stages.train.objective import Objective, logits_held
from latent_thoughts.stages.train.trainer import Trainer
from latent_thoughts.stages.train.whole import Whole
from latent_thoughts.store import Stage, base_of, read_manifest, same_base, stage_key
from latent_thoughts.types import Interrupted, Manifest, UserError

__all__ = ["Source", "train"]

ABOUT = ("evaluate", "tasks", "fine_tune")  # what is found out about a model, beside it


def train(
    config: Train,
    model_config: Model,
    base: Path,
    sources: Sequence[Source],
    folder: Path,
    seed: int,
    continue_from: Path | None = None,
    held_out: Source | None = None,
) -> Manifest:
    """Trains from `base`/model on the sources' documents and exports `folder`/model.

    `continue_from` is an earlier train stage, whose weights and optimizer state from before its
    decay are gone on with (continual regime). `held_out` gives `train.held_out` documents, whose loss tells
    the best checkpoint. Under torchrun and Ray Train all processes call this. Raises UserError for missing input,
    documents of another base model and divergence, Interrupted on SIGTERM.
    """
    inputs = {f"{n}:{source.split}": read_manifest(source.folder) for n, source in enumerate(sources)}
    inputs["base"] = read_manifest(base)
    if continue_from is not None:
        inputs["continue_from"] = read_manifest(continue_from)
    if config.export == "best" and held_out is not None:
        inputs["held_out"] = read_manifest(held_out.folder)
    for n, source in enumerate(sources):
        same_base(inputs["base"], inputs[f"{n}:{source.split}"])
    key = stage_key("train", [_settings(config, sources), model_config.dtype, seed], inputs)
    with parallel.ranks() as ranks, terminated() as stopped, contextlib.ExitStack() as stack:
        if not ranks.agree(json.dumps([key, config.model_dump(mode="json")])):
            raise UserError("the processes of this training have different settings or inputs: start all with the same")
        if not ranks.main:
            stack.enter_context(sent_to(lambda _: None))
        with all_or_none(ranks):
            if ranks.main:
                Stage(folder, "train", key, about=ABOUT)
        work, done = bench(folder), ranks.told((folder / "manifest.json").exists)
        with all_or_none(ranks):
            if not done and (ranks.main or (ranks.first_here and remote(folder))):  # a bench is one machine's
                corpus.write(sources, work / "documents.arrow")
                if config.held_out and held_out is not None:
                    corpus.write([held_out], work / "held_out.arrow")
        if not done:
            trainer = set_up(config, model_config, base, folder, seed, ranks)
            _go_on(trainer, folder, continue_from)
            _tell_of_skipped(config, folder, ranks, trainer.counts)
            held = _first(work / "held_out.arrow", config.held_out) if held_out is not None else None
            if config.export == "best" and held is None:
                raise UserError("train.export: best, but there are no held-out documents to tell which is best")
            _tell_of_router(trainer.objective.model, ranks)
            loop(trainer, folder, held, stopped)
            counts = _export(trainer, model_config, base, folder)
            if ranks.main:
                Stage(folder, "train", key).close([], counts, model="model", base=base_of(inputs["base"]))
        if ranks.main:  # what only an unfinished stage needs
            for path in folder.glob("*.arrow"):
                path.unlink()
            for path in folder.glob("checkpoint_*"):
                checkpoint.remove(path)
        if ranks.first_here:
            transfer.forget(folder)
        if ranks.any(stopped()):
            raise Interrupted("stopped when training was done")
        ranks.wait()
    return read_manifest(folder)


def _go_on(trainer: Trainer, folder: Path, continue_from: Path | None) -> None:
    """From the stage's last checkpoint, else from what an earlier one left. Raises UserError where that is nothing."""
    told, stable = trainer.ranks.told, folder / "stable"
    if saved := told(lambda: checkpoint.found(folder)[-1:]):
        trainer.load(saved[0])
        if trainer.decaying and not told(lambda: checkpoint.there(stable) and bool(checkpoint.check(stable))):
            raise UserError(
                f"{stable}, the weights from before the decay, is missing, and {saved[0]} is from within it: remove "
                "that one too, to train from before the decay on"
            )
    elif continue_from is not None:
        if not told(lambda: checkpoint.there(continue_from / "stable")):
            raise UserError(f"{continue_from} has no weights from before a decay: train it with schedule: wsd")
        trainer.load(continue_from / "stable", optimizer_only=True)


def _tell_of_skipped(config: Train, folder: Path, ranks: Ranks, counts: dict[str, Any]) -> None:
    """Says which steps it is too late to skip."""
    late = [step for step in config.skip if step < counts["step"] and step not in counts.get("skipped", [])]
    if late and ranks.main:
        print(f"latent-thoughts: train.skip={late} comes too late: {folder} has been trained on that", file=sys.stderr)


def _tell_of_router(model: Any, ranks: Ranks) -> None:
    """Says that a loss which transformers' own Trainer would add is not trained on. (How even a router is, is no sum
    over passes: what micro_rows and processes a batch is shared out to would change it.)"""
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0) and ranks.main:
        why = "the router's load-balancing loss, which the model's configuration asks for, is not trained on"
        print(f"latent-thoughts: {why}", file=sys.stderr)


def _settings(config: Train, sources: Sequence[Source]) -> list[Any]:
    """What of the settings the result depends on."""
    # with export: best the checkpoints are what is chosen from
    unread = {*UNREAD, "held_out"} if config.export == "last" else {*UNREAD} - {"checkpoint_steps"}
    slices = [source.slice for source in sources if source.slice != (0, 1)]
    return [config.model_dump(exclude=unread), [source.weight for source in sources], *([slices] if slices else [])]


def set_up(config: Train, model_config: Model, base: Path, folder: Path, seed: int, ranks: Ranks) -> Trainer:
    """A trainer at step 0, for the documents in `folder`. Raises UserError where there is nothing to train on."""
    documents, device = Corpus.open(bench(folder) / "documents.arrow"), models.device_of(model_config)
    _check(config, documents, device, ranks)
    half = model_config.dtype == "bfloat16"
    if ranks.size == 1:
        if device.index is not None:  # of several, the one whose seed and memory torch is asked for by no name
            torch.cuda.set_device(device)
        keep_freed_memory()
        objective = _objective(config, model_config, base, device)
    else:
        mesh = parallel.mesh(device, ranks, config.shard)

        def sharded() -> Objective:
            """Whole on the CPU first: a GPU may have room for a shard alone."""
            on_cpu = model_config.model_copy(update={"device": "cpu"})
            objective = _objective(config, on_cpu, base, device, check=ranks.first_here)
            parallel.shard(objective, layers.blocks(objective.model), mesh, half)
            give_freed_memory_back()
            return objective

        objective = parallel.in_turn(ranks, sharded, max(1, free_memory() // 2 // _size(base / "model")))
        keep_freed_memory()
    _, controls = models.load_tokenizer(base / "model")
    unit, amount = config.budget
    batches = Batches(documents, controls, config, seed, ends=amount if unit == "epochs" else math.inf)
    return Trainer(objective, optimizers(objective.model, config), batches, config, seed, half, ranks)


def _check(config: Train, documents: Corpus, device: torch.device, ranks: Ranks) -> None:
    """Raises UserError for settings that do not go together, with these documents or here."""
    if not (documents.weights > 0).any():
        raise UserError("there are no documents to train on: the E-step accepted no thought, or the corpus is empty")
    if config.loss_on == "targets" and not documents.targets:
        raise UserError("train.loss_on: targets, but thoughts are meant for none of the chunks: take loss_on: all")
    thoughts_alone = config.layout == "thoughts" and not config.raw_share
    if config.budget[0] == "raw_tokens" and thoughts_alone and not documents.thoughtless:
        raise UserError(
            "train.layout: thoughts spends no raw_tokens where all chunks have thoughts: give tokens or epochs"
        )
    if config.rows % ranks.size:
        raise UserError(f"train.rows = {config.rows} cannot be shared out among {ranks.size} processes")
    if config.compile == "whole" and (ranks.size > 1 or config.checkpoint_activations):
        raise UserError("train.compile: whole is for one process without checkpoint_activations: take blocks")
    if config.compile and device.type == "cpu" and layers.compiler() is None:
        raise UserError("train.compile needs a C++ compiler (g++) on a CPU: install one, or leave the setting out")


def _size(folder: Path) -> int:
    """Bytes of a model's weights in float32, of which its files may hold halves."""
    return 2 * sum(path.stat().st_size for path in transfer.local(folder).glob("*.safetensors"))


def _objective(config: Train, model_config: Model, base: Path, device: torch.device, check: bool = True) -> Objective:
    """The base model in float32 with its loss, as it will be trained on `device`."""
    model = models.load(base / "model", model_config, "float32", check).train()
    models.check_positions(model, config.sequence_length, "train.sequence_length")
    if config.dropout:
        layers.add_dropout(model, config.dropout)
    if config.checkpoint_activations:
        layers.checkpoint_activations(model)
    if config.compile is None:
        lean.install(model)
    logits = logits_held(config, device)
    whole = Whole(model, config.sequence_length, logits, config.dropout) if config.compile == "whole" else None
    objective = Objective(model, logits, whole)
    if config.compile == "blocks":
        objective.compile_blocks(device)
    return objective


def _first(path: Path, count: int) -> Corpus | None:
    """The first documents of a corpus; all of them where there are fewer."""
    if not count:
        return None
    whole = Corpus.open(path)
    return Corpus.of(whole[n] for n in range(min(count, len(whole)))) if len(whole) else None


def _export(trainer: Trainer, model_config: Model, base: Path, folder: Path) -> dict[str, Any]:
    """Writes the plain Hugging Face folder: averaged weights where there are averages, of the best checkpoint
    where that is asked for. Returns what was spent; with the best checkpoint's step, where that was chosen."""
    counts = trainer.counts
    if trainer.config.export == "best" and (best := trainer.ranks.told(lambda: checkpoint.best(folder))):
        trainer.load(best, optimizer_only=True)
        counts["exported_step"] = checkpoint.step_of(best)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with trainer.averaged():
        weights = get_model_state_dict(trainer.objective, options=options)
        if not trainer.ranks.main:
            return counts
        plain = models.load(base / "model", model_config.model_copy(update={"device": "cpu"}))
        plain.load_state_dict({n.removeprefix("model."): w for n, w in weights.items() if n.startswith("model.")})
    tokenizer, _ = models.load_tokenizer(base / "model")
    models.save(plain, tokenizer, folder / "model", model_card(trainer.config, model_config, counts, trainer.seed))
    return counts
