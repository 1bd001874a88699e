"""Who holds a run folder: one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from latent_thoughts import leases
from latent_thoughts.places import remote
from latent_thoughts.types import InUse


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds a run folder for this process. The kernel lets go of it when the process dies; in a store a lease runs out.

    Raises UserError where another living process holds it.
    """
    with leases.held(folder) if remote(folder) else _locked(folder):
        _held.append(folder)
        try:
            yield
        finally:
            _held.remove(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InUse(f"{folder} is in use by process {file.read().strip() or '?'}") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


_held: list[Path] = []


def held_run() -> Path | None:
    """The run folder that this process holds; None where it holds none."""
    return _held[-1] if _held else None
