"""What an engine is: token ids in, token ids and log-probabilities out. Text does not exist here.

Work comes as jobs. A job is a context and a program behind it: a generator that yields requests, is
sent their results, and returns what it found. So the steps of one chunk read from top to bottom,
and an engine is free to interleave the steps of many.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from latent_thoughts.types import Draw

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One prompt behind the job's context, continued once a seed.

    Of the prompt's own tokens those in `scored` (start, stop) are scored too, at temperature 1.
    """

    prompt: Ids
    seeds: tuple[int, ...]
    scored: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class How:
    """How to draw. Draws end with `stop` (finish "end", not among the ids), with an id of `abort`
    (finish "control"), at `max_tokens` (finish "length") or with the token after which `halt` is true of their ids
    (finish "halt"). Temperature 0 is greedy. `top_p` draws from the likeliest tokens that have that share together."""

    max_tokens: int
    stop: int
    abort: frozenset[int]
    temperature: float = 1.0
    top_p: float = 1.0
    halt: Callable[[Sequence[int]], bool] | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Answered by a list with a `Sampled` a request."""

    requests: tuple[SampleRequest, ...]
    how: How


@dataclass(frozen=True, slots=True)
class Sampled:
    """What came of a SampleRequest: one draw a seed, and the scored tokens' log-probabilities."""

    draws: tuple[Draw, ...]
    scores: np.ndarray


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One prefix behind the job's context, and the continuations to score behind it (they may be empty)."""

    prefix: Ids
    continuations: tuple[Ids, ...]


@dataclass(frozen=True, slots=True)
class Scoring:
    """Answered by one list a request: an array a continuation, nats, shape (temperatures, tokens)."""

    requests: tuple[ScoreRequest, ...]
    temperatures: tuple[float, ...] = (1.0,)


Request = Sampling | Scoring
Program = Generator[Request, Any, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """A context, encoded once, and what is asked behind it. A context may be empty, a prompt or prefix may not.

    `stem` stands before the context: jobs that begin alike name the same stem, which is encoded once for all.
    """

    context: Ids
    program: Program
    stem: Ids = ()

    @property
    def whole(self) -> Ids:
        return self.stem + self.context


class Engine(Protocol):
    one_numerics: bool
    """Whether scoring a draw gives the log-probabilities it was sampled with, so that it can be spared."""

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        """Runs the programs; yields (index of the job, what its program returned) as they finish.

        A result depends on its own job alone, not on what else is running.
        """
        ...


def ask(engine: Engine, requests: Sequence[Request], contexts: Sequence[Ids] | None = None) -> list[Any]:
    """The answers to single requests, in order, behind no context or one each."""

    def once(request: Request) -> Program:
        return (yield request)

    contexts = contexts or [()] * len(requests)
    return in_order(engine, [Job(c, once(request)) for c, request in zip(contexts, requests, strict=True)])


def in_order(engine: Engine, jobs: Sequence[Job], each: Callable[[Any], None] | None = None) -> list[Any]:
    """What the programs returned, in the jobs' order; `each` is told of every result as it comes."""
    results = {}
    for n, result in engine.run(jobs):
        results[n] = result
        if each is not None:
            each(result)
    return [results[n] for n in range(len(jobs))]


def uniforms(seed: int, count: int) -> np.ndarray:
    """The random numbers of one draw, one a token, shape (count,)."""
    return np.random.Generator(np.random.Philox(seed)).random(count)
