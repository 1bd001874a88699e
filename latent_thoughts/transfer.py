"""From this machine into a store and back: copies, folders that appear whole, moves where there is no rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from latent_thoughts.places import below, bench, content, fs, key, plain, relative, remote, sha256, told, version, write
from latent_thoughts.types import UserError

LISTING = "listing.json"  # of a folder in a store: its files with their hashes, written last


def complete(folder: Path) -> bool:
    """Whether a folder that `put` is there whole. (Here a folder appears whole.)"""
    return folder.is_dir() and (not remote(folder) or _listing(folder) != {})


def local(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """A real file or folder: the path itself, or a copy of a store's in the cache.

    Of a folder the `wanted` files are copied, each once, as long as the folder stays what it is. Raises UserError for
    a folder that was not put whole, and for a copy that is not what was put.
    """
    if not remote(path):
        return path
    if path.is_file():
        files, hashes = {path.name: path}, None
    else:
        hashes = _listing(path)
        if hashes == {}:
            raise UserError(f"{path} is not complete: run the stage that makes it again")
        files = {relative(p, path): p for p in below(path)}
        if leading_out := [
            name for name in files if {"", ".", ".."} & set(name.split("/"))
        ]:  # in a store a name like any
            raise UserError(
                f"{path} holds an object {leading_out[0]!r}, whose copy would lie elsewhere: remove it there"
            )
    kept = {name: hashes[name] if hashes else version(p) for name, p in files.items() if not hashes or name in hashes}
    if hashes and (missing := hashes.keys() - kept.keys()):
        raise UserError(f"{path} lacks {min(missing)}: run the stage that makes it again")
    home = bench(path)
    copy = home / hashlib.sha256(json.dumps(sorted(kept.items())).encode()).hexdigest()[:24]
    for other in home.glob("?" * 24):  # of what it was before
        if other != copy:
            shutil.rmtree(other, ignore_errors=True)
    for name in filter(wanted, kept):
        if not (copy / name).exists():
            _get(files[name], copy / name, hashes[name] if hashes else None)
    return copy / path.name if list(files.values()) == [path] else copy


def _get(source: Path, target: Path, expected: str | None) -> None:
    part = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    part.parent.mkdir(parents=True, exist_ok=True)
    with told(source, "read"):
        fs(source).get_file(key(source), str(part))
    if expected is not None and sha256(part) != expected:
        part.unlink()
        raise UserError(f"{source} is damaged (checksum differs): remove its folder and run again")
    os.replace(part, target)


def forget(path: Path) -> None:
    """Removes what the cache holds of a store's folder."""
    if remote(path):
        shutil.rmtree(bench(path), ignore_errors=True)


def _listing(folder: Path) -> dict[str, str] | None:
    """The files that a folder holds, with their hashes; {} while it is being put, None where somebody else put it."""
    try:
        return json.loads(content(folder / LISTING))
    except FileNotFoundError:
        return None


def differing(folder: Path) -> list[str]:
    """Of a store's folder that was put whole, the files that are missing or not what was put. All are read."""
    known = _listing(folder) or {}
    return [name for name, hash in known.items() if not (folder / name).is_file() or sha256(folder / name) != hash]


def put(source: Path, target: Path) -> None:
    """Copies a file or folder of this machine into a store. A folder is complete when its listing is there."""
    if source.is_file():
        with told(target, "written"):
            fs(target).put_file(str(source), key(target))
        return
    files = {relative(p, source): p for p in below(source)}
    write(target / LISTING, b"{}")
    for old in below(target):
        if relative(old, target) not in {*files, LISTING}:
            old.unlink()
    put_files(source, target)
    hashes = {name: sha256(path) for name, path in files.items()}
    write(target / LISTING, json.dumps(hashes, indent=1).encode())


def put_files(source: Path, target: Path) -> None:
    """Copies all files of a folder of this machine, and tells nobody that they are all."""
    for path in below(source):
        with told(target, "written"):
            fs(target).put_file(str(path), key(target / relative(path, source)))


def remove(path: Path, first: str = "") -> None:
    """A file or folder, if it is there; of a store's folder the object called `first` before all others."""
    if not remote(path):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        return
    names = [key(p) for p in below(path)]
    lead = [name for name in names if name == key(path / first)]
    for part in (lead, [name for name in names if name not in lead]):
        if part:
            fs(path).rm(part)


def move(source: Path, target: Path, note: Path, last: str) -> None:
    """Gives a folder another name. Where that takes copying, `note` tells `settle` what a killed process left undone,
    and the object called `last`, which makes a folder complete, is copied last and removed first."""
    if not remote(source):
        os.replace(source, target)
        return
    write(note, json.dumps({"from": source.name, "to": target.name}).encode())
    settle(note, last)


def settle(note: Path, last: str) -> None:
    """Finishes a move that was begun. All is copied before anything is removed, so that it can be done again."""
    try:
        names = json.loads(content(note))
    except FileNotFoundError:
        return
    if not (plain(names["from"]) and plain(names["to"])):
        raise UserError(f"{note} names folders elsewhere: remove it")
    source, target = note.with_name(names["from"]), note.with_name(names["to"])
    files = sorted(below(source), key=lambda p: p == source / last)
    with told(source, "moved"):
        for file in files:
            fs(source).cp_file(key(file), key(target / relative(file, source)))
        remove(source, last)
        note.unlink()
