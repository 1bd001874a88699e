"""Sharded Parquet with manifests: a shard is complete or absent, a manifest is written last.

A stage owns a folder. While it works, the folder holds `stage.json` (whose key it works for) and
finished shards; `manifest.json` closes it. A folder made for another key is set aside under
`NAME.KEY`, never reused and never destroyed, and comes back when its key is asked for again.

Everything here works in an object store too (places.py): there a file is made in the cache and put as one object.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latent_thoughts import leases, places, transfer
from latent_thoughts.places import remote
from latent_thoughts.types import Manifest, UserError

FORMAT_VERSION = 2  # raise it when the meaning of any stored file changes: old shards are not reused


def fingerprint(*parts: Any) -> str:
    """SHA-256 (hex) of the parts as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def stage_key(stage: str, config: Any, inputs: dict[str, Manifest] | None = None) -> str:
    """Key of a stage: its name, the config it reads, its input manifests and the format version."""
    return fingerprint(stage, config, {n: m.key for n, m in (inputs or {}).items()}, FORMAT_VERSION)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path of this machine; on success it is synced and takes `path`'s place, or is put there."""
    temporary = places.temporary(path)
    (temporary if remote(path) else path).parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if remote(path):
            transfer.put(temporary, path)
            return
        if path.is_dir() and temporary.is_dir():
            shutil.rmtree(path)
        settle(temporary, path)
    finally:
        transfer.remove(temporary)


def settle(temporary: Path, path: Path) -> None:
    """Syncs a finished file or folder and gives it its name."""
    for file in [temporary, *(temporary.rglob("*") if temporary.is_dir() else [])]:
        _sync(file)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    try:
        return json.loads(places.content(path).decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); remove it to have it made again") from None


