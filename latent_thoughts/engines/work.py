"""A job under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from latent_thoughts.attention import Path
from latent_thoughts.engines.base import Ids, Job, Request, SampleRequest, Sampling


@dataclass(slots=True)
class Work:
    """A job under way: its encoded context and prompts, the request in hand, and its answers so far."""

    index: int
    job: Job
    request: Request
    path: Path = ()
    prompts: dict[Ids, Path] = field(default_factory=dict)
    answers: list[Any] = field(default_factory=list)
    open: int = 0  # answers that are missing
    drawing: int = 0  # draws that are not finished
    result: Any = None
    over: bool = False
    told: bool = False  # the result has been handed out

    def prompt(self) -> int:
        """Positions of the longest prompt or prefix of the request in hand, with the context, behind the stem."""
        requests = self.request.requests
        longest = max((len(r.prompt if isinstance(r, SampleRequest) else r.prefix) for r in requests), default=0)
        return len(self.job.context) + longest

    def size(self) -> int:
        """Positions of the longest sequence, about: jobs of like size run together."""
        if isinstance(self.request, Sampling):
            return self.prompt() + self.request.how.max_tokens
        return self.prompt() + max((len(c) for r in self.request.requests for c in r.continuations), default=0)

    def draws(self) -> list[int]:
        """Draws asked for, a request."""
        return [len(r.seeds) for r in self.request.requests] if isinstance(self.request, Sampling) else []

    def held(self) -> int:
        """Positions kept besides the lanes: the context and the prompts."""
        requests = self.request.requests
        prompts = sum(len(r.prompt if isinstance(r, SampleRequest) else r.prefix) for r in requests)
        return len(self.job.context) + prompts
