"""Sharded Parquet with manifests: a shard is complete or absent, a manifest is written last.

A stage owns a folder. While it works, the folder holds `stage.json` (whose key it works for) and
finished shards; `manifest.json` closes it. A folder made for another key is set aside under
`NAME.KEY`, never reused and never destroyed, and comes back when its key is asked for again.

Every file proves itself (seals.py): one that was cut, damaged or brought from elsewhere is named and not used, and
doctor.py takes it away.

Everything here works in an object store too (places.py): there a file is made in the cache and put as one object.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latent_thoughts import places, transfer
from latent_thoughts.files import Damaged
from latent_thoughts.files import atomic as atomic
from latent_thoughts.files import fingerprint as fingerprint
from latent_thoughts.files import read_json as read_json
from latent_thoughts.files import settle as settle
from latent_thoughts.files import write_json as write_json
from latent_thoughts.locks import held_run as held_run
from latent_thoughts.locks import run_lock as run_lock
from latent_thoughts.places import remote
from latent_thoughts.seals import SEAL, hashes, parquet, proven, read_sealed, seal_of_shard
from latent_thoughts.seals import table_of as table_of
from latent_thoughts.seals import whole as whole
from latent_thoughts.seals import write_sealed as write_sealed
from latent_thoughts.types import Manifest, UserError

FORMAT_VERSION = 3  # raise it when the meaning of any stored file changes: old shards are not reused


def stage_key(stage: str, config: Any, inputs: dict[str, Manifest] | None = None) -> str:
    """Key of a stage: its name, the config it reads, its input manifests and the format version."""
    return fingerprint(stage, config, {n: told_apart(m) for n, m in (inputs or {}).items()}, FORMAT_VERSION)


def told_apart(manifest: Manifest) -> Any:
    """A finished stage's key; of trainings with one key those that skipped batches have other weights."""
    skipped = manifest.counts.get("skipped")
    return [manifest.key, skipped] if skipped else manifest.key


class Stage:
    """One stage's folder: claims it for a key, collects shards, and closes it with a manifest.

    What lies there under another key is set aside, and comes back with its key; so do the folders beside it that are
    `about` what it holds.
    """

    def __init__(self, folder: Path, name: str, key: str, about: Sequence[str] = ()):
        self.folder, self.name, self.key = folder, name, key
        self._claim([folder.with_name(other) for other in about])

    def _claim(self, about: list[Path]) -> None:
        marker = self.folder / "stage.json"
        if remote(self.folder):
            for path in (*about, self.folder):
                transfer.settle(_note(path), "manifest.json")
        if self.folder.exists() and any(not places.unfinished(path) for path in self.folder.iterdir()):
            owner = read_marker(self.folder)["key"] if marker.exists() else "unmarked"
            inside(self.folder, str(owner))  # becomes a part of a name
            if owner != self.key:
                for path in (*about, self.folder):  # last, so that a killed process leaves nothing about another's
                    _move(path, _free(_aside(path, owner)))
        if not marker.exists() and _aside(self.folder, self.key).exists():
            if not remote(self.folder) and self.folder.exists():  # with what a killed process had not finished
                shutil.rmtree(self.folder)
            for path in (self.folder, *about):
                if not path.exists():
                    _move(_aside(path, self.key), path)
        if not marker.exists():
            write_sealed(marker, {"stage": self.name, "key": self.key})

    @property
    def manifest(self) -> Manifest | None:
        """The manifest, if the stage is complete."""
        path = self.folder / "manifest.json"
        if not path.exists():
            return None
        manifest = read_manifest(self.folder)
        if manifest.stage != self.name:
            raise Damaged(path, f"it is of stage {manifest.stage}")
        return manifest

    def shard(self, name: str) -> Path:
        return inside(self.folder, name)

    def write(self, name: str, rows: list[dict[str, Any]], schema: pa.Schema, counts: dict[str, Any]) -> None:
        """Writes one shard with its counts in the Parquet metadata; both appear together or not at all."""
        known = {"counts": json.dumps(counts), "key": self.key}
        known[SEAL] = seal_of_shard(name, known, len(rows), schema)
        table = pa.Table.from_pylist(rows, schema=schema.with_metadata(known))
        with atomic(self.shard(name)) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)

    def remove(self, name: str) -> None:
        self.shard(name).unlink(missing_ok=True)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a shard that this stage wrote. Raises UserError as `whole` does."""
        return whole(self.shard(name))[0].to_pylist()

    def done(self, name: str) -> dict[str, Any] | None:
        """The counts of a shard that is there already, else None.

        One of another key is not: a worker that outlived its driver may have written it after the folder changed hands.
        Neither is one without a seal, of an earlier version. Raises UserError for what is no shard, or not sound.
        """
        path = self.shard(name)
        if not path.exists():
            return None
        with parquet(path):
            metadata = pq.read_metadata(places.seekable(path))
        known = metadata.metadata or {}
        if known.get(b"key") != self.key.encode() or SEAL.encode() not in known:
            return None
        return proven(path, metadata)

    def describe(self, name: str) -> dict[str, Any]:
        """What a manifest says of a shard, of what really lies there. Raises UserError as `whole` does."""
        table, content = whole(self.shard(name))
        return {"rows": table.num_rows, "sha256": hashlib.sha256(content).hexdigest()}

    def close(
        self,
        shards: list[str],
        counts: dict[str, Any],
        described: dict[str, dict[str, Any]] | None = None,
        model: str | None = None,
        base: str | None = None,
    ) -> Manifest:
        """Writes the manifest; shards that are not `described` are read for it, and so are the files of the folder
        `model`. (In a store that folder has a listing of its own.)"""
        known = dict(described or {})
        unknown = [name for name in shards if name not in known]
        with ThreadPoolExecutor(16) as pool:  # what a store is asked for many times, it is asked for at once
            known |= zip(unknown, pool.map(self.describe, unknown), strict=True)
        described = {name: known[name] for name in shards}
        files = hashes(self.folder / model) if model and not remote(self.folder) else {}
        files = {f"{model}/{name}": value for name, value in files.items() if not name.endswith(".md")}  # to be edited
        manifest = Manifest(self.name, self.key, described, counts, files, base)
        write_sealed(self.folder / "manifest.json", asdict(manifest))
        for path in places.stale(self.folder):  # of processes that were killed: all work is done
            transfer.remove(path)
        return manifest


def _aside(path: Path, key: str) -> Path:
    return path.with_name(f"{path.name}.{key[:12]}")


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}.moving.json")


def _move(source: Path, target: Path) -> None:
    """Nothing where there is nothing. (Of the two names the one without a key says where the note lies.)"""
    if source.exists():
        transfer.move(source, target, _note(min(source, target, key=lambda p: len(p.name))), "manifest.json")


def _free(path: Path) -> Path:
    """The path, or with a number behind it where it is taken."""
    numbered = (path.with_name(f"{path.name}.{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def inside(folder: Path, name: str) -> Path:
    """The file of a folder that something in the folder names. Raises UserError for a name that leads out of it."""
    if not places.plain(name):
        raise UserError(f"{folder} names {name!r} as its own, which does not lie in it: do not use this folder")
    return folder / name


_MANIFEST = ("stage", "key", "shards", "counts")


def read_marker(folder: Path) -> dict[str, Any]:
    """What stage.json says: whose the folder is. Raises UserError where it does not."""
    return read_sealed(folder / "stage.json", "stage", "key")


def read_manifest(folder: Path, compared: bool = True) -> Manifest:
    """Raises UserError where the stage is not complete, and for a manifest that is damaged or (where it is `compared`)
    of another stage than the folder's."""
    path = folder / "manifest.json"
    try:
        value = read_sealed(path, *_MANIFEST)
    except FileNotFoundError:
        raise UserError(f"{folder} is not complete (no manifest.json): run that stage first") from None
    manifest = Manifest(**value)
    if not _well_formed(manifest):
        raise Damaged(path, "it is no manifest")
    for name in (*manifest.shards, *(part for file in manifest.files for part in Path(file).parts)):
        inside(folder, name)
    if compared and (folder / "stage.json").exists() and read_marker(folder)["key"] != manifest.key:
        raise Damaged(path, "it is of another stage than stage.json")
    return manifest