class Stage:
    """One stage's folder: claims it for a key, collects shards, and closes it with a manifest."""

    def __init__(self, folder: Path, name: str, key: str):
        self.folder, self.name, self.key = folder, name, key
        self._claim()

    def _claim(self) -> None:
        marker = self.folder / "stage.json"
        note = self.folder.with_name(f".{self.folder.name}.moving.json")
        if remote(self.folder):
            transfer.settle(note, "manifest.json")
        if self.folder.exists() and any(not places.unfinished(path) for path in self.folder.iterdir()):
            owner = _read_object(marker, "key")["key"] if marker.exists() else "unmarked"
            inside(self.folder, str(owner))  # becomes a part of a name
            if owner != self.key:
                transfer.move(self.folder, _free(self._aside(owner)), note, "manifest.json")
        if not marker.exists() and self._aside(self.key).exists():
            transfer.move(self._aside(self.key), self.folder, note, "manifest.json")
        if not marker.exists():
            write_json(marker, {"stage": self.name, "key": self.key})

    def _aside(self, key: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{key[:12]}")

    @property
    def manifest(self) -> Manifest | None:
        """The manifest, if the stage is complete."""
        path = self.folder / "manifest.json"
        return read_manifest(self.folder) if path.exists() else None

    def shard(self, name: str) -> Path:
        return inside(self.folder, name)

    def write(self, name: str, rows: list[dict[str, Any]], schema: pa.Schema, counts: dict[str, Any]) -> None:
        """Writes one shard with its counts in the Parquet metadata; both appear together or not at all."""
        known = {"counts": json.dumps(counts), "key": self.key}
        table = pa.Table.from_pylist(rows, schema=schema.with_metadata(known))
        with atomic(self.shard(name)) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def remove(self, name: str) -> None:
        self.shard(name).unlink(missing_ok=True)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a shard that this stage wrote."""
        return read_table(self.shard(name)).to_pylist()

    def done(self, name: str) -> dict[str, Any] | None:
        """The counts of a shard that is there already, else None.

        One of another key is not: a worker that outlived its driver may have written it after the folder changed hands.
        """
        path = self.shard(name)
        if not path.exists():
            return None
        known = pq.read_schema(places.seekable(path)).metadata or {}
        return json.loads(known[b"counts"]) if known.get(b"key", b"").decode() == self.key else None

    def describe(self, name: str) -> dict[str, Any]:
        """What a manifest says of a shard, of what really lies there."""
        content = places.content(self.shard(name))
        rows = pq.read_metadata(io.BytesIO(content)).num_rows
        return {"rows": rows, "sha256": hashlib.sha256(content).hexdigest()}

    def close(
        self, shards: list[str], counts: dict[str, Any], described: dict[str, dict[str, Any]] | None = None
    ) -> Manifest:
        """Writes the manifest; shards that are not `described` are read for it."""
        known = dict(described or {})
        unknown = [name for name in shards if name not in known]
        with ThreadPoolExecutor(16) as pool:  # what a store is asked for many times, it is asked for at once
            known |= zip(unknown, pool.map(self.describe, unknown), strict=True)
        described = {name: known[name] for name in shards}
        manifest = Manifest(self.name, self.key, described, counts)
        write_json(self.folder / "manifest.json", asdict(manifest))
        for path in places.stale(self.folder):  # of processes that were killed: all work is done
            transfer.remove(path)
        return manifest


class Journal:
    """Results kept one by one as they come: a JSON line each, by key.

    Here they are in a file that only grows, and a process that is killed loses the line it was writing. In a store,
    where nothing grows, they are in numbered objects, and the last `FLUSH` seconds may be lost.
    """

    FLUSH = 20.0

    def __init__(self, path: Path):
        self.path, self.known = path, dict[str, Any]()
        self._waiting, self._flushed = list[bytes](), time.monotonic()
        files = self._files()
        self._parts = int(files[-1].name.rpartition(".")[2]) if files and remote(path) else 0
        lines = b"".join(map(places.content, files)).split(b"\n")[:-1]  # what has no end was cut off
        for line in lines:
            key, value = json.loads(line)
            self.known[key] = value
        if not remote(path):
            with path.open("ab") as file:
                file.truncate(sum(len(line) + 1 for line in lines))

    def _files(self) -> list[Path]:
        if remote(self.path):
            return sorted(self.path.parent.glob(f"{self.path.name}.*"))
        return [self.path] if self.path.exists() else []

    def add(self, key: str, value: Any) -> None:
        self.known[key] = value
        line = json.dumps([key, value]).encode() + b"\n"
        if not remote(self.path):
            with self.path.open("ab") as file:
                file.write(line)
            return
        self._waiting.append(line)
        if time.monotonic() - self._flushed >= self.FLUSH:
            self._parts += 1
            places.write(self.path.with_name(f"{self.path.name}.{self._parts:08}"), b"".join(self._waiting))
            self._waiting, self._flushed = [], time.monotonic()

    def remove(self) -> None:
        """Once what it holds stands in a shard."""
        for path in self._files():
            path.unlink()


def _read_object(path: Path, *names: str) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict) or any(name not in value for name in names):
        raise UserError(f"{path} lacks {', '.join(names)}; remove it to have it made again")
    return {name: value[name] for name in names}


def _free(path: Path) -> Path:
    """The path, or with a number behind it where it is taken."""
    numbered = (path.with_name(f"{path.name}.{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def inside(folder: Path, name: str) -> Path:
    """The file of a folder that something in the folder names. Raises UserError for a name that leads out of it."""
    if not places.plain(name):
        raise UserError(f"{folder} names {name!r} as its own, which does not lie in it: do not use this folder")
    return folder / name


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError where the stage has not been completed, and for shards that lie elsewhere."""
    try:
        found = Manifest(**_read_object(folder / "manifest.json", "stage", "key", "shards", "counts"))
        for name in found.shards:
            inside(folder, name)
        return found
    except FileNotFoundError:
        raise UserError(f"{folder} is not complete (no manifest.json): run that stage first") from None


def read_rows(folder: Path, manifest: Manifest, shard: str) -> list[dict[str, Any]]:
    """The rows of one shard. Raises as `checked_table` does."""
    return checked_table(folder, manifest, shard).to_pylist()


def checked_table(folder: Path, manifest: Manifest, shard: str) -> pa.Table:
    """One shard. Raises UserError naming a shard that is missing or not what was written."""
    path = inside(folder, shard)
    try:
        content = places.content(path)
    except FileNotFoundError:
        raise UserError(f"shard {path} is named by its manifest but missing: remove {folder} and run again") from None
    if hashlib.sha256(content).hexdigest() != manifest.shards[shard]["sha256"]:
        raise UserError(f"shard {path} is damaged (checksum differs): remove {folder} and run again")
    return pq.read_table(pa.BufferReader(content))


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A shard as it is, not checked against a manifest."""
    return pq.read_table(pa.BufferReader(places.content(path)), columns=columns)


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
            raise UserError(f"{folder} is in use by process {file.read().strip() or '?'}") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


_held: list[Path] = []


def held_run() -> Path | None:
    """The run folder that this process holds; None where it holds none."""
    return _held[-1] if _held else None
