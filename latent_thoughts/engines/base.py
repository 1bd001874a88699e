"""What an engine is: token ids in, token ids and log-probabilities out. Text does not exist here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from latent_thoughts.types import Draw

Ids = tuple[int, ...]
Progress = Callable[[int], None]  # told the number of tokens just worked off


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One prompt, continued once a seed."""

    prompt: Ids
    seeds: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One prefix, and the continuations to score behind it. Continuations may be empty."""

    prefix: Ids
    continuations: tuple[Ids, ...]


class Engine(Protocol):
    def sample(
        self, requests: Sequence[SampleRequest], *, stop: int, abort: frozenset[int], temperature: float
    ) -> list[list[Draw]]:
        """One list of draws a request, in order of its seeds.

        Draws end with `stop` (finish "end", not among the ids), with an id of `abort` (finish
        "control") or at `max_tokens` (finish "length"). Temperature 0 is greedy. A draw depends on
        its prompt and its seed alone, not on what else is in the batch.
        """
        ...

    def score(self, requests: Sequence[ScoreRequest], temperatures: Sequence[float] = (1.0,)) -> list[list[np.ndarray]]:
        """One array a continuation: log-probabilities in nats, shape (temperatures, tokens)."""
        ...


def uniforms(seed: int, count: int) -> np.ndarray:
    """The random numbers of one draw, one a token, shape (count,)."""
    return np.random.Generator(np.random.Philox(seed)).random(count)
