"""Single passes of a model: encode spans, grow draws by a token, and the arithmetic on their logits.

Axis suffixes: N tokens or draws, V vocabulary; the others are those of `attention`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from latent_thoughts import attention
from latent_thoughts.attention import Extend, Lanes, Path, Span
from latent_thoughts.engines.base import How, Ids
from latent_thoughts.types import Draw, UserError


@dataclass(slots=True)
class Item:
    """A span to encode behind a path.

    `targets` are scored: the first is what follows the span's token `at`, the others follow in turn.
    `done` gets the span, if it is to `keep`; their log-probabilities (temperatures, targets); and
    the logits after the span's last token, if what comes `next` is to be drawn.
    """

    path: Path
    ids: Ids
    keep: bool
    done: Callable[[Span | None, np.ndarray, torch.Tensor | None], None]
    at: int = 0
    targets: Ids = ()
    temperatures: tuple[float, ...] = (1.0,)
    next: bool = False

    @property
    def logits(self) -> int:
        return len(self.targets) + self.next


@dataclass(slots=True)
class Growing:
    """One draw in the making: `token` is drawn, and not yet fed to the model."""

    how: How
    numbers: np.ndarray
    finished: Callable[[Draw], None]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    model_logprobs: list[float] = field(default_factory=list)

    def take(self, token: int, logprob: float, model_logprob: float) -> bool:
        """Goes on by one token; False where that ends the draw."""
        how = self.how
        finish = "end" if token == how.stop else "length" if len(self.ids) == how.max_tokens else None
        if finish is None and token in how.abort:
            finish = "control"
        if finish in (None, "end"):
            self.logprobs.append(logprob)
            self.model_logprobs.append(model_logprob)
        if finish is None:
            self.ids.append(token)
            if how.halt is None or not how.halt(self.ids):
                return True
            finish = "halt"
        self.finished(Draw(tuple(self.ids), tuple(self.logprobs), finish, tuple(self.model_logprobs)))
        return False


class Passes:
    """A model in eval mode whose attention is replaced."""

    def __init__(self, model: Any):
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        if not attention.install(model, store=True):
            kind = model.config.model_type
            raise UserError(f"{kind} does not let its attention be replaced: set engine.kind and engine.scorer to vllm")
        self.longest = _longest(model)
        self.replays = self.device.type == "cuda" and not self.longest  # where frequencies are chosen, it waits

    @property
    def position(self) -> int:
        """Bytes of a position's keys and values, in all layers."""
        trial = attention.tried(self.model)
        assert trial is not None
        return trial.numbers() * self.model.dtype.itemsize

    def encode(self, items: Sequence[Item]) -> None:
        """One pass over the items' spans; hands each its span and logits."""
        paths, sizes, keep = zip(*[(item.path, len(item.ids), item.keep) for item in items], strict=True)
        branches = Extend(paths, sizes, keep, self.device)
        starts = [0, *itertools.accumulate(sizes)]
        scored = [
            start + item.at + n for start, item in zip(starts, items, strict=False) for n in range(len(item.targets))
        ]
        nexts = [end - 1 for end, item in zip(starts[1:], items, strict=True) if item.next]
        logits_NV = self._forward(
            [i for item in items for i in item.ids], branches.positions(), branches, scored + nexts
        )
        temperatures = sorted({t for item in items for t in item.temperatures})
        targets = torch.tensor([i for item in items for i in item.targets], dtype=torch.long, device=self.device)
        table = _table(logits_NV[: len(scored)], targets, temperatures)
        place, coming = 0, iter(logits_NV[len(scored) :])
        for item, span in zip(items, branches.spans(), strict=True):
            rows = [temperatures.index(t) for t in item.temperatures]
            item.done(span, table[rows, place : place + len(item.targets)], next(coming).clone() if item.next else None)
            place += len(item.targets)

    def grow(self, lanes: Lanes, rows: Sequence[tuple[int, int]], draws: Sequence[Growing]) -> torch.Tensor:
        """One pass over the last tokens of growing draws; returns logits (N, V)."""
        positions = lanes.place(rows, [len(d.ids) - 1 for d in draws])
        return self._forward([d.ids[-1] for d in draws], positions, lanes, list(range(len(draws))))

    def whole(self, ids_N: torch.Tensor, positions_N: torch.Tensor, branches: attention.Pass) -> torch.Tensor:
        """The logits (N, V) behind all tokens of a pass, of what lies on the device."""
        ids, positions = ids_N[None], positions_N[None]
        return self.model(input_ids=ids, position_ids=positions, use_cache=False, branches=branches).logits[0]

    def _forward(self, ids: list[int], positions: list[int], branches: attention.Pass, wanted: list[int]) -> Any:
        def row(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.long, device=self.device)

        if self.longest:
            self.check_length(max(positions) + 1)
        out = self.model(
            input_ids=row(ids)[None],
            position_ids=row(positions)[None],
            use_cache=False,
            logits_to_keep=row(wanted),
            branches=branches,
        )
        return out.logits[0]

    def check_length(self, tokens: int, setting: str = "a sequence") -> None:
        """Raises UserError where the scores of so long a sequence would depend on what shares its pass."""
        if self.longest and tokens > self.longest:
            raise UserError(
                f"{setting} of {tokens} tokens: beyond {self.longest} this model chooses its rotary frequencies by the "
                f"longest sequence in hand, and its scores would depend on that: keep to {self.longest} or less"
            )

    def draw(self, logits_NV: torch.Tensor, draws: Sequence[Growing]) -> list[bool]:
        """The next token of every draw by its own random number; returns which draws go on."""
        goes_on = [False] * len(draws)
        for way in {(d.how.temperature, d.how.top_p) for d in draws}:
            at = [n for n, d in enumerate(draws) if (d.how.temperature, d.how.top_p) == way]
            chosen = logits_NV if len(at) == len(draws) else logits_NV[torch.tensor(at, device=logits_NV.device)]
            for n, goes in zip(at, self._draw(chosen, [draws[n] for n in at], *way), strict=True):
                goes_on[n] = goes
        return goes_on

    def _draw(self, logits_NV: torch.Tensor, draws: Sequence[Growing], temperature: float, top_p: float) -> list[bool]:
        logits_NV = logits_NV.float()
        scale, kept_NV = temperature or 1.0, None
        if temperature == 0:
            tokens_N = logits_NV.argmax(-1)
        else:
            tempered_NV = torch.softmax(logits_NV / scale, -1)
            if top_p < 1:
                tempered_NV = kept_NV = nucleus(tempered_NV, top_p)
            u_N = torch.tensor([d.numbers[len(d.ids)] for d in draws], dtype=torch.float64, device=self.device)
            tokens_N = pick(tempered_NV, u_N)
        model_N = _logprobs(logits_NV, tokens_N, 1.0)
        if kept_NV is not None:
            logprob_N = (kept_NV.gather(1, tokens_N[:, None])[:, 0].double() / kept_NV.sum(-1).double()).log()
        else:
            logprob_N = model_N if scale == 1 else _logprobs(logits_NV, tokens_N, scale)
        columns = torch.stack([tokens_N.double(), logprob_N, model_N]).tolist()  # a GPU is waited for once
        return [d.take(int(token), *values) for d, token, *values in zip(draws, *columns, strict=True)]


