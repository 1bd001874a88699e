"""doctor: looks at every file of a run, says what is wrong, and takes away what is damaged.

    latent-thoughts doctor RUN [--repair]

What is damaged is moved to RUN/damaged (in a store: copied there, and removed), so that nothing is lost that somebody
may want to mend by hand; the command that the run was started with then makes it again. Of a completed stage its
manifest goes too, and its sound shards stay: they need not be made again. Lines of journals and metrics that are
damaged are left out of them, and damaged replies of a teacher out of the store, to be asked for again.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from latent_thoughts import places, transfer
from latent_thoughts.config import load_recipe
from latent_thoughts.doctor.remedies import ASIDE, Finding, aside, damaged, fault
from latent_thoughts.doctor.stages import MARKERS, StageFolder
from latent_thoughts.files import read_json
from latent_thoughts.store import run_lock
from latent_thoughts.teachers.replies import unpacked
from latent_thoughts.types import InUse, UserError

__all__ = ["Finding", "doctor", "examine"]


def doctor(run: Path, repair: bool) -> bool:
    """Shows what is found, and mends it where that is asked for. Whether nothing is wrong (any more).

    Raises UserError where there is no run, or another process holds the one that is to be repaired.
    """
    if not any(_stages(run)):
        raise UserError(f"{run} is no run folder: no stage has been begun in it")
    with contextlib.ExitStack() as stack:
        held: InUse | None = None
        try:
            stack.enter_context(run_lock(run))
        except InUse as error:
            if repair:
                raise
            held = error
        found = list(examine(run, held is not None))
        if repair:
            for finding in found:
                if finding.mend is not None:
                    finding.mend()
        _show(run, found, repair, held)
        left = list(examine(run, False)) if repair else found
        return not any(finding.wrong for finding in left)


def examine(run: Path, held: bool) -> Iterator[Finding]:
    """Everything that is wrong with a run. While it is `held`, files with temporary names are somebody's work."""
    for folder in _stages(run):
        yield from StageFolder(run, folder).findings()
    for name, read in (("results.json", read_json), ("recipe.yaml", load_recipe)):
        if (run / name).exists() and (why := fault(read, run / name)):
            yield damaged(run, run / name, why)
    yield from _replies(run, run / "replies.sqlite")
    if not held:
        for path in _temporaries(run):
            what = "left by a process that was killed"
            yield Finding(path, what, "removed", lambda path=path: transfer.remove(path), wrong=False)


def _stages(run: Path) -> list[Path]:
    """The folders of stages, those that were set aside for other settings too."""
    marked = {path.parent for path in places.below(run) if path.name in MARKERS}
    inside = {folder: Path(places.relative(folder, run)).parts for folder in marked if folder != run}
    return sorted(f for f, parts in inside.items() if ASIDE not in parts and not any(p.endswith(".tmp") for p in parts))


def _replies(run: Path, path: Path) -> Iterator[Finding]:
    """Every reply of a teacher is unpacked, which checks it. (That of a store is looked at where it is worked on.)"""
    if places.remote(path) or not path.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            rows = connection.execute("SELECT key, text FROM replies")
            bad = [key for key, text in rows if fault(unpacked, text)]
    except sqlite3.DatabaseError as error:
        problem, bad = str(error), []
    if problem != "ok":
        remedy = "moved to damaged/; its replies are asked for again, unless you mend it"

        def mend() -> None:
            for suffix in ("", "-wal", "-shm"):
                aside(run, path.with_name(path.name + suffix))

        yield Finding(path, f"not a sound database: {problem}", remedy, mend)
    elif bad:
        yield Finding(path, f"{len(bad)} replies damaged", "removed, asked for again", lambda: _forget(path, bad))


def _forget(path: Path, keys: list[bytes]) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany("DELETE FROM replies WHERE key = ?", [(key,) for key in keys])


def _temporaries(run: Path) -> Iterator[Path]:
    """Files and folders with temporary names, not what lies in such folders."""
    for path in () if places.remote(run) else sorted(run.rglob(".*.tmp")):
        if not any(places.unfinished(parent) for parent in path.relative_to(run).parents):
            yield path


def _show(run: Path, found: list[Finding], repair: bool, held: InUse | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, stages = Console(), _stages(run)
    if not console.is_terminal:  # so that names stay whole
        console = Console(width=200)
    complete = sum((folder / "manifest.json").exists() for folder in stages)
    wrong = sum(finding.wrong for finding in found)
    console.print(
        Text(f"{run}: {len(stages)} stages, {complete} complete, {wrong} things wrong" + (" before" * repair))
    )
    if held is not None:
        console.print(Text(f"{held}: what it is writing now may look damaged", "yellow"))
    if not found:
        return
    table = Table("file", "what is wrong", "repaired" if repair else "with --repair")
    for finding in found:
        style = "" if finding.wrong else "dim"
        name = places.relative(finding.path, run)
        table.add_row(*(Text(text, style) for text in (name, finding.what, finding.remedy)))
    console.print(table)
