"""doctor: looks at every file of a run, says what is wrong, and takes away what is damaged.

    latent-thoughts doctor RUN [--repair]

A folder of several runs (seeds, an experiment's cells) is looked at run by run, each under its own lock.
What is damaged is moved to RUN/damaged (in a store: copied there, and removed), so that nothing is lost that somebody
may want to mend by hand; the command that the run was started with then makes it again. Of a completed stage its
manifest goes too, and its sound shards stay: they need not be made again. Lines of journals and metrics that are
damaged are left out of them, and damaged replies of a teacher out of the store, to be asked for again.
"""

from __future__ import annotations

import contextlib
import errno
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
OF_A_RUN = ("recipe.yaml", ".lock")  # a file that the folder of a run has


def doctor(run: Path, repair: bool) -> bool:
    """Shows what is found, and mends it where that is asked for. Whether nothing is wrong (any more).

    Raises UserError where there is no run, or a part of one, or another process holds the one that is to be repaired.
    """
    runs = _runs(run)
    if not any(_stages(each) for each in runs):
        raise UserError(f"{run} is no run folder: no stage has been begun in it")
    if (whole := _part_of(run)) is not None:
        raise UserError(f"{run} is a part of the run {whole}: name that folder, which its lock is for")
    with contextlib.ExitStack() as stack:
        held = [_hold(stack, each, repair) for each in runs]  # all, before anything is mended
        return all([_examined(each, repair, by) for each, by in zip(runs, held, strict=True)])


def _hold(stack: contextlib.ExitStack, run: Path, repair: bool) -> InUse | None:
    """Who holds the run, if this process cannot. What only gathers runs, or cannot be written to, is looked at as it
    lies: a lock would make a run of it."""
    if not repair and not _stages(run):
        return None
    try:
        stack.enter_context(run_lock(run))
    except InUse as error:
        if repair:
            raise
        return error
    except OSError as error:  # a store's PermissionError has no number
        if repair or not (isinstance(error, PermissionError) or error.errno == errno.EROFS):
            raise
    return None


def _examined(run: Path, repair: bool, held: InUse | None) -> bool:
    """Shows and mends one run; whether nothing is wrong (any more)."""
    found = list(examine(run, held is not None))
    if repair:
        for finding in found:
            if finding.mend is not None:
                finding.mend()
    if found or _stages(run):  # else it only gathers others
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


def _part_of(folder: Path) -> Path | None:
    """The run that a folder of stages lies in; None for a run, and for what only gathers runs."""
    if not _stages(folder) or any((folder / name).exists() for name in OF_A_RUN):
        return None
    above = (folder if places.remote(folder) else folder.absolute()).parents
    # both, since other software has locks of that name too
    return next((each for each in above if all((each / name).exists() for name in OF_A_RUN)), None)


def _runs(folder: Path) -> list[Path]:
    """The folder, and every run below it."""
    found = {path.parent for path in places.below(folder) if path.name in OF_A_RUN} - {folder}
    return [folder, *sorted(each for each in found if _counts(each, folder))]


def _stages(run: Path) -> list[Path]:
    """The folders of stages, those that were set aside for other settings too; not those of runs below."""
    marked = {path.parent for path in places.below(run) if path.name in MARKERS} - {run}
    others = _runs(run)[1:]
    return sorted(f for f in marked if _counts(f, run) and {f, *f.parents}.isdisjoint(others))


def _counts(folder: Path, run: Path) -> bool:
    """Whether it is neither unfinished nor taken away as damaged."""
    parts = Path(places.relative(folder, run)).parts
    return ASIDE not in parts and not any(part.endswith(".tmp") for part in parts)


def _replies(run: Path, path: Path) -> Iterator[Finding]:
    """Every reply of a teacher is unpacked, which checks it. (That of a store is looked at where it is worked on.)"""
    if places.remote(path) or not path.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            rows = connection.execute("SELECT key, text FROM replies WHERE text != x''")
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
    """As the store itself does: what they took was paid for, and stays."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany("UPDATE replies SET text = x'' WHERE key = ?", [(key,) for key in keys])


def _temporaries(run: Path) -> Iterator[Path]:
    """Files and folders with temporary names, not what lies in such folders. What only gathers runs may hold anything:
    there they are looked for in the folder itself."""
    others = _runs(run)[1:]
    for path in () if places.remote(run) else sorted(run.rglob(".*.tmp") if _stages(run) else run.glob(".*.tmp")):
        inside = path.relative_to(run).parents
        if {*path.parents}.isdisjoint(others) and not any(places.unfinished(parent) for parent in inside):
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
