"""Sharded Parquet with manifests: a shard is complete or absent, a manifest is written last.

A stage owns a folder. While it works, the folder holds `stage.json` (whose key it works for) and
finished shards; `manifest.json` closes it. A folder made for another key is set aside under
`NAME.KEY`, never reused and never destroyed, and comes back when its key is asked for again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latent_thoughts.types import Manifest, UserError

FORMAT_VERSION = 2  # raise it when the meaning of any stored file changes: old shards are not reused


def fingerprint(*parts: Any) -> str:
    """SHA-256 (hex) of the parts as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def stage_key(stage: str, config: Any, inputs: dict[str, Manifest] | None = None) -> str:
    """Key of a stage: its name, the config it reads, its input manifests and the format version."""
    return fingerprint(stage, config, {n: m.key for n, m in (inputs or {}).items()}, FORMAT_VERSION)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and takes `path`'s place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # process numbers recur, on machines and in time
    try:
        yield temporary
        if path.is_dir() and temporary.is_dir():
            shutil.rmtree(path)
        settle(temporary, path)
    finally:
        _remove(temporary)


def settle(temporary: Path, path: Path) -> None:
    """Syncs a finished file or folder and gives it its name."""
    for file in [temporary, *(temporary.rglob("*") if temporary.is_dir() else [])]:
        _sync(file)
    os.replace(temporary, path)
    _sync(path.parent)


def _unfinished(path: Path) -> bool:
    """Whether it is what `atomic` writes to; of a process that was killed, or that is still at work."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); remove it to have it made again") from None


class Stage:
    """One stage's folder: claims it for a key, collects shards, and closes it with a manifest."""

    def __init__(self, folder: Path, name: str, key: str):
        self.folder, self.name, self.key = folder, name, key
        self._claim()

    def _claim(self) -> None:
        marker = self.folder / "stage.json"
        if self.folder.exists() and any(not _unfinished(path) for path in self.folder.iterdir()):
            owner = _read_object(marker, "key")["key"] if marker.exists() else "unmarked"
            if owner != self.key:
                os.replace(self.folder, _free(self._aside(owner)))
        if not marker.exists() and self._aside(self.key).exists():
            os.replace(self._aside(self.key), self.folder)
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
        return self.folder / name

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
        return pq.read_table(self.shard(name)).to_pylist()

    def done(self, name: str) -> dict[str, Any] | None:
        """The counts of a shard that is there already, else None.

        One of another key is not: a worker that outlived its driver may have written it after the folder changed hands.
        """
        path = self.shard(name)
        if not path.exists():
            return None
        known = pq.read_schema(path).metadata or {}
        return json.loads(known[b"counts"]) if known.get(b"key", b"").decode() == self.key else None

    def describe(self, name: str) -> dict[str, Any]:
        """What a manifest says of a shard."""
        return {"rows": pq.read_metadata(self.shard(name)).num_rows, "sha256": sha256(self.shard(name))}

    def close(
        self, shards: list[str], counts: dict[str, Any], described: dict[str, dict[str, Any]] | None = None
    ) -> Manifest:
        """Writes the manifest; shards that are not `described` are read for it."""
        known = described or {}
        described = {name: known.get(name) or self.describe(name) for name in shards}
        manifest = Manifest(self.name, self.key, described, counts)
        write_json(self.folder / "manifest.json", asdict(manifest))
        for path in filter(_unfinished, self.folder.iterdir()):  # of processes that were killed: all work is done
            _remove(path)
        return manifest


class Journal:
    """Results kept one by one as they come: a JSON line each, by key, in a file that only grows.

    A process that is killed loses the line it was writing, and nothing else.
    """

    def __init__(self, path: Path):
        self.path, self.known = path, dict[str, Any]()
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # what has no end was cut off
        for line in lines:
            key, value = json.loads(line)
            self.known[key] = value
        with path.open("ab") as file:
            file.truncate(sum(len(line) + 1 for line in lines))

    def add(self, key: str, value: Any) -> None:
        self.known[key] = value
        with self.path.open("ab") as file:
            file.write(json.dumps([key, value]).encode() + b"\n")

    def remove(self) -> None:
        """Once what it holds stands in a shard."""
        self.path.unlink(missing_ok=True)


def _read_object(path: Path, *names: str) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict) or any(name not in value for name in names):
        raise UserError(f"{path} lacks {', '.join(names)}; remove it to have it made again")
    return {name: value[name] for name in names}


def _free(path: Path) -> Path:
    """The path, or with a number behind it where it is taken."""
    numbered = (path.with_name(f"{path.name}.{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError where the stage has not been completed."""
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder} is not complete (no manifest.json): run that stage first")
    return Manifest(**_read_object(path, "stage", "key", "shards", "counts"))


def read_rows(folder: Path, manifest: Manifest, shard: str) -> list[dict[str, Any]]:
    """The rows of one shard. Raises as `read_table` does."""
    return read_table(folder, manifest, shard).to_pylist()


def read_table(folder: Path, manifest: Manifest, shard: str) -> pa.Table:
    """One shard. Raises UserError naming a shard that is missing or not what was written."""
    path = folder / shard
    if not path.exists():
        raise UserError(f"shard {path} is named by its manifest but missing: remove {folder} and run again")
    if sha256(path) != manifest.shards[shard]["sha256"]:
        raise UserError(f"shard {path} is damaged (checksum differs): remove {folder} and run again")
    return pq.read_table(path)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds a run folder for this process. The kernel lets go of it when the process dies.

    Raises UserError where another living process holds it.
    """
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
        _held.append(folder)
        try:
            yield
        finally:
            _held.remove(folder)


_held: list[Path] = []


def held_run() -> Path | None:
    """The run folder that this process holds; None where it holds none."""
    return _held[-1] if _held else None
