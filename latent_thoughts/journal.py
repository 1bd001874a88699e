"""Results that are kept one by one, before the shard that they will stand in is there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from latent_thoughts import places
from latent_thoughts.places import remote
from latent_thoughts.seals import read_line, sealed_line


class Journal:
    """Results kept one by one as they come: a JSON line each, by key, with a checksum (CRC-32).

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
        for number, line in enumerate(lines, 1):
            key, value = read_line(line, f"{path}:{number}")
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
        line = sealed_line(key, value)
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
