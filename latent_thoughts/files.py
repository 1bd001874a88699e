"""Files that are whole or absent, hashes of what is in them, and the error for one that is not what was written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latent_thoughts import places, transfer
from latent_thoughts.locks import held_run
from latent_thoughts.places import remote
from latent_thoughts.types import UserError


def fingerprint(*parts: Any) -> str:
    """SHA-256 (hex) of the parts as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


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
            _replace(path, temporary)
        else:
            settle(temporary, path)
    finally:
        transfer.remove(temporary)


def _replace(path: Path, temporary: Path) -> None:
    """Puts a finished folder in the place of another, which goes last: whoever is killed in between leaves both, one of
    them or the two under temporary names."""
    old = places.temporary(path)
    path.rename(old)
    try:
        settle(temporary, path)
    except BaseException:
        os.replace(old, path)
        raise
    transfer.remove(old)


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


_FULL = ("No space left on device", "Disk quota exceeded", "File too large", "disk is full")
_FULL += ("unexpected pos", "PytorchStreamWriter")  # torch's writer, which found less in a file than it had written


def out_of_space(error: BaseException | None) -> bool:
    """Whether a full disk (or a quota, or a limit on a file's size) is behind an error. Libraries that write through
    other languages say so in words of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(words in str(error) for words in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_json(path: Path, value: Any) -> None:
    with atomic(path) as temporary:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        # a lone surrogate, as of the name of a file that is not UTF-8, becomes its escape in JSON
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> Any:
    content = places.content(path)
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"not valid JSON: {error}") from None


class Damaged(UserError):
    """A file of a run that is not what was written."""

    def __init__(self, path: Path, why: str):
        self.path, self.why = path, why
        how = f"run latent-thoughts doctor {held_run() or 'RUN'} --repair, and then the same command again"
        super().__init__(f"{path} is damaged ({why}): {how}")

    def __reduce__(self):  # from a worker's process
        return Damaged, (self.path, self.why)
