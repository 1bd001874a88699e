"""A language model small enough to enumerate: the next token depends on the last two. For tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from latent_thoughts.engines.base import Ids, SampleRequest, ScoreRequest, uniforms
from latent_thoughts.types import Draw


class ToyEngine:
    """Second-order Markov chain with random logits, shape (vocabulary, vocabulary, vocabulary)."""

    def __init__(self, vocabulary: int, seed: int = 0, scale: float = 1.5):
        shape = (vocabulary, vocabulary, vocabulary)
        self.logits = np.random.default_rng(seed).normal(0, scale, shape)
        self.vocabulary = vocabulary

    def logprobs(self, prompt: Ids, temperature: float = 1.0) -> np.ndarray:
        """log p(next | prompt), shape (vocabulary,)."""
        before = (0, 0, *prompt)[-2:]
        logits = self.logits[before] / temperature
        return logits - np.logaddexp.reduce(logits)

    def score_one(self, prefix: Ids, continuation: Ids, temperature: float = 1.0) -> np.ndarray:
        return np.array([self.logprobs(prefix + continuation[:t], temperature)[i] for t, i in enumerate(continuation)])

    def score(self, requests: Sequence[ScoreRequest], temperatures: Sequence[float] = (1.0,)) -> list[list[np.ndarray]]:
        return [
            [np.stack([self.score_one(r.prefix, c, t) for t in temperatures]) for c in r.continuations]
            for r in requests
        ]

    def sample(
        self, requests: Sequence[SampleRequest], *, stop: int, abort: frozenset[int], temperature: float
    ) -> list[list[Draw]]:
        return [[self._draw(r, seed, stop, abort, temperature) for seed in r.seeds] for r in requests]

    def _draw(self, request: SampleRequest, seed: int, stop: int, abort: frozenset[int], temperature: float) -> Draw:
        ids: Ids = ()
        logprobs: list[float] = []
        for u in uniforms(seed, request.max_tokens + 1):
            row = self.logprobs(request.prompt + ids, temperature)
            token = min(int(np.searchsorted(np.exp(row).cumsum(), u)), self.vocabulary - 1)
            if token != stop and len(ids) == request.max_tokens:
                return Draw(ids, tuple(logprobs), "length")
            logprobs.append(float(row[token]))
            if token == stop:
                return Draw(ids, tuple(logprobs), "end")
            if token in abort:
                return Draw(ids, tuple(logprobs[:-1]), "control")
            ids = (*ids, token)
        raise AssertionError("unreachable")

    def thoughts(self, max_tokens: int, stop: int, abort: frozenset[int]) -> Iterator[Ids]:
        """Every thought that can finish within `max_tokens`."""
        allowed = [i for i in range(self.vocabulary) if i != stop and i not in abort]
        for length in range(max_tokens + 1):
            yield from itertools.product(allowed, repeat=length)
