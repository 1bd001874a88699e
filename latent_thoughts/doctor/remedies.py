"""What was found, and what can be done about it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_thoughts import places, transfer
from latent_thoughts.files import Damaged, atomic

ASIDE = "damaged"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a file or folder, and what becomes of it with --repair. A note is not `wrong`."""

    path: Path
    what: str
    remedy: str = "moved to damaged/, made again by the next run"
    mend: Callable[[], None] | None = None
    wrong: bool = True


def damaged(run: Path, path: Path, why: str, also: Path | None = None) -> Finding:
    def mend() -> None:
        for each in dict.fromkeys([also or path, path]):
            aside(run, each)

    return Finding(path, why, mend=mend)


def aside(run: Path, path: Path) -> None:
    """Moves a file or folder to RUN/damaged, under its own name or with a number behind it."""
    if not path.exists():
        return
    name = places.relative(path, run)
    numbered = itertools.chain([name], (f"{name}.{n}" for n in itertools.count(2)))
    target = next(run / ASIDE / n for n in numbered if not (run / ASIDE / n).exists())
    if places.remote(path):
        for file in places.below(path):
            places.write(target / places.relative(file, path) if file != path else target, places.content(file))
        transfer.remove(path)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)


def write(path: Path, content: bytes) -> None:
    with atomic(path) as temporary:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)


def fault(read: Callable[..., Any], *arguments: Any) -> str:
    """Why something cannot be read; empty where it can."""
    try:
        read(*arguments)
    except Damaged as error:
        return error.why
    except ValueError as error:
        return str(error)
    return ""
