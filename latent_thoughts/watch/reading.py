"""What a run's files say about how far it is. Files may be half written at any moment: what cannot be read is not there
yet."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latent_thoughts import leases
from latent_thoughts.places import remote

Json = dict[str, Any]
STAGES = ("synthesize", "sample", "train", "evaluate")
INSIDE = ("base", "prepare", "baselines", "samples", "variants", "figures")  # of a run: no runs lie there
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
    status: str  # working, finished, stopped (a stage is half done) or idle
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
        status(folder, sign, parts),
        sign,
        first,
        rows,
        progress,
        _lines(latest.folder / "metrics.jsonl") if latest else [],
        latest.folder if latest else None,
        next((path for part in training for path in part.folder.glob("diverged_step_*.json")), None),
    )


def status(folder: Path, sign: float, parts: Sequence[Part]) -> str:
    """What a run's lock, results and stages tell, where `sign` is when anything else in it was last written."""
    written, states = _changed(folder / "results.json"), {part.state for part in parts}
    last = written >= max(sign, _changed(folder / ".lock"))  # equal in a store, which counts seconds
    complete = bool(written) and "open" not in states  # a single evaluation writes results too
    if complete and last:
        return "finished"  # results come last; the process may live on, for another run
    if alive(folder):
        return "working"
    return "stopped" if "working" in states else "finished" if complete else "idle"


def _rows(folder: Path, recipe: Json) -> list[Row]:
    """What the recipe wants, in the order in which it is done, and what is there besides."""
    em = _section(recipe, "em")
    iterations, baselines, variants = em.get("iterations") or 0, em.get("baselines") or [], _section(em, "variants")
    rows = [Row("warm start", _parts(folder / "iter_00", ("synthesize", "train", "evaluate")))]
    rows += _loop("EM", folder, iterations)
    for name in baselines:
        where, given = folder / "baselines" / name, name.startswith(("wrap", "oracle"))
        stages = ("synthesize", "train", "evaluate") if given else STAGES[2:]
        rows += _loop(name, where, iterations) if name == "em_paper" else [Row(name, _parts(where, stages))]
    for name in variants:
        own = _section(_section(variants, name), "em").get("iterations", iterations)
        rows += _loop(f"variant {name}", folder / "variants" / name, own)
    return rows + _besides(folder, [part.folder.parent for row in rows for part in row.parts.values()])


def _loop(name: str, folder: Path, iterations: int) -> list[Row]:
    return [Row(f"{name} {n}", _parts(folder / f"iter_{n:02}", STAGES[1:])) for n in range(1, iterations + 1)]


def _besides(folder: Path, wanted: list[Path]) -> list[Row]:
    """Further E-steps, and what the recipe does not name: such as a raw model that gains are measured against. Of
    these only stages that were begun, since nobody may want the others."""
    found = [("", path) for path in sorted((folder / "baselines").glob("*")) if "." not in path.name]
    found += [(f"{p.parent.name} ", p) for p in sorted((folder / "samples").glob("*/iter_*")) if p.name[5:].isdigit()]
    rows = []
    for of, path in found:
        parts = {name: part for name, part in _parts(path, STAGES).items() if part.state != "open"}
        if path not in wanted and parts:
            rows.append(Row(f"{of}{int(path.name[5:])}" if of else path.name, parts))
    return rows


def _parts(folder: Path, names: tuple[str, ...]) -> dict[str, Part]:
    return {name: _part(folder / name) for name in names}


def _part(folder: Path) -> Part:
    manifest = _object(folder / "manifest.json")
    if manifest:
        return Part(folder.name, folder, "done", manifest.get("counts") or {})
    return Part(folder.name, folder, "working" if (folder / "stage.json").exists() else "open")


def alive(folder: Path) -> bool:
    """Whether the process that last locked the folder holds it still. The lock itself is not tried: for a moment that
    would keep a run from starting."""
    if remote(folder):
        return leases.alive(folder)
    try:
        pid, inode = int((folder / ".lock").read_text()), (folder / ".lock").stat().st_ino
    except (OSError, ValueError):
        return False
    try:  # the number alone may be another process's by now, or of another machine
        held = rf"FLOCK +ADVISORY +WRITE +{pid} \S+:{inode} "
        return bool(re.search(held, Path("/proc/locks").read_text()))
    except OSError:  # outside Linux the number must do
        return _lives(pid)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
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


def _section(values: Json, name: str) -> Json:
    """A mapping in a mapping; empty where it is missing, or not one."""
    return found if isinstance(found := values.get(name), dict) else {}


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
