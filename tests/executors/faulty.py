"""Work that a test can watch and disturb, for workers of every kind; importable by them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from latent_thoughts.executors.work import Do, Told
from latent_thoughts.stages import sample as sampling
from latent_thoughts.store import Stage
from latent_thoughts.types import UserError

SCHEMA = pa.schema([("unit", pa.string())])


def doubled(number: int) -> tuple[int, int]:
    """Twice the number, and the process that says so."""
    if number == 13:
        raise UserError("13 is a mistake of the user's")
    return 2 * number, os.getpid()


def note(path: Path, text: str) -> None:
    """One line; a write of few bytes at the end of a file is not torn by another's."""
    with path.open("a") as file:
        file.write(f"{text} {os.getpid()}\n")


def notes(path: Path) -> list[tuple[str, int]]:
    """Units in the order they were begun, each with the process that did."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(unit, int(process)) for unit, process in (line.split() for line in lines)]


@dataclass(frozen=True)
class Simple:
    """Writes a row a unit. `trouble` maps a unit to what goes wrong there: a mistake, or a death (once or always)."""

    stage: Stage
    log: Path
    trouble: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0

    def files(self, unit: str) -> list[str]:
        return [unit]

    def set_up(self, stack: contextlib.ExitStack) -> Do:
        note(self.log.with_suffix(".open"), os.environ.get("CUDA_VISIBLE_DEVICES") or "none")  # the GPU it was given
        stack.callback(note, self.log.with_suffix(".closed"), "closed")

        def do(unit: str, told: Told) -> None:
            before = [name for name, _ in notes(self.log)]
            note(self.log, unit)
            trouble = dict(self.trouble).get(unit)
            if trouble == "mistake":
                raise UserError(f"{unit} is a mistake of the user's")
            if trouble == "dies" or (trouble == "dies once" and unit not in before):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.seconds)
            self.stage.write(unit, [{"unit": unit}], SCHEMA, {"number": int(unit[5:10])})
            told(1, {})

        return do


@dataclass(frozen=True)
class Watched(sampling.Shards):
    """The sample stage's work, which notes what it begins."""

    def set_up(self, stack: contextlib.ExitStack) -> Do:
        do = super().set_up(stack)

        def watched(unit: str, told: Told) -> None:
            note(self.stage.folder.parent / "begun", unit)
            do(unit, told)

        return watched
