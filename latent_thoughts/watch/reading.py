"""What a run's files say about how far it is. Files may be half written at any moment: what cannot be read is not there
yet."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latent_thoughts import leases
from latent_thoughts.places import remote

Json = dict[str, Any]
STAGES = ("synthesize", "sample", "train", "evaluate")
INSIDE = ("base", "prepare", "baselines", "samples", "figures")  # of a run: no runs lie there
DEPTH = 4  # folders below the one that is watched
TAIL = 2**20  # bytes of metrics.jsonl that are read


@dataclass(frozen=True, slots=True)
class Part:
    """One stage's folder. `counts` are those of its manifest, where it is done."""

    name: str
    folder: Path
    state: str  # open, working or done; a run that has stopped may have begun one that is not done
    counts: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One model: the stages that lead to it."""

    name: str
    parts: dict[str, Part]


@dataclass(frozen=True, slots=True)
class State:
    """A run. `sign` is the time of its last sign of life (Unix time, 0: none), `progress` its progress.json."""

    folder: Path
    status: str  # working, finished or stopped
    sign: float
    first: list[Part]  # base and prepare
    rows: list[Row]
    progress: Json
    metrics: list[Json]  # of the train stage that works, or was the last to
    trained: Path | None  # that stage
    diverged: Path | None

    @property
    def working(self) -> bool:
        return self.status == "working"

    @property
    def parts(self) -> list[Part]:
        return [*self.first, *(part for row in self.rows for part in row.parts.values())]


def find(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Run folders at and below `folder`, in the order of their names."""
    if any((folder / name / "stage.json").exists() for name in ("base", "prepare")):
        yield folder
        return
    if depth and folder.is_dir():
        below = [p for p in folder.iterdir() if p.is_dir() and p.name not in INSIDE and not p.name.startswith(".")]
        for path in sorted(below):
            yield from find(path, depth - 1)


def read(folder: Path) -> State:
    """How far one run is."""
    recipe = _recipe(folder / "recipe.yaml")
    first, rows = [_part(folder / name) for name in ("base", "prepare")], _rows(folder, recipe)
    parts = [*first, *(part for row in rows for part in row.parts.values())]
    progress, files = _object(folder / "progress.json"), [folder / ".lock", folder / "progress.json"]
    files += [part.folder / name for part in parts for name in ("stage.json", "manifest.json", "metrics.jsonl")]
    training = [part for part in parts if part.name == "train" and _changed(part.folder / "metrics.jsonl")]
    latest = max(training, key=lambda part: _changed(part.folder / "metrics.jsonl"), default=None)
    sign = max(_changed(file) for file in files)
    return State(
        folder,
        status(folder, sign),
        sign,
        first,
        rows,
        progress,
        _lines(latest.folder / "metrics.jsonl") if latest else [],
        latest.folder if latest else None,
        next((path for part in training for path in part.folder.glob("diverged_step_*.json")), None),
    )


def status(folder: Path, sign: float = 0.0) -> str:
    """What a folder's lock and results tell, where `sign` is when anything else in it was last written."""
    written = _changed(folder / "results.json")
    if written and written >= max(sign, _changed(folder / ".lock")):  # equal in a store, which counts seconds
        return "finished"  # results come last; the process may live on, for another run
    return "working" if _alive(folder) else "stopped"


def _rows(folder: Path, recipe: Json) -> list[Row]:
    """What the recipe wants, in the order in which it is done, and what is there besides."""
    em: Json = found if isinstance(found := recipe.get("em"), dict) else {}
    iterations, baselines = em.get("iterations") or 0, em.get("baselines") or []
    rows = [Row("warm start", _parts(folder / "iter_00", ("synthesize", "train", "evaluate")))]
    rows += [Row(f"EM {n}", _parts(folder / f"iter_{n:02}", STAGES[1:])) for n in range(1, iterations + 1)]
    there = sorted(path.name for path in (folder / "baselines").glob("*") if path.is_dir() and "." not in path.name)
    for name in dict.fromkeys([*baselines, *there]):
        if name == "em_paper":
            where = folder / "baselines" / name
            rows += [Row(f"{name} {n}", _parts(where / f"iter_{n:02}", STAGES[1:])) for n in range(1, iterations + 1)]
        else:
            wanted = ("synthesize", "train", "evaluate") if name.startswith(("wrap", "oracle")) else STAGES[2:]
            rows.append(Row(name, _parts(folder / "baselines" / name, wanted)))
    for path in sorted((folder / "samples").glob("*/iter_*")):
        rows.append(Row(f"{path.parent.name} {int(path.name[5:])}", _parts(path, STAGES[1:])))
    return rows


def _parts(folder: Path, names: tuple[str, ...]) -> dict[str, Part]:
    return {name: _part(folder / name) for name in names}


def _part(folder: Path) -> Part:
    manifest = _object(folder / "manifest.json")
    if manifest:
        return Part(folder.name, folder, "done", manifest.get("counts") or {})
    return Part(folder.name, folder, "working" if (folder / "stage.json").exists() else "open")


def _alive(folder: Path) -> bool:
    """Whether the process that last locked the folder is there. The lock itself is not tried: for a moment that would
    keep a run from starting."""
    if remote(folder):
        return leases.alive(folder)
    try:
        os.kill(int((folder / ".lock").read_text()), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _changed(path: Path) -> float:
    """When a file was last written; 0 where it is missing."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _object(path: Path) -> Json:
    """A JSON object; empty where it is missing, or not (yet) one."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _recipe(path: Path) -> Json:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[Json]:
    """The last lines of a file of JSON objects with a finite loss, without what is half written."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            lines = file.read().split(b"\n")[1 if size > TAIL else 0 : -1]
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        loss = value.get("loss") if isinstance(value, dict) else None
        if isinstance(loss, int | float) and math.isfinite(loss):
            found.append(value)
    return found
