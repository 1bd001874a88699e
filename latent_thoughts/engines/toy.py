"""A language model small enough to enumerate: the next token depends on the last two. For tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from latent_thoughts.engines.base import (
    How,
    Ids,
    Job,
    Request,
    Sampled,
    SampleRequest,
    Sampling,
    ScoreRequest,
    Scoring,
    uniforms,
)
from latent_thoughts.types import Draw


class ToyEngine:
    """Second-order Markov chain with random logits, shape (vocabulary, vocabulary, vocabulary)."""

    one_numerics = True

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

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        for n, job in enumerate(jobs):
            answer = None
            while True:
                try:
                    request = job.program.send(answer)
                except StopIteration as stop:
                    yield n, stop.value
                    break
                answer = [self._answer(job.whole, r, request) for r in request.requests]

    def _answer(self, context: Ids, r: SampleRequest | ScoreRequest, request: Request) -> Any:
        if isinstance(r, SampleRequest):
            assert isinstance(request, Sampling)
            prompt, (start, stop) = context + r.prompt, r.scored
            scores = self.score_one(context + r.prompt[:start], r.prompt[start:stop])
            return Sampled(tuple(self._draw(prompt, seed, request.how) for seed in r.seeds), scores)
        assert isinstance(request, Scoring)
        prefix = context + r.prefix
        return [np.stack([self.score_one(prefix, c, t) for t in request.temperatures]) for c in r.continuations]

    def _draw(self, prompt: Ids, seed: int, how: How) -> Draw:
        ids: Ids = ()

        def draw(finish: str, ending: Ids = ()) -> Draw:
            tempered, untempered = (self.score_one(prompt, ids + ending, t) for t in (how.temperature, 1.0))
            return Draw(ids, tuple(tempered.tolist()), finish, tuple(untempered.tolist()))

        for u in uniforms(seed, how.max_tokens + 1):
            row = self.logprobs(prompt + ids, how.temperature)
            token = min(int(np.searchsorted(np.exp(row).cumsum(), u)), self.vocabulary - 1)
            if token == how.stop:
                return draw("end", (token,))
            if len(ids) == how.max_tokens:
                return draw("length")
            if token in how.abort:
                return draw("control")
            ids = (*ids, token)
            if how.halt is not None and how.halt(ids):
                return draw("halt")
        raise AssertionError("unreachable")

    def thoughts(self, max_tokens: int, stop: int, abort: frozenset[int]) -> Iterator[Ids]:
        """Every thought that can finish within `max_tokens`."""
        allowed = [i for i in range(self.vocabulary) if i != stop and i not in abort]
        for length in range(max_tokens + 1):
            yield from itertools.product(allowed, repeat=length)
