"""Where files lie: on this machine, or in an object store behind a URL (s3://, gs://, hf://, all that fsspec knows).

A path here is a `pathlib.Path`; one behind a URL is a `UPath`, which has the same methods and is typed as `Path`, so
that the other rooms need not tell them apart. In a store an object appears whole or not at all, and nothing is renamed,
appended to, mapped or locked. What needs that is done in the cache folder (`bench`, `temporary`) and put into the store
when it is whole (transfer.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import socket
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from latent_thoughts.types import UserError

_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+:]+)://(.*)", re.DOTALL)  # with colons: disk:s3
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # by protocol: which extra brings its library
# Listings are never cached: other processes write too. Retries (500, 503, time-outs) are botocore's, and gcsfs's own;
# not `adaptive` ones, which after one 503 hold a client that had little to ask to that little (docs/log.md).
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"use_listings_cache": False, "config_kwargs": {"retries": {"mode": "standard", "max_attempts": 10}}},
    "gs": {"use_listings_cache": False},
}
_SECRETS = re.compile(
    r"[?&;#]([^=&]*(key|secret|token|signature|credential|password)[^=&]*|sig|code|auth|jwt|pwd|pass)=", re.IGNORECASE
)


def place(name: str | Path) -> Path:
    """The path of a name that a user gave. Raises UserError for a URL that holds keys or that nothing here can open."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(name)!r}: a path has to be UTF-8: rename what is not") from None
    found = _URL.fullmatch(str(name))
    if found is None:
        return Path(name).expanduser()
    protocol, rest = found.groups()
    if protocol in ("file", "local"):
        return Path(rest)
    if holds_keys(str(name)):
        raise UserError(f"a {protocol}:// URL holds keys: take them out, and give them by environment variables")
    if protocol in (*_EXTRAS, "hf") and "//" in rest:  # which libraries take for different names
        raise UserError(f"{name}: a name between two slashes is empty: take one of them out")
    try:
        import fsspec
        from upath import UPath

        fsspec.get_filesystem_class(protocol)
    except ImportError:
        extra = _EXTRAS.get(protocol)
        how = f"an extra: pip install 'latent-thoughts[{extra}]'" if extra else "a package that is not installed"
        raise UserError(f"{protocol}:// needs {how}") from None
    except ValueError:
        raise UserError(f"{name}: no kind of storage is called {protocol}") from None
    path: Any = UPath(str(name).rstrip("/"), **_OPTIONS.get(_EXTRAS.get(protocol, protocol), {}))
    return path


def holds_keys(text: str) -> bool:
    """Whether a URL carries a user's name, password, key or signature."""
    found = _URL.fullmatch(text.strip())
    if found is None:
        return False
    before, at, _ = found[2].partition("/")[0].rpartition("@")
    revision = found[1].endswith("hf") and ":" not in before  # hf://NAME@REVISION
    return (bool(at) and not revision) or bool(_SECRETS.search(text))


def plain(name: str) -> bool:
    """Whether a name that stands in a file (a manifest's shard, say) is that of something in the same folder."""
    return name not in ("", ".", "..") and {"/", "\\", "\0"}.isdisjoint(name)


def remote(path: Path) -> bool:
    """Whether it lies in a store."""
    return not isinstance(path, Path)


def errors() -> tuple[type[BaseException], ...]:
    """What a store that cannot be reached raises: for `except`. Libraries that are not in use are not imported."""
    own = {"botocore.exceptions": "BotoCoreError", "gcsfs.retry": "HttpError", "aiohttp": "ClientError"}
    own |= {"httpx": "HTTPError", "httpx2": "HTTPError"}
    return (OSError, *(getattr(sys.modules[name], kind) for name, kind in own.items() if name in sys.modules))


def cache() -> Path:
    """This machine's part of LATENT_THOUGHTS_CACHE, or of `latent-thoughts` in the user's cache folder (which machines
    may share). It may be emptied while nothing runs."""
    chosen = os.environ.get("LATENT_THOUGHTS_CACHE")
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latent-thoughts"
    return (Path(chosen).expanduser() if chosen else users) / socket.gethostname()


