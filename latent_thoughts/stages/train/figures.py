"""What a training run counts, and how fast it is."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import Any

import torch

from latent_thoughts.data import format
from latent_thoughts.model import idle_weights, matmul_peak
from latent_thoughts.parallel import Ranks
from latent_thoughts.stages.train.objective import Objective


@dataclass(slots=True)
class Counters:
    """Totals of a training run, over all ranks; `raw_tokens` are text tokens without thoughts and control tokens."""

    step: int = 0
    epoch: float = 0.0
    tokens: int = 0
    raw_tokens: int = 0
    thought_tokens: int = 0
    fill: float = 0.0  # mean share of the rows' tokens that is used
    seconds: float = 0.0

    def add(self, parts: list[int], epoch: float, room: int) -> None:
        tokens = sum(parts)
        self.fill = (self.fill * self.step + tokens / room) / (self.step + 1)
        self.step, self.epoch, self.tokens = self.step + 1, epoch, self.tokens + tokens
        self.thought_tokens += parts[format.Part.THOUGHT]
        self.raw_tokens += parts[format.Part.TARGET] + parts[format.Part.CONTEXT]

    def progress(self, budget: tuple[str, float]) -> float:
        """Share of the budget that is spent."""
        unit, amount = budget
        if unit == "epochs":  # counted to nine digits: a third of one would never be through
            amount = round(amount, 9)
        spent = {"steps": self.step, "tokens": self.tokens, "raw_tokens": self.raw_tokens, "epochs": self.epoch}
        return spent[unit] / amount


class Speed:
    """Tokens a second, share of the machine's matrix products, memory."""

    def __init__(self, objective: Objective, ranks: Ranks, autocast: bool, counters: Counters):
        model, self.device, self.ranks = objective.model, objective.head.weight.device, ranks
        weights = multiplied(model)
        self.flops = 6 * weights  # products with weights alone, forward and backward
        dtype = torch.bfloat16 if autocast else torch.float32
        # of no interest in a model so small that its products do not fill the machine
        self.peak = matmul_peak(self.device, dtype) if weights > 10**7 else None
        self.before, self.tokens = counters.seconds, counters.tokens
        self.began, self.rate = time.perf_counter(), 0.0

    def count(self, counters: Counters) -> None:
        seconds = time.perf_counter() - self.began
        counters.seconds, self.rate = self.before + seconds, (counters.tokens - self.tokens) / seconds

    def shown(self) -> dict[str, float]:
        share = {} if self.peak is None else {"mfu": self.rate * self.flops / self.peak / self.ranks.size}
        return {"tokens/s": self.rate, **share}

    def figures(self) -> dict[str, float]:
        cuda = self.device.type == "cuda"
        used = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {name.replace("/s", "_per_second"): value for name, value in self.shown().items()} | {
            "memory_gb": used / 1e9
        }


def multiplied(model: Any) -> float:
    """Weights that a token is multiplied with. A head that is the embedding is a product too."""
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    matrices = (p for p in model.parameters() if p.ndim > 1 and (tied or p is not embedding))
    return sum(p.numel() for p in matrices) - idle_weights(model)