def _longest(model: Any) -> int | None:
    """Up to which length rotary frequencies are those that the model was trained with; None where they are always.
    Beyond it transformers chooses them for the longest sequence of a pass (`dynamic_rope_update`)."""
    lengths = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layers, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind == "longrope":
                parameters = module.config.rope_parameters
                parameters = parameters if layers is None else parameters[layers]
                lengths.append(parameters["original_max_position_embeddings"])
            elif isinstance(kind, str) and "dynamic" in kind:
                lengths.append(module.original_max_seq_len)
    return min(lengths, default=None)


def nucleus(shares_NV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Shares of the fewest tokens that have `top_p` together, 0 for all others (Holtzman et al. 2020)."""
    sorted_NV, order_NV = shares_NV.sort(-1, descending=True)
    over_NV = sorted_NV.cumsum(-1) - sorted_NV >= top_p
    return shares_NV.masked_fill(torch.zeros_like(over_NV).scatter(1, order_NV, over_NV), 0)


def pick(shares_NV: torch.Tensor, u_N: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF sampling: the first token at which the running sum exceeds u times the total.

    Sums are in float64, over blocks first and then within the block that holds the answer.
    """
    size = 256
    blocks_NBS = torch.nn.functional.pad(shares_NV, (0, -shares_NV.shape[1] % size)).unflatten(1, (-1, size))
    sums_NB = blocks_NBS.sum(-1, dtype=torch.float64).cumsum(-1)
    goal_N1 = (u_N * sums_NB[:, -1])[:, None]
    block_N1 = torch.searchsorted(sums_NB, goal_N1, right=True).clamp(max=sums_NB.shape[1] - 1)
    before_N1 = torch.where(block_N1 > 0, sums_NB.gather(1, (block_N1 - 1).clamp(min=0)), 0.0)
    block_NS = blocks_NBS[torch.arange(len(u_N), device=u_N.device), block_N1[:, 0]]
    within_NS = block_NS.double().cumsum(-1)
    place_N1 = torch.searchsorted(within_NS, goal_N1 - before_N1, right=True)
    # The two sums may differ in the last digit; what is picked must have a share.
    last_N1 = (size - 1 - (block_NS > 0).flip(1).int().argmax(1))[:, None]
    return (block_N1 * size + torch.minimum(place_N1, last_N1))[:, 0]


def _logprobs(logits_NV: torch.Tensor, tokens_N: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of tokens under tempered logits, float64 (N,)."""
    tempered = logits_NV if temperature == 1 else logits_NV / temperature
    chosen = tempered.gather(1, tokens_N[:, None])[:, 0].double()
    return chosen - torch.logsumexp(tempered, -1).double()


def _table(logits_NV: torch.Tensor, tokens_N: torch.Tensor, temperatures: Sequence[float]) -> np.ndarray:
    """Log-probabilities, (temperatures, N), a block of rows at a time: what a CPU's caches like, and more on a GPU,
    which is waited for once."""
    size, device = 128 if logits_NV.device.type == "cpu" else 2048, logits_NV.device
    blocks = [torch.zeros(len(temperatures), 0, dtype=torch.float64, device=device)]
    for rows, tokens in zip(logits_NV.split(size), tokens_N.split(size), strict=True):
        rows = rows.float()
        blocks.append(torch.stack([_logprobs(rows, tokens, t) for t in temperatures]))
    return torch.cat(blocks, 1).cpu().numpy()