def bench(folder: Path) -> Path:
    """Where the files of a folder lie that must be real ones: the folder itself, or one of the cache for a store's."""
    return cache() / _mark(folder) if remote(folder) else folder


def temporary(path: Path) -> Path:
    """A name for what is to become `path`: beside it, or in the cache."""
    name = f".{path.name}.{uuid.uuid4().hex}.tmp"  # process numbers recur, on machines and in time
    return cache() / f".{_mark(path.parent)}{name}" if remote(path) else path.with_name(name)


def unfinished(path: Path) -> bool:
    """Whether a file here is one with a temporary name; of a process that was killed, or that is still at work."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def stale(folder: Path) -> Iterable[Path]:
    """Files of a folder with temporary names: where nobody works in it, of processes that were killed."""
    return cache().glob(f".{_mark(folder)}.*.tmp") if remote(folder) else folder.glob(".*.tmp")


def _mark(path: Path) -> str:
    return hashlib.sha256(str(path).encode()).hexdigest()[:24]


# Reading


def version(path: Path) -> str:
    """SHA-256 of a file here; of one in a store, without reading it, what the store says of its content."""
    if not remote(path):
        return sha256(path)
    info = fs(path).info(key(path))
    tags = ("ETag", "md5Hash", "crc32c", "xet_hash", "blob_id", "etag", "LastModified", "created")
    known = {tag: str(info[tag]) for tag in tags if info.get(tag) is not None}
    return json.dumps([info.get("size"), *list(known.items())[:1]])


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]


def content(path: Path) -> bytes:
    """A whole file; FileNotFoundError where there is none."""
    if not remote(path):
        return path.read_bytes()
    with told(path, "read"):
        return fs(path).cat_file(key(path))


def opened(path: Path) -> Any:
    """For reading bytes and lines."""
    return io.BufferedReader(path.open("rb"), 2**20) if remote(path) else path.open("rb")  # pyright: ignore


def seekable(path: Path) -> Any:
    """For pyarrow: the path, or an open file of a store."""
    return path.open("rb") if remote(path) else path


def below(path: Path) -> list[Path]:
    """The file itself, or all files of a folder, sorted. Raises OSError for a folder in it that cannot be read."""
    if remote(path):
        fs(path).invalidate_cache()  # hf keeps listings for itself
        return [_at(path, name) for name in sorted(fs(path).find(key(path)))]
    if path.is_file():
        return [path]
    found = (Path(folder, name) for folder, _, names in os.walk(path, onerror=_raised) for name in names)
    return sorted(p for p in found if p.is_file())


def _raised(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # as of a folder that is not there
        raise error


def matching(pattern: Path) -> list[Path]:
    """Files whose names match a glob pattern in a store."""
    return [_at(pattern, name) for name in sorted(fs(pattern).glob(key(pattern)))]


def write(path: Path, data: bytes) -> None:
    """One object of a store, whole or not at all."""
    with told(path, "written"):
        fs(path).pipe_file(key(path), data)


def create(path: Path, data: bytes) -> None:
    """Raises FileExistsError where the object is there already (in s3 and gs of two that try, one succeeds)."""
    with told(path, "written"):
        fs(path).pipe_file(key(path), data, mode="create")


# What of a path is fsspec's


def fs(path: Any) -> Any:
    """The file system of a store's path."""
    return path.fs


def key(path: Any) -> str:
    """What its file system calls it."""
    return path.path


def _at(path: Any, key: str) -> Path:
    """The path of a key in the store that `path` lies in."""
    return type(path)(path.fs.unstrip_protocol(key), **path.storage_options)


def relative(path: Path, folder: Path) -> str:
    """The name of a file within a folder, with slashes."""
    if not remote(path):
        return path.relative_to(folder).as_posix()
    return key(path)[len(key(folder).rstrip("/")) + 1 :]


@contextlib.contextmanager
def told(path: Path, what: str) -> Iterator[None]:
    """Raises UserError where a store does not do `what` with `path`, after its library has tried again and again."""
    try:
        yield
    except errors() as error:
        expected = FileNotFoundError if what == "read" else FileExistsError
        if not remote(path) or isinstance(error, expected):
            raise
        raise UserError(f"{path} cannot be {what}: {' '.join(str(error).split())[:300]}; run again to go on") from None
