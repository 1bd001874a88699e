"""One stage's folder: whether its files are what was written, for the settings that it is of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from latent_thoughts import places, transfer
from latent_thoughts.doctor.remedies import Finding, aside, damaged, fault, write
from latent_thoughts.files import Damaged, read_json
from latent_thoughts.metrics import logged
from latent_thoughts.seals import read_line, read_sealed, whole, write_sealed
from latent_thoughts.stages.train import checkpoint
from latent_thoughts.store import read_manifest, read_marker
from latent_thoughts.types import Manifest, UserError

T = TypeVar("T")
MARKERS = ("stage.json", "manifest.json")
LINES: dict[str, Callable[[bytes, Path], Any]] = {
    "answered.jsonl": lambda line, path: read_line(line, str(path)),
    "metrics.jsonl": logged,
}


class StageFolder:
    """One stage's folder."""

    def __init__(self, run: Path, folder: Path):
        self.run, self.folder = run, folder

    def findings(self) -> Iterator[Finding]:
        manifest, why = _tried(lambda: read_manifest(self.folder, compared=False), self.folder / "manifest.json")
        if why:
            yield self._damaged(self.folder / "manifest.json", why)
        marker, why = _tried(lambda: read_marker(self.folder), self.folder / "stage.json")
        if manifest and (marker is None or marker["key"] != manifest.key):
            if self._matches(manifest):
                why = why or ("the manifest and what lies here are of another key" if marker else "it is missing")
                marker = {"stage": manifest.stage, "key": manifest.key}
                yield self._new_marker(marker, why)
            else:
                yield self._damaged(self.folder / "manifest.json", "it is of another stage than all else here")
                manifest = None
        elif manifest is None and (said := self._marker_of_shards()) and said["key"] != (marker or {}).get("key"):
            marker = said
            yield self._new_marker(said, why or "the shards that lie here are all of another key")
        elif marker is None:
            yield self._unknown(why)
        yield from self._contents(manifest)
        yield from self._shards(manifest, marker["key"] if marker else None)
        yield from self._lines()
        yield from self._objects()
        yield from self._checkpoints()

    def _damaged(self, path: Path, why: str) -> Finding:
        """Without what is damaged the stage is not complete."""
        return damaged(self.run, path, why, also=self.folder / "manifest.json")

    def _matches(self, manifest: Manifest) -> bool:
        """Whether all that it names, and it names something, is what lies here."""
        named = [*manifest.shards, *manifest.files]
        return bool(named) and not any(self._differs(manifest, name) for name in named)

    def _differs(self, manifest: Manifest, name: str) -> str:
        known = manifest.files.get(name) or manifest.shards[name]["sha256"]
        path = self.folder / name
        if not path.is_file():
            return "named by the manifest, but missing"
        return "" if places.sha256(path) == known else "not what the manifest says (checksum differs)"

    def _contents(self, manifest: Manifest | None) -> Iterator[Finding]:
        if manifest is None:
            return
        for name in [*manifest.shards, *manifest.files]:
            if why := self._differs(manifest, name):
                yield self._damaged(self.folder / name, why)
        model = self.folder / "model"
        if places.remote(model) and model.is_dir():
            if not transfer.complete(model):
                yield self._damaged(model, "not put as a whole")
            for name in transfer.differing(model):
                yield self._damaged(model / name, "missing, or not what was put (checksum differs)")

    def _shards(self, manifest: Manifest | None, key: str | None) -> Iterator[Finding]:
        """Of a stage that is not complete, and those that a manifest does not name."""
        for path in _here(self.folder, ".parquet"):
            if manifest and path.name in manifest.shards:
                continue
            known, why = _tried(lambda path=path: whole(path)[0].schema.metadata, path)
            owner = (known or {}).get(b"key", b"").decode()
            if why:
                yield damaged(self.run, path, why)
            elif key is not None and owner != key:
                yield damaged(self.run, path, "a shard of other settings, or of another run")
            elif manifest:
                yield damaged(self.run, path, "the manifest does not name it")

    def _marker_of_shards(self) -> dict[str, Any] | None:
        """What stage.json must have said, where sound shards agree on it."""
        keys = set[bytes]()
        for path in _here(self.folder, ".parquet"):
            with contextlib.suppress(UserError):
                keys.add(whole(path)[0].schema.metadata.get(b"key", b""))
        return {"stage": self.folder.name.partition(".")[0], "key": keys.pop().decode()} if len(keys) == 1 else None

    def _new_marker(self, marker: dict[str, Any], why: str) -> Finding:
        path = self.folder / "stage.json"
        return Finding(path, why, "written anew, from what lies here", lambda: write_sealed(path, marker))

    def _unknown(self, why: str) -> Finding:
        path, remedy = (
            self.folder / "stage.json",
            "moved to damaged/; the next run sets the folder aside",
        )
        return Finding(path, why or "it is missing", remedy, lambda: aside(self.run, path), wrong=path.exists())

    def _lines(self) -> Iterator[Finding]:
        """Journals (in a store in numbered parts) and metrics, without a last line that was cut off."""
        for path in _here(self.folder, ""):
            read = next((LINES[name] for name in LINES if f"{path.name}.".startswith(f"{name}.")), None)
            if read is None:
                continue
            lines = places.content(path).split(b"\n")[:-1]
            faulty = [bool(fault(read, line, path)) for line in lines]
            if any(faulty):
                kept = b"".join(line + b"\n" for line, bad in zip(lines, faulty, strict=True) if not bad)
                what = f"{sum(faulty)} of {len(lines)} lines damaged, the first is line {faulty.index(True) + 1}"
                yield Finding(path, what, "written anew without them", lambda path=path, kept=kept: write(path, kept))

    def _objects(self) -> Iterator[Finding]:
        for path in _here(self.folder, ".json"):
            if path.name in MARKERS:
                continue
            read = (lambda path: read_sealed(path, "rows", "counts")) if path.name == "read.json" else read_json
            if why := fault(read, path):
                yield self._damaged(path, why)

    def _checkpoints(self) -> Iterator[Finding]:
        for path in [*self.folder.glob("checkpoint_*"), self.folder / "stable"]:
            if checkpoint.there(path):
                if why := fault(checkpoint.check, path):
                    also = self.folder / "manifest.json" if path.name == "stable" else None
                    yield damaged(self.run, path, why, also)
            elif path.is_dir() and not places.remote(path):
                yield damaged(self.run, path, "a checkpoint without its state.json")


def _here(folder: Path, suffix: str) -> list[Path]:
    """The files of a folder itself with such a name, but temporary ones."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.endswith(suffix) and not p.name.startswith(".") and p.is_file())


def _tried(read: Callable[[], T], path: Path) -> tuple[T | None, str]:
    """What a file holds, or why it cannot be read; neither where there is none."""
    if not path.exists():
        return None, ""
    try:
        return read(), ""
    except Damaged as error:
        return None, error.why if error.path == path else str(error)
    except UserError as error:
        return None, str(error)
