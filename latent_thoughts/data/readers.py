"""Documents from JSONL, Parquet, text files, Hugging Face datasets and the built-in worlds."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from latent_thoughts.config import Data
from latent_thoughts.config.data import FIELD
from latent_thoughts.data import interchange, worlds
from latent_thoughts.places import below, matching, opened, place, relative, remote, seekable, version
from latent_thoughts.transfer import local
from latent_thoughts.types import Document, UserError

Row = tuple[str, dict[str, Any]]  # where it stands, for error messages; its columns
_NOT_TEXT = {".json", ".csv", ".tsv", ".xz", ".zip", ".tar", ".tgz", ".7z", ".arrow", ".pdf"}
_ROWS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # read as they are, by what stands before


def read(config: Data, seed: int, skipped: Callable[[str], None] = lambda _: None) -> Iterator[Document]:
    """Streams the documents of a source, at most `limit`.

    Raises UserError for a missing source, and for a malformed row (file, line and reason) unless
    `malformed` is `skip`: then `skipped` is told.
    """
    if config.source.startswith("world:"):
        world = config.world
        made = worlds.documents(config.source.removeprefix("world:"), world, seed if world.seed is None else world.seed)
        yield from islice(made, config.limit)
        return

    def good() -> Iterator[Document]:
        for item in _rows(config, config.columns):
            try:
                if isinstance(item, UserError):
                    raise item
                yield _document(config, *item)
            except UserError as error:
                if config.malformed == "error":
                    raise
                skipped(str(error))

    yield from islice(good(), config.limit)


def rows(config: Data) -> Iterator[dict[str, Any]]:
    """The columns of every row of a source whose format nobody can set. Raises UserError for one that is missing or has
    a malformed row."""
    for item in _rows(config, settable=False):
        if isinstance(item, UserError):
            raise item
        yield item[1]


def _rows(config: Data, columns: set[str] | None = None, settable: bool = True) -> Iterator[Row | UserError]:
    """Of Parquet those columns alone, if they are there: another may hold what has no value in Python. `settable`:
    whether a user can say what a file is that its name does not tell."""
    scheme, _, rest = config.source.partition(":")
    if scheme in ("hub", "disk"):
        yield from _dataset_rows(scheme, rest, config.split)
        return
    for path in files(config):
        kind = kind_of(config, path, settable)
        if _ends(path)[1] and not path.stat().st_size:
            yield UserError(f"{path}: cannot be read (it is empty, which no packed file is)")
        elif kind == "parquet":
            yield from _parquet(path, columns)
        elif kind == "jsonl":
            yield from _jsonl(path)
        else:
            if config.format == "auto":
                _no_rows(path, settable)
            named = {} if columns is None else {"path": _name(config, path)}  # no text of an evaluation set's
            yield from _text(path, named)


def hashes(config: Data) -> list[list[str]]:
    """The source's files and what tells whether they have changed, those of a data set on disk too."""
    scheme, _, rest = config.source.partition(":")
    found = files(config)
    return [[str(path), version(path)] for path in (below(place(rest)) if scheme == "disk" else found)]


def files(config: Data, setting: str = "data.source, or data.held_out_source") -> list[Path]:
    """The source's files in order; none for worlds and data sets. Raises UserError, which names the setting, where none
    match, and for a data set on disk that is not there."""
    scheme, _, rest = config.source.partition(":")
    if scheme == "disk" and not place(rest).exists():
        raise UserError(f"{config.source} does not exist: correct {setting}")
    if scheme in ("world", "hub", "disk"):
        return []
    path = place(config.source)
    if path.is_dir():
        found = _sorted_out(config)[0]
    elif path.is_file():
        found = [path]
    elif remote(path):
        found = matching(path)
    else:
        found = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
    if not found:
        raise UserError(f"{config.source} does not exist: correct {setting}")
    return sorted(found)


def left_out(config: Data) -> list[str]:
    """The names of a folder's files that are not read, since it holds JSONL or Parquet."""
    folder = place(config.source)
    if config.source.partition(":")[0] in ("world", "hub", "disk") or not folder.is_dir():
        return []
    return [relative(path, folder) for path in _sorted_out(config)[1]]


def _sorted_out(config: Data) -> tuple[list[Path], list[Path]]:
    """The files of a folder that are read, and those that are not; of what is hidden, folders too, neither."""
    folder = place(config.source)
    found = [p for p in below(folder) if not any(part.startswith(".") for part in relative(p, folder).split("/"))]
    rows: list[Path] = []
    others: list[Path] = []
    for path in found:
        (rows if _ends(path)[0] in _ROWS else others).append(path)
    return (rows, others) if rows and config.format == "auto" else (found, [])


def _ends(path: Path) -> tuple[str, str]:
    """How a file's name ends: for what it holds, and for how that is packed. What a URL asks for (?...) is no part."""
    name = PurePosixPath(path.name.partition("?")[0] if remote(path) else path.name)
    packed = name.suffix.lower() if name.suffix.lower() in _PACKED else ""
    return (name.with_suffix("") if packed else name).suffix.lower(), packed


