"""What is trained, and everything a step changes."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from latent_thoughts.config import Train
from latent_thoughts.data import format
from latent_thoughts.data.corpus import Corpus
from latent_thoughts.data.packing import Batches
from latent_thoughts.parallel import Ranks
from latent_thoughts.stages.train import checkpoint, loader
from latent_thoughts.stages.train.figures import Counters
from latent_thoughts.stages.train.objective import Objective
from latent_thoughts.types import PackedRow, UserError

PARTS = len(format.Part)


@dataclass(slots=True)
class Trainer:
    """Everything a checkpoint holds: model, optimizers, averages, the loader's place and counters.

    Weights are float32 throughout; with `autocast` products are taken in bfloat16.
    """

    objective: Objective
    optimizers: list[torch.optim.Optimizer]
    batches: Batches
    config: Train
    seed: int
    autocast: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    counters: Counters = field(default_factory=Counters)
    place: dict[str, Any] = field(default_factory=dict)
    averages: dict[str, torch.Tensor] = field(default_factory=dict)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    skipped: list[int] = field(default_factory=list)  # of the steps that `train.skip` names
    decaying: bool = False  # of a wsd run: the weights from before its decay are saved
    saved: int | None = None  # step of the last checkpoint

    def __post_init__(self) -> None:
        self.place = self.batches.state()
        if self.config.ema:
            self.averages = {name: p.detach().clone() for name, p in self.objective.model.named_parameters()}

    def step(self, batch: loader.Batch, rate: float) -> dict[str, float]:
        """One optimizer step on a batch, at `rate` times the peak learning rate; returns its figures.

        A batch that `train.skip` names, or in which nothing carries loss (parts of long documents, all context), is
        passed over, without figures.
        """
        config, step = self.config, self.counters.step
        seed = np.random.SeedSequence([self.seed, step, self.ranks.rank])
        _seed(self.objective.head.weight.device, int(seed.generate_state(1)[0]))
        counted = self.ranks.sum(_counts(batch.micros))
        targets = int(counted[-1])
        if step in config.skip:
            self.skipped.append(step)
        if not targets or step in config.skip:
            self._pass(batch, counted)
            return {}
        losses = torch.zeros(2, PARTS, dtype=torch.float64, device=self.objective.head.weight.device)
        for n, micro in enumerate(batch.micros):
            if self.ranks.size > 1:
                self.objective.set_requires_gradient_sync(n == len(batch.micros) - 1)  # pyright: ignore
            losses += self._backward(micro, targets)
        total, count = self.ranks.sum(losses.cpu())  # not before: a GPU would be waited for at every micro-batch
        parameters = [p for p in self.objective.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
        figures = {
            "loss": float(total.sum() / count.sum()),
            "norm": float(getattr(norm, "full_tensor", lambda: norm)()),
        }
        for part in (format.Part.THOUGHT, format.Part.TARGET, format.Part.CONTEXT):
            if count[part]:
                figures[f"loss_{part.name.lower()}"] = float(total[part] / count[part])
        self._refuse_divergence(figures, batch)
        self._update(rate)
        self._pass(batch, counted)
        return figures

    @property
    def counts(self) -> dict[str, Any]:
        """What a manifest tells of the training."""
        return asdict(self.counters) | ({"skipped": self.skipped} if self.skipped else {})

    def _pass(self, batch: loader.Batch, counted: torch.Tensor) -> None:
        self.place = batch.state
        room = self.config.rows * self.config.sequence_length
        self.counters.add([int(n) for n in counted[:-1]], batch.passed, room)

    def _backward(self, micro: PackedRow, targets: int) -> torch.Tensor:
        """Adds the gradient of the batch's mean loss; returns (sum, count) of losses by part, where the model is."""
        with torch.autocast(self.objective.head.weight.device.type, torch.bfloat16, enabled=self.autocast):
            total, losses, part = self.objective(micro)
        (total * (self.ranks.size / targets)).backward()  # FSDP takes the mean over the ranks
        sums, part = torch.zeros(2, PARTS, dtype=torch.float64, device=losses.device), part.to(losses.device)
        sums[0].index_add_(0, part, losses.double())
        sums[1].index_add_(0, part, torch.ones_like(losses, dtype=torch.float64))
        return sums

    def _refuse_divergence(self, figures: dict[str, float], batch: loader.Batch) -> None:
        """Before the weights are touched, so that they and the checkpoints stay good."""
        loss, step = figures["loss"], self.counters.step
        usual = statistics.fmean(self.recent) if self.recent else loss
        finite = math.isfinite(loss) and math.isfinite(figures["norm"])
        if finite and loss - usual <= self.config.spike:
            self.recent.append(loss)
            return
        what = f"loss {loss:.4g} (of late {usual:.4g}), gradient norm {figures['norm']:.4g}"
        ways = f"train.skip={json.dumps([*self.config.skip, step]).replace(' ', '')} goes on without this batch"
        if finite:
            ways += f", train.spike above {loss - usual:.3g} with it"
        ways += "; a lower train.lr starts this training anew"
        raise Diverged(f"training diverged at step {step}: {what}; {ways}", step, batch)

    def _update(self, rate: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate
            optimizer.step()
            optimizer.zero_grad()
        if self.averages:
            now = [p.detach() for p in self.objective.model.parameters()]
            get_ema_multi_avg_fn(self.config.ema)(list(self.averages.values()), now, self.counters.step)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averages in the weights' place, where there are averages: they are what is exported."""
        weights = dict(self.objective.model.named_parameters()) if self.averages else {}
        kept = {name: p.detach().clone() for name, p in weights.items()}
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(self.averages[name])
            yield
            for name, p in weights.items():
                p.copy_(kept[name])

    @torch.no_grad()
    def held_out_loss(self, documents: Corpus) -> float:
        """Mean loss a token of the documents' raw text; every rank takes all of them."""
        config = self.config.model_copy(update={"layout": "raw", "loss_on": "all", "rows": 1})
        batches = Batches(documents, self.batches.controls, config, 0, ends=1)
        self.objective.eval()
        total = count = 0.0
        while rows := [row for row in batches.plan() if row]:
            micro = batches.lay_out(rows)
            with torch.autocast(self.objective.head.weight.device.type, torch.bfloat16, enabled=self.autocast):
                _, losses, _ = self.objective(micro)
            total, count = total + float(losses.double().sum()), count + len(losses)
        self.objective.train()
        return total / count

    def save(self, path: Path, held_out_loss: float | None = None) -> None:
        state = {"place": self.place, "counters": asdict(self.counters), "recent": list(self.recent)}
        state |= {"skipped": self.skipped, "decaying": self.decaying, "held_out_loss": held_out_loss}
        checkpoint.save(path, self.ranks, self.objective, self.optimizers, self.averages, state)

    def keep(self, folder: Path, held_out_loss: float | None = None) -> None:
        """A checkpoint of this step, where there is none."""
        if self.saved != self.counters.step:
            self.saved = self.counters.step
            self.save(checkpoint.folder_of(folder, self.saved), held_out_loss)

    def load(self, path: Path, optimizer_only: bool = False) -> None:
        """Restores a checkpoint; with `optimizer_only`, weights and optimizers of an earlier stage, which may have had
        other settings: those of this one count."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        state = checkpoint.load(path, self.ranks, self.objective, self.optimizers, self.averages)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, own in zip(groups, settings, strict=True):
            group.update(own)
        if not optimizer_only:
            self.batches.load_state(state["place"])
            self.place, self.counters = state["place"], Counters(**state["counters"])
            self.recent.extend(state["recent"])
            self.saved = self.counters.step
            self.skipped, self.decaying = state.get("skipped", []), state.get("decaying", False)


class Diverged(UserError):
    """A batch whose loss is not finite, or far above the usual."""

    def __init__(self, message: str, step: int, batch: loader.Batch):
        super().__init__(message)
        self.step, self.batch = step, batch


def _seed(device: torch.device, seed: int) -> None:
    """What dropout draws from. (torch.manual_seed asks after every kind of device there is, for a third of a ms.)"""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _counts(micros: list[PackedRow]) -> torch.Tensor:
    """Tokens by part, and last those that carry loss."""
    parts = sum(np.bincount(micro.parts, minlength=PARTS) for micro in micros)
    targets = sum(int((micro.labels != format.IGNORE).sum()) for micro in micros)
    return torch.tensor([*np.asarray(parts).tolist(), targets], dtype=torch.float64)
