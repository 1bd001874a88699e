"""How a file of a run proves that it is what was written.

JSON that a stage goes on from carries a seal, a hash of the rest. A shard carries one of its name, key, counts, rows
and columns in its metadata, and checksums in its pages; a line of a journal its CRC-32.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latent_thoughts import places
from latent_thoughts.files import Damaged, fingerprint, read_json, write_json
from latent_thoughts.types import UserError

SEAL = "seal"


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """An object with a hash of itself."""
    write_json(path, {**value, SEAL: _seal(value)})


def read_sealed(path: Path, *names: str) -> dict[str, Any]:
    """An object that `write_sealed` wrote, with these names in it. Raises UserError where it is anything else.

    Without a seal it is one of an earlier version, which a damaged one cannot be: no bit takes a whole field away.
    """
    value = read_json(path)
    if not isinstance(value, dict) or any(name not in value for name in names):
        raise Damaged(path, f"it lacks {', '.join(names)}")
    seal = value.pop(SEAL, None)
    if (seal is not None and seal != _seal(value)) or (seal is None and value.keys() - {*names}):
        raise Damaged(path, "its seal is another")
    return value


def _seal(value: Any) -> str:
    return fingerprint(json.loads(json.dumps(value)))  # as it will be read: with strings for keys


def sealed_line(key: str, value: Any) -> bytes:
    """A line of a journal: key and value as JSON, with their CRC-32."""
    content = json.dumps([key, value])
    return f"{content[:-1]}, {zlib.crc32(content.encode())}]\n".encode()


def read_line(line: bytes, where: str) -> tuple[str, Any]:
    """Key and value of a journal's line. Raises UserError where it is not what was written."""
    try:
        found = json.loads(line)
        key, value, *check = found
        if len(check) > 1 or (check and check[0] != zlib.crc32(json.dumps([key, value]).encode())):
            raise ValueError("its checksum differs")
        if not isinstance(key, str):
            raise ValueError("it has no key")
    except (ValueError, TypeError, RecursionError) as error:
        raise Damaged(Path(where), str(error)) from None
    return key, value


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder of this machine, by name; several at once."""
    files = {places.relative(path, folder): path for path in places.below(folder) if path != folder}
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(files, pool.map(places.sha256, files.values()), strict=True))


@contextlib.contextmanager
def parquet(path: Path) -> Iterator[None]:
    """Raises UserError for a file that is no Parquet, or was cut or damaged."""
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise Damaged(path, "it is missing") from None
        raise Damaged(path, " ".join(str(error).split())[:200]) from None


def table_of(content: bytes, columns: list[str] | None = None, verified: bool = False) -> pa.Table:
    """A shard's rows, by this thread alone: where the system lets a process start no more threads, Arrow's scanner
    waits for ever. `verified`: by the checksums of its pages. Raises Arrow's errors."""
    file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=verified)
    return file.read(columns, use_threads=False)


def whole(path: Path) -> tuple[pa.Table, bytes]:
    """A shard and its content, checked by its own seal and checksums. Raises UserError where they do not hold."""
    with parquet(path):
        content = places.content(path)
        table = table_of(content, verified=True)
        metadata = pq.read_metadata(pa.BufferReader(content))
    if table.num_rows != metadata.num_rows:  # which the seal knows; a row group says for itself how many it has
        raise Damaged(path, f"it holds {table.num_rows} of {metadata.num_rows} rows")
    if SEAL.encode() in (metadata.metadata or {}):
        proven(path, metadata)
    return table, content


def proven(path: Path, metadata: Any) -> dict[str, Any]:
    """A shard's counts. Raises UserError where its seal is not that of what it holds, or of its name."""
    text = {name: value.decode("utf-8", "replace") for name, value in metadata.metadata.items()}
    known = {name.decode("utf-8", "replace"): value for name, value in text.items()}
    said = {name: known.get(name, "") for name in ("counts", "key")}
    with parquet(path):
        schema = metadata.schema.to_arrow_schema()
    if known[SEAL] != seal_of_shard(path.name, said, metadata.num_rows, schema):
        raise Damaged(path, "its seal is another, or that of another shard")
    return json.loads(known["counts"])


def seal_of_shard(name: str, known: dict[str, str], rows: int, schema: pa.Schema) -> str:
    columns = {field.name: _shape(field.type) for field in schema}
    return fingerprint(name, known, rows, columns)


def _shape(kind: pa.DataType) -> Any:
    """A column's type without the names that Parquet gives to the elements of lists."""
    if pa.types.is_struct(kind):
        return {field.name: _shape(field.type) for field in kind}
    if pa.types.is_map(kind):
        return [_shape(kind.key_type), _shape(kind.item_type)]
    if pa.types.is_list(kind):
        return [_shape(kind.value_type)]
    return str(kind)
