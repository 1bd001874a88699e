"""train: the M-step, continued pretraining on documents with their thoughts.

    latent-thoughts train recipe.yaml --out RUN --iteration 1

Batches, dropout and schedule depend on the seed and the step alone, so a run that was killed and
resumed from its checkpoint ends with the same weights as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latent_thoughts import attention
from latent_thoughts import model as models
from latent_thoughts.attention import Extend
from latent_thoughts.config import Model, Train
from latent_thoughts.data import format, records
from latent_thoughts.data.packing import Batches, positions, unpadded
from latent_thoughts.optim import Muon
from latent_thoughts.runlog import Metrics, track
from latent_thoughts.store import Stage, atomic, read_manifest, stage_key
from latent_thoughts.types import Manifest, PackedRow, UserError

Source = tuple[Path, str]  # a completed stage's folder, and a split


@dataclass(slots=True)
class Counters:
    """Totals of a training run; `raw_tokens` are text tokens without thoughts and control tokens."""

    step: int = 0
    epoch: float = 0.0
    tokens: int = 0
    raw_tokens: int = 0
    thought_tokens: int = 0
    positions: int = 0  # padding included
    seconds: float = 0.0

    def add(self, rows: Sequence[PackedRow]) -> None:
        parts = np.concatenate([row.parts for row in rows])
        used = parts != format.Part.PADDING
        self.step += 1
        self.tokens += int(used.sum())
        self.thought_tokens += int((parts == format.Part.THOUGHT).sum())
        self.raw_tokens += int(((parts == format.Part.TARGET) | (parts == format.Part.CONTEXT)).sum())
        self.positions += len(parts)

    def progress(self, budget: tuple[str, float]) -> float:
        """Share of the budget that is spent."""
        unit, amount = budget
        spent = {"steps": self.step, "tokens": self.tokens, "raw_tokens": self.raw_tokens, "epochs": self.epoch}
        return spent[unit] / amount


@dataclass(slots=True)
class Trainer:
    """Everything a checkpoint holds: model, optimizers, batches and counters.

    Weights are float32 throughout; with `autocast` products are taken in bfloat16.
    """

    model: Any
    optimizers: list[torch.optim.Optimizer]
    batches: Batches
    config: Train
    seed: int
    autocast: bool = False
    branching: bool = False  # the model lets its attention be replaced by ours
    counters: Counters = field(default_factory=Counters)

    def step(self, rows: list[PackedRow], rate: float) -> dict[str, float]:
        """One optimizer step on a batch, at `rate` times the peak learning rate; returns its losses."""
        torch.manual_seed(int(np.random.SeedSequence([self.seed, self.counters.step]).generate_state(1)[0]))
        size = self.config.micro_rows or len(rows)
        targets = sum(int((row.labels != format.IGNORE).sum()) for row in rows)
        losses = torch.zeros(2, len(format.Part), dtype=torch.float64)
        for start in range(0, len(rows), size):
            losses += self._backward(rows[start : start + size], targets)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate
            optimizer.step()
            optimizer.zero_grad()
        total, count = losses
        if not math.isfinite(float(norm)):
            raise UserError(
                f"training diverged at step {self.counters.step}: gradient norm {float(norm)}; lower train.lr"
            )
        mean = {"loss": total.sum() / count.sum(), "norm": norm}
        for part in (format.Part.THOUGHT, format.Part.TARGET, format.Part.CONTEXT):
            if count[part]:
                mean[f"loss_{part.name.lower()}"] = total[part] / count[part]
        return {name: float(value) for name, value in mean.items()}

    def _backward(self, rows: list[PackedRow], targets: int) -> torch.Tensor:
        """Adds the gradient of the batch's mean loss; returns (sum, count) of losses by part."""
        packed = unpadded(rows)
        labels, parts = torch.from_numpy(packed.labels), torch.from_numpy(packed.parts)
        carries = (labels != format.IGNORE).nonzero()[:, 0]
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.logits(packed, carries - 1)
        losses = torch.nn.functional.cross_entropy(logits.float(), labels[carries].to(logits.device), reduction="none")
        (losses.sum() / targets).backward()
        part, sums = parts[carries], torch.zeros(2, len(format.Part), dtype=torch.float64)
        sums[0].index_add_(0, part, losses.detach().double().cpu())
        sums[1].index_add_(0, part, torch.ones(len(part), dtype=torch.float64))
        return sums

    def logits(self, packed: PackedRow, wanted: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) at the N wanted positions of a row; none of its documents sees another."""
        device, place = self.model.device, positions(packed)
        sizes = np.diff(np.flatnonzero(place == 0), append=len(place)).tolist()
        ids = torch.from_numpy(packed.ids).to(device)
        if self.branching:
            return self.model(
                input_ids=ids[None],
                position_ids=torch.from_numpy(place).to(device)[None],
                use_cache=False,
                logits_to_keep=wanted.to(device),
                branches=Extend([()] * len(sizes), sizes, [False] * len(sizes), device),
            ).logits[0]
        # A document a row: in a causal model nothing sees the padding behind it, whatever its layers are.
        padded = torch.nn.utils.rnn.pad_sequence(list(ids.split(sizes)), batch_first=True)
        rows = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
        return self.model(input_ids=padded, use_cache=False).logits[rows[wanted], torch.from_numpy(place)[wanted]]

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "batches": self.batches.state(),
            "counters": asdict(self.counters),
        }
        with atomic(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path, optimizer_only: bool = False) -> None:
        """Restores a checkpoint; with `optimizer_only`, weights and optimizers of an earlier stage."""
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if not optimizer_only:
            self.batches.load_state(state["batches"])
            self.counters = Counters(**state["counters"])


def train(
    config: Train,
    model_config: Model,
    base: Path,
    sources: Sequence[Source],
    folder: Path,
    seed: int,
    continue_from: Path | None = None,
) -> Manifest:
    """Trains from `base`/model on the sources' documents and exports `folder`/model.

    `continue_from` is an earlier train stage, whose weights and optimizer state from before its
    decay are gone on with (continual regime). Raises UserError for missing input and divergence.
    """
    inputs = {f"{n}:{split}": read_manifest(path) for n, (path, split) in enumerate(sources)}
    inputs["base"] = read_manifest(base)
    if continue_from is not None:
        inputs["continue_from"] = read_manifest(continue_from)
    settings = config.model_dump(exclude={"checkpoint_steps", "log_steps", "micro_rows"})
    stage = Stage(folder, "train", stage_key("train", [settings, model_config.dtype, seed], inputs))
    if (manifest := stage.manifest) is not None:
        return manifest
    trainer = _trainer(config, model_config, base, sources, seed)
    if (folder / "checkpoint.pt").exists():
        trainer.load(folder / "checkpoint.pt")
    elif continue_from is not None:
        trainer.load(continue_from / "stable.pt", optimizer_only=True)
    loop(trainer, folder)
    tokenizer, _ = models.load_tokenizer(base / "model")
    models.save(trainer.model.to(getattr(torch, model_config.dtype)), tokenizer, folder / "model")
    manifest = stage.close([], asdict(trainer.counters))
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return manifest


def _trainer(config: Train, model_config: Model, base: Path, sources: Sequence[Source], seed: int) -> Trainer:
    documents = [document for path, split in sources for document in records.documents(path, split)]
    if not documents:
        raise UserError("there are no documents to train on: the E-step accepted no thought, or the corpus is empty")
    _, controls = models.load_tokenizer(base / "model")
    model = models.load(base / "model", model_config, "float32").train()
    if config.dropout:
        models.add_dropout(model, config.dropout)
    batches, autocast = Batches(documents, controls, config, seed), model_config.dtype == "bfloat16"
    branching = attention.install(model)
    return Trainer(model, optimizers(model, config), batches, config, seed, autocast, branching)


def loop(trainer: Trainer, folder: Path) -> None:
    """Steps until the budget is spent, with metrics and checkpoints in `folder`."""
    config, counters = trainer.config, trainer.counters
    metrics = Metrics(folder / "metrics.jsonl", counters.step)
    began, before, stable = time.perf_counter(), counters.seconds, False
    total = config.budget[1]
    with track("train", total, config.budget[0]) as advance:
        done = min(total, counters.progress(config.budget) * total)
        advance(done)
        while (progress := counters.progress(config.budget)) < 1:
            if config.schedule == "wsd" and not stable and progress >= 1 - config.decay_share:
                trainer.save(folder / "stable.pt")
                stable = True
            rate = learning_rate(config, counters.step, progress)
            rows = trainer.batches.next_batch()
            losses = trainer.step(rows, rate)
            counters.add(rows)
            counters.epoch = trainer.batches.epoch + trainer.batches.cursor / len(trainer.batches.documents)
            counters.seconds = before + time.perf_counter() - began
            now = min(total, counters.progress(config.budget) * total)
            advance(now - done, loss=losses["loss"])
            done = now
            if counters.step % config.log_steps == 0:
                metrics.write({**asdict(counters), "lr": config.lr * rate, **losses})
            if counters.step % config.checkpoint_steps == 0:
                trainer.save(folder / "checkpoint.pt")
    metrics.close()


def learning_rate(config: Train, step: int, progress: float) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine to 0, constant, or warm-up-stable-decay."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    if config.schedule == "wsd":
        return warm * min(1.0, max(0.0, 1 - progress) / config.decay_share) if config.decay_share else warm
    return warm


def optimizers(model: Any, config: Train) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon (Jordan et al. 2024) on the hidden matrices and AdamW on everything else."""
    outside = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in parameters if config.optimizer == "muon" and p.ndim == 2 and id(p) not in outside]
    rest = [p for p in parameters if all(p is not q for q in hidden)]
    built: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    ]
    if hidden:
        built.append(Muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in built:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return built
