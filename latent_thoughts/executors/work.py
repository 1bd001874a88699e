"""A stage's work as one picklable object, and its life in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from latent_thoughts.model import set_up_torch
from latent_thoughts.store import Stage

Told = Callable[[float, Mapping[str, Any]], None]  # amount done, and its counts
Do = Callable[[str, Told], None]


class Work(Protocol):
    """`set_up` loads what the work needs, once a process, and returns what writes a unit's shards.

    A unit is done where all its shards are there; that which bears its name has its counts.
    """

    @property
    def stage(self) -> Stage: ...

    def set_up(self, stack: contextlib.ExitStack) -> Do: ...

    def files(self, unit: str) -> list[str]:
        """The shards of a unit."""
        ...


class Result(NamedTuple):
    """What a manifest needs of a unit: its counts, and rows and SHA-256 of its shards."""

    unit: str
    counts: dict[str, Any]
    shards: dict[str, dict[str, Any]]


@dataclass
class Opened:
    """Work in one process, set up for the first unit that is not done yet."""

    work: Work
    threads: int | None = None  # of torch; None leaves them as they are

    def __post_init__(self) -> None:
        self._stack, self._do = contextlib.ExitStack(), None

    def __call__(self, unit: str, told: Told = lambda amount, counts: None) -> Result:
        stage = self.work.stage
        if any(stage.done(name) is None for name in self.work.files(unit)):
            if self._do is None:
                set_up_torch(self.threads)
                self._do = self.work.set_up(self._stack)
            self._do(unit, told)
        counts = stage.done(unit)
        assert counts is not None, f"{unit} was not written"
        return Result(unit, counts, {name: stage.describe(name) for name in self.work.files(unit)})

    def close(self) -> None:
        self._do = None
        self._stack.close()