def kind_of(config: Data, path: Path, settable: bool = True) -> str:
    """The format, by file name where it is not given. Raises UserError for files that are surely not plain text."""
    if config.format != "auto":
        return config.format
    suffix, _ = _ends(path)
    if suffix in _NOT_TEXT:
        more = ", or set data.format" if settable else ""
        raise UserError(f"{path}: {suffix} files are not read as they are: convert them to JSONL{more}")
    return _ROWS.get(suffix, "text")


def unpacked(path: Path, file: Any) -> Any:
    """A file that was opened, for reading bytes and lines, unpacked where its name says that it is packed."""
    if (kind := _PACKED.get(_ends(path)[1])) is None:
        return file
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), kind), 2**16)  # pyright: ignore


def _jsonl(path: Path) -> Iterator[Row | UserError]:
    number = 0
    with unpacked(path, opened(path)) as file:
        while True:
            number += 1
            try:
                line = file.readline()
            except OSError as error:  # a packed file that was cut short, or is none
                yield UserError(f"{path}:{number}: cannot be read on ({error})")
                return
            if not line:
                return
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                yield UserError(f"{where}: not valid JSON ({error})")
                continue
            yield (where, value) if isinstance(value, dict) else UserError(f"{where}: not a JSON object")


def _parquet(path: Path, columns: set[str] | None) -> Iterator[Row | UserError]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(seekable(path))
        there = file.schema_arrow.names
        wanted = sorted(columns) if columns is not None and columns <= {*there} else None  # else all, to name them
        for batch in file.iter_batches(batch_size=1024, columns=wanted, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError, ValueError, OverflowError, LookupError) as error:  # the last: of time zones
        yield UserError(f"{path}: not a readable Parquet file, behind row {number} ({error})")


def _name(config: Data, path: Path) -> str:
    """A file's name within the folder that is the source, or its name alone."""
    folder = place(config.source)
    return relative(path, folder) if folder.is_dir() else path.name


def _no_rows(path: Path, settable: bool) -> None:
    """Raises UserError for what would be read as a text and looks like JSONL."""
    try:
        with unpacked(path, opened(path)) as file:
            lines = file if file.peek(1)[:1] == b"{" else ()
            first = [json.loads(line) for line in islice(filter(bytes.strip, lines), 2)]
    except (ValueError, RecursionError, OSError):
        return
    if first and all(isinstance(value, dict) for value in first):
        how = "set data.format, to jsonl or to text" if settable else "give it a name that ends in .jsonl"
        raise UserError(f"{path}: its first line is a JSON object, as in JSONL: {how}")


def _text(path: Path, named: dict[str, str]) -> Iterator[Row | UserError]:
    try:
        with unpacked(path, opened(path)) as file:
            yield str(path), {"text": file.read().decode("utf-8-sig")} | named
    except UnicodeDecodeError as error:
        yield UserError(f"{path}: not UTF-8 text ({error})")
    except OSError as error:
        yield UserError(f"{path}: cannot be read ({error})")


def _dataset_rows(scheme: str, rest: str, split: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "reading Hugging Face datasets needs an extra: pip install 'latent-thoughts[datasets]'"
        ) from None
    try:
        if scheme == "disk":
            loaded = datasets.load_from_disk(str(local(place(rest))))
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            name, _, subset = rest.partition(":")
            rows = datasets.load_dataset(name, subset or None, split=split, streaming=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load dataset {rest} (split {split}): {error}") from None
    for number, row in enumerate(rows):
        yield f"{rest}[{number}]", dict(row)


def _document(config: Data, where: str, row: dict[str, Any]) -> Document:
    columns = {**row, **_extract(config, where, row)}
    thoughts: dict[int, str] = {}
    if config.chunks:
        pieces, thoughts = interchange.pieces_of(columns, where)
    else:
        pieces = tuple(_fill(t, columns, where) for t in config.pieces) if config.pieces else None
    text = _fill(config.text, columns, where) if pieces is None else "".join(pieces)
    if config.thought and pieces and not any(_missing(columns.get(c, "")) for c in FIELD.findall(config.thought)):
        thought = _fill(config.thought, columns, where)
        thoughts = {len(pieces) - 1: thought} if thought.strip() else {}
    name = _value(config.id, columns, where) if config.id else ""
    try:
        "".join((name, *thoughts.values())).encode("utf-8")
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError:
        raise UserError(f"{where}: the text holds a lone surrogate, which no tokenizer can encode") from None
    return Document(name or digest[:16], text, {}, pieces, thoughts)


def _extract(config: Data, where: str, row: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for column, pattern in config.extract.items():
        match = re.search(pattern, _value(column, row, where))
        if match is None:
            raise UserError(f"{where}: column {column} does not match data.extract.{column}")
        found.update(match.groupdict())
    return found


def _fill(template: str, columns: dict[str, Any], where: str) -> str:
    return FIELD.sub(lambda match: _value(match.group(1), columns, where), template)


def _missing(value: Any) -> bool:
    """Null, or what pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _value(name: str, columns: dict[str, Any], where: str) -> str:
    if name not in columns:
        raise UserError(f"{where}: no column {name} (there are: {', '.join(columns) or 'none'})")
    if _missing(columns[name]):
        raise UserError(f"{where}: column {name} is empty (null or NaN)")
    if not isinstance(columns[name], str | int | float):
        raise UserError(f"{where}: column {name} is {type(columns[name]).__name__}, not text")
    return str(columns[name])
