"""The in-process engine: any Hugging Face causal LM, CPU or CUDA.

Prompts are encoded once and their key-value cache is shared by all continuations. Axis suffixes:
B prompts, N sequences (draws or continuations), P prompt tokens, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from latent_thoughts.config import Engine as Limits
from latent_thoughts.engines.base import Ids, SampleRequest, ScoreRequest, uniforms
from latent_thoughts.types import Draw


@dataclass(slots=True)
class Prefilled:
    """Left-padded prompts in a cache: `mask_NP` tells padding, `logits_NV` predict the next token."""

    cache: Any
    mask_NP: torch.Tensor
    logits_NV: torch.Tensor

    def select(self, rows: torch.Tensor) -> None:
        """Keeps (and repeats) these rows."""
        self.cache.batch_select_indices(rows)
        self.mask_NP, self.logits_NV = self.mask_NP[rows], self.logits_NV[rows]


@dataclass(slots=True)
class Growing:
    """One draw in the making."""

    at: tuple[int, int]  # request, draw
    numbers: np.ndarray
    max_tokens: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TorchEngine:
    """Samples and scores in batches bounded by `limits`. The model must be in eval mode."""

    def __init__(self, model: Any, limits: Limits | None = None):
        self.model, self.limits = model.eval(), limits or Limits()
        self.device = next(model.parameters()).device
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])

    @torch.inference_mode()
    def sample(
        self, requests: Sequence[SampleRequest], *, stop: int, abort: frozenset[int], temperature: float
    ) -> list[list[Draw]]:
        draws: list[list[Draw | None]] = [[None] * len(r.seeds) for r in requests]
        sizes = [(len(r.prompt), r.max_tokens + 1, len(r.seeds)) for r in requests]
        for batch in self._batches(sizes, logits_a_row=1):
            growing = [
                Growing((r, n), uniforms(requests[r].seeds[n], requests[r].max_tokens + 1), requests[r].max_tokens)
                for r, ns in batch
                for n in ns
            ]
            state = self._prefill([requests[r].prompt for r, _ in batch], [len(ns) for _, ns in batch])
            for at, draw in self._grow(state, growing, stop, abort, temperature):
                draws[at[0]][at[1]] = draw
        return [[d for d in row if d is not None] for row in draws]

    def _grow(
        self, state: Prefilled, growing: list[Growing], stop: int, abort: frozenset[int], temperature: float
    ) -> Iterator[tuple[tuple[int, int], Draw]]:
        """Decodes until every draw has finished; finished ones leave the batch at once."""
        while growing:
            tokens, logprobs = self._next(state.logits_NV, growing, temperature)
            keep: list[int] = []
            for row, (draw, token, logprob) in enumerate(zip(growing, tokens, logprobs, strict=True)):
                if finish := self._finish(draw, token, stop, abort):
                    values = (*draw.logprobs, logprob) if finish == "end" else tuple(draw.logprobs)
                    yield draw.at, Draw(tuple(draw.ids), values, finish)
                else:
                    draw.ids.append(token)
                    draw.logprobs.append(logprob)
                    keep.append(row)
            growing = [growing[row] for row in keep]
            if growing:
                if len(keep) < len(tokens):
                    state.select(torch.tensor(keep, device=self.device))
                self._append(state, torch.tensor([[d.ids[-1]] for d in growing], device=self.device))

    @staticmethod
    def _finish(draw: Growing, token: int, stop: int, abort: frozenset[int]) -> str | None:
        if token == stop:
            return "end"
        if len(draw.ids) == draw.max_tokens:
            return "length"
        return "control" if token in abort else None

    def _next(
        self, logits_NV: torch.Tensor, growing: list[Growing], temperature: float
    ) -> tuple[list[int], list[float]]:
        """Inverse-CDF sampling with each draw's own random number, in float64."""
        if temperature == 0:
            tokens_N = logits_NV.argmax(-1)
            return tokens_N.tolist(), [0.0] * len(growing)
        logprobs_NV = torch.log_softmax(logits_NV.double() / temperature, dim=-1)
        u_N = torch.tensor([d.numbers[len(d.ids)] for d in growing], dtype=torch.float64, device=self.device)
        cdf_NV = logprobs_NV.exp().cumsum(-1)
        tokens_N = torch.searchsorted(cdf_NV, (u_N * cdf_NV[:, -1])[:, None], right=True).squeeze(1)
        tokens_N = tokens_N.clamp(max=self.vocabulary - 1)
        return tokens_N.tolist(), logprobs_NV.gather(1, tokens_N[:, None]).squeeze(1).tolist()

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest], temperatures: Sequence[float] = (1.0,)) -> list[list[np.ndarray]]:
        scores: list[list[Any]] = [[None] * len(r.continuations) for r in requests]
        longest = [max(map(len, r.continuations), default=0) for r in requests]
        sizes = [(len(r.prefix), m, len(r.continuations)) for r, m in zip(requests, longest, strict=True)]
        for batch in self._batches(sizes, logits_a_row=None):
            state = self._prefill([requests[r].prefix for r, _ in batch], [len(ns) for _, ns in batch])
            at = [(r, n) for r, ns in batch for n in ns]
            values = self._score_batch(state, [requests[r].continuations[n] for r, n in at], temperatures)
            for (r, n), value in zip(at, values, strict=True):
                scores[r][n] = value
        return scores

    def _score_batch(
        self, state: Prefilled, continuations: list[Ids], temperatures: Sequence[float]
    ) -> list[np.ndarray]:
        """Scores continuations (N) behind their prefixes; returns arrays (temperatures, tokens)."""
        longest = max(map(len, continuations))
        if longest == 0:
            return [np.zeros((len(temperatures), 0)) for _ in continuations]
        ids_NT = torch.zeros(len(continuations), longest, dtype=torch.long, device=self.device)
        for row, ids in enumerate(continuations):
            ids_NT[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        logits = [state.logits_NV[:, None].float()]
        if longest > 1:
            logits.append(self._forward(state.cache, ids_NT[:, :-1], state.mask_NP).float())
        logits_NTV = torch.cat(logits, 1)
        values = [
            torch.log_softmax(logits_NTV if t == 1 else logits_NTV / t, -1).gather(2, ids_NT[..., None]).squeeze(2)
            for t in temperatures
        ]
        stacked = torch.stack(values, 1).double().cpu().numpy()
        return [row[:, : len(ids)] for row, ids in zip(stacked, continuations, strict=True)]

    def _prefill(self, prompts: list[Ids], repeats: list[int]) -> Prefilled:
        """Encodes each prompt once, then repeats its cache for its continuations."""
        longest = max(map(len, prompts))
        ids_BP = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask_BP = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, ids in enumerate(prompts):
            ids_BP[row, longest - len(ids) :] = torch.tensor(ids, dtype=torch.long)
            mask_BP[row, longest - len(ids) :] = 1
        mask_BP = mask_BP.to(self.device)
        out = self.model(
            input_ids=ids_BP.to(self.device),
            attention_mask=mask_BP,
            position_ids=(mask_BP.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        state = Prefilled(out.past_key_values, mask_BP, out.logits[:, -1])
        rows = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(repeats))
        if max(repeats) > 1:
            state.select(rows.to(self.device))
        return state

    def _forward(self, cache: Any, ids_NT: torch.Tensor, mask_NP: torch.Tensor) -> torch.Tensor:
        """Logits of new tokens behind the cache, shape (N, T, V)."""
        positions_NT = mask_NP.sum(-1, keepdim=True) + torch.arange(ids_NT.shape[1], device=self.device)
        mask = torch.cat([mask_NP, torch.ones_like(ids_NT)], 1)
        return self.model(
            input_ids=ids_NT, attention_mask=mask, position_ids=positions_NT, past_key_values=cache, use_cache=True
        ).logits

    def _append(self, state: Prefilled, ids_N1: torch.Tensor) -> None:
        state.logits_NV = self._forward(state.cache, ids_N1, state.mask_NP)[:, -1]
        state.mask_NP = torch.cat([state.mask_NP, torch.ones_like(ids_N1)], 1)

    def _batches(
        self, sizes: list[tuple[int, int, int]], logits_a_row: int | None
    ) -> Iterator[list[tuple[int, range]]]:
        """Groups (prompt length, new tokens, continuations) into batches within the limits.

        Yields lists of (request, which of its continuations). Prompts of equal length stand
        together, so that there is little padding; a request too large for one batch is split.
        """
        limits, batch, rows, longest_p, longest_t = self.limits, [], 0, 0, 0
        for r in sorted(range(len(sizes)), key=lambda r: sizes[r][:2]):
            p, t, count = sizes[r]
            for start in range(0, count, limits.sequences):
                part = range(start, min(start + limits.sequences, count))
                width, new = max(longest_p, p), max(longest_t, t)
                logits = (rows + len(part)) * self.vocabulary * (logits_a_row or new)
                positions = (rows + len(part)) * (width + new)
                full = (rows + len(part) > limits.sequences, positions > limits.tokens, logits > limits.logits)
                if batch and any(full):
                    yield batch
                    batch, rows, width, new = [], 0, p, t
                batch.append((r, part))
                rows, longest_p, longest_t = rows + len(part), width, new
        if batch:
            yield batch