def base_of(manifest: Manifest) -> str | None:
    """Key of the initial checkpoint that a stage goes back to; None where it does not say."""
    return manifest.key if manifest.stage == "initialise" else manifest.base


def same_base(model: Manifest, documents: Manifest) -> None:
    """Raises UserError where documents are token ids of another base model than the one that `model` goes back to."""
    bases = {base_of(model), base_of(documents)}
    if len(bases - {None}) > 1:
        raise UserError(f"the documents of {documents.stage} are of another base model: run {documents.stage} again")


def _well_formed(manifest: Manifest) -> bool:
    objects = (manifest.shards, manifest.counts, manifest.files)
    if not all(isinstance(value, dict) for value in objects) or not isinstance(manifest.key, str):
        return False
    return all(isinstance(s, dict) and {"rows", "sha256"} <= s.keys() for s in manifest.shards.values())


def check_files(folder: Path) -> None:
    """Raises UserError where a file of a completed stage, besides its shards, is not what its manifest says."""
    if not (folder / "manifest.json").exists():
        return
    for name, known in read_manifest(folder).files.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(path, "it is missing")
        if places.sha256(path) != known:
            raise Damaged(path, "checksum differs")


def read_rows(folder: Path, manifest: Manifest, shard: str) -> list[dict[str, Any]]:
    """The rows of one shard. Raises as `checked_table` does."""
    return checked_table(folder, manifest, shard).to_pylist()


def checked_table(folder: Path, manifest: Manifest, shard: str) -> pa.Table:
    """One shard. Raises UserError naming a shard that is missing or not what was written."""
    path = inside(folder, shard)
    try:
        content = places.content(path)
    except FileNotFoundError:
        raise Damaged(path, "it is named by its manifest but missing") from None
    if hashlib.sha256(content).hexdigest() != manifest.shards[shard]["sha256"]:
        raise Damaged(path, "checksum differs")
    return table_of(content)


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A shard as it is, not checked against a manifest."""
    return table_of(places.content(path), columns)
