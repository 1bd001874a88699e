"""Every reply ever received, by the hash of its question: one SQLite file in WAL mode.

A reply is committed before anything else sees it, so that a process that is killed loses what was in flight and
nothing more. (Commits are not synced one by one: a machine that loses power may lose the last few, never the file.)

A store of replies behind a URL is worked on in the cache, and a copy is put there from time to time (`Replies.sync`),
an object of its own in the folder `NAME.d`. Who opens the store joins all that lie there, and removes one only when
its own copy, which holds it, is there. So nobody's replies are lost, whoever puts theirs meanwhile. What the cache
still has from a process that was killed is joined too: replies are never wrong, they are only there or not.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

from latent_thoughts import places, transfer
from latent_thoughts.files import Damaged
from latent_thoughts.store import atomic
from latent_thoughts.teachers.base import Answer, Completion, Failure
from latent_thoughts.types import UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
  key BLOB PRIMARY KEY,
  paid_by TEXT NOT NULL,       -- place of the stage that asked (before: the first 16 digits of its key)
  used_by TEXT NOT NULL,       -- stage that last read it, by the first 16 digits of its key
  used REAL NOT NULL,          -- when (Unix time)
  prompt_tokens INTEGER NOT NULL,
  completion_tokens INTEGER NOT NULL,
  finish TEXT NOT NULL,
  text BLOB NOT NULL           -- zlib; nothing at all: it was forgotten, and what it took is still counted
);
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TEMP TABLE failures (
  key BLOB PRIMARY KEY,        -- of this run alone, and not in the file: what failed in an earlier one is asked again
  kind TEXT NOT NULL,
  message TEXT NOT NULL
);
"""

WAIT = 60.0  # seconds for another process that writes


@contextlib.contextmanager
def opened(path: Path, stage: str, payer: str | None = None) -> Iterator[Replies]:
    """The store of `path` for the stage with key `stage`; `payer` is its name where money is counted, whatever its
    settings. Raises UserError for a file that is no such store."""
    file = places.bench(path) / path.name if places.remote(path) else path
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=WAIT)) as connection:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.executescript(_SCHEMA)
            replies = Replies(connection, stage, payer or stage, path)
            try:
                yield replies
            finally:
                replies.sync(at_once=True)
        transfer.forget(path)
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise UserError(f"the store of replies {path} is in use by another process: run again later") from None
        raise UserError(f"the store of replies {path} cannot be used ({error}): move it away, or mend it") from None


class Replies:
    SYNCED, SHARE = 20.0, 0.1  # seconds between two copies into a store, and the share of the time they may take

    def __init__(self, connection: sqlite3.Connection, stage: str, payer: str, path: Path):
        self.stage, self.payer, self._connection, self._sql = stage[:16], payer, connection, connection.execute
        self._path, self._began, self._due = path, time.time(), time.monotonic() + self.SYNCED
        self._failed = False  # whether anything has, in this run
        self._joined = set[Path]()  # objects of the store whose replies are here
        # A note that is gone elsewhere only has a batch looked at again; of one that is lost the batch is paid twice.
        for note in self._join().items():
            self._sql("INSERT INTO notes VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", note)
        self._others = dict[str, str]()  # notes of runs at work: theirs to act on, and kept in our copy of theirs
        self.notes: MutableMapping[str, str] = _Notes(connection, lambda: self.sync(at_once=True))

    def _join(self) -> dict[str, str]:
        """Adds the replies of a store's objects that did not come from here; the notes that stand in those."""
        notes = dict[str, str]()
        while new := [each for each in _objects(self._path) if each not in self._joined]:
            for each in new:
                with contextlib.suppress(FileNotFoundError), _fetched(each) as file:  # else it is in a newer one
                    self._sql("ATTACH ? AS other", (str(file),))
                    # what was forgotten here may have been asked for again there
                    known = "key IN (SELECT key FROM other.replies)"
                    self._sql(f"DELETE FROM main.replies WHERE text = x'' AND {known}")  # noqa: S608
                    self._sql("INSERT OR IGNORE INTO replies SELECT * FROM other.replies")
                    for name, value in self._sql("SELECT name, value FROM other.notes").fetchall():
                        notes[name] = value or notes.get(name, "")
                    self._sql("DETACH other")
                    self._joined.add(each)
        return notes

    def get(self, key: str) -> Answer | None:
        """What a question brought: a reply of any run, or a failure of this one."""
        row = self._sql(
            "SELECT finish, prompt_tokens, completion_tokens, text, used_by FROM replies WHERE key = ?", (_raw(key),)
        ).fetchone()
        if row is not None and not row[3]:  # forgotten
            row = None
        if row is None and not self._failed:
            return None
        if row is None:
            failed = self._sql("SELECT kind, message FROM failures WHERE key = ?", (_raw(key),)).fetchone()
            return Failure(*failed) if failed else None
        if row[4] != self.stage:
            self._sql("UPDATE replies SET used_by = ?, used = ? WHERE key = ?", (self.stage, time.time(), _raw(key)))
        try:
            text = unpacked(row[3])
        except ValueError as error:
            raise Damaged(self._path, f"the reply to {key[:32]}: {error}") from None
        return Completion(text, row[0], row[1], row[2])

    def put(self, key: str, answer: Answer) -> None:
        """Keeps an answer. A reply that is there already stays as it is; of one that was forgotten what it took stays,
        under a key that no question has, since it may have been another stage that paid."""
        if isinstance(answer, Failure):
            self._failed = True
            message = answer.message.encode("utf-8", "backslashreplace").decode()  # an endpoint's words: any
            self._sql("INSERT OR REPLACE INTO failures VALUES (?, ?, ?)", (_raw(key), answer.kind, message))
            return
        text = zlib.compress(
            answer.text.encode("utf-8", "surrogatepass"), 1
        )  # its fastest; short texts gain little more
        usage = (answer.prompt_tokens or 0, answer.completion_tokens or 0)
        finish = answer.finish.encode("utf-8", "backslashreplace").decode()
        values = (_raw(key), self.payer, self.stage, time.time(), *usage, finish, text)
        self._sql("UPDATE replies SET key = randomblob(16) WHERE key = ? AND text = x''", values[:1])
        self._sql("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        self.sync()

    def sync(self, at_once: bool = False) -> None:
        """Puts a copy into the store that the replies belong to, where it is time, with what others put there."""
        if not places.remote(self._path) or not (at_once or time.monotonic() >= self._due):
            return
        began = time.monotonic()
        self._others |= self._join()
        put = _folder(self._path) / uuid.uuid4().hex
        with atomic(put) as temporary, contextlib.closing(sqlite3.connect(temporary)) as copy:
            self._connection.backup(copy)
            with copy:
                copy.executemany("INSERT OR IGNORE INTO notes VALUES (?, ?)", self._others.items())
        for each in self._joined:  # the copy holds them
            with contextlib.suppress(FileNotFoundError):
                transfer.remove(each)
        self._joined = {put}
        now = time.monotonic()
        self._due = now + max(self.SYNCED, (now - began) / self.SHARE)

    @property
    def empty(self) -> bool:
        """Whether no reply was ever stored."""
        return self._sql("SELECT 1 FROM replies LIMIT 1").fetchone() is None

    @property
    def kept(self) -> int:
        """How many replies that this stage asked for are still there."""
        return self._sql("SELECT COUNT(*) FROM replies WHERE paid_by = ? AND text != x''", (self.payer,)).fetchone()[0]

    def spent(self) -> tuple[int, int, int]:
        """What this stage asked for in all its runs, under whatever settings, forgotten or not: (replies, prompt
        tokens, completion tokens)."""
        sums = "COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0)"
        return self._sql(f"SELECT {sums} FROM replies WHERE paid_by = ?", (self.payer,)).fetchone()  # noqa: S608

    def prune(self, most: int) -> int:
        """Forgets replies that this stage did not use, oldest first, until those left take `most` bytes; how many.

        Their texts go; what they took stays, since it was paid for, and the cap is over all that was. Those that came
        or were used since it began are another run's, which is at work.
        """
        found = self._sql(
            """UPDATE replies SET text = x'' WHERE key IN (SELECT key FROM (
                 SELECT key, SUM(length(text)) OVER (ORDER BY used DESC, key) AS size FROM replies
                 WHERE used_by != ? AND used < ? AND text != x'') WHERE size > ?)""",
            (self.stage, self._began, most),
        )
        self._connection.executescript("PRAGMA incremental_vacuum")  # `execute` would give back a single page
        return found.rowcount


def payer_of(folder: Path, store: Path) -> str:
    """The name under which a stage pays: its folder's place, which no setting changes; as seen from the store where
    that lies above it, so that a run folder may be moved."""
    folder, home = folder.resolve(), store.parent.resolve()
    return places.relative(folder, home) if home in folder.parents else str(folder)


def _folder(path: Path) -> Path:
    """Where the objects of a store behind a URL lie."""
    return path.with_name(f"{path.name}.d")


def _objects(path: Path) -> list[Path]:
    """Those of a store behind a URL; the one of `path` itself is an earlier version's."""
    return [*places.below(path), *places.below(_folder(path))] if places.remote(path) else []


@contextlib.contextmanager
def _fetched(source: Path) -> Iterator[Path]:
    """A copy on this machine, while it is looked at."""
    copy = places.temporary(source)
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        with places.told(source, "read"):
            places.fs(source).get_file(places.key(source), str(copy))
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def unpacked(text: bytes) -> str:
    """A stored reply's text. Raises ValueError where it is not what was stored."""
    try:
        return zlib.decompress(text).decode("utf-8", "surrogatepass")
    except zlib.error as error:
        raise ValueError(str(error)) from None


class _Notes(MutableMapping[str, str]):
    def __init__(self, connection: sqlite3.Connection, kept: Callable[[], None]):
        self._sql, self._kept = connection.execute, kept

    def __getitem__(self, name: str) -> str:
        row = self._sql("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise KeyError(name)
        return row[0]

    def __setitem__(self, name: str, value: str) -> None:
        self._sql("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, value))
        self._kept()

    def __delitem__(self, name: str) -> None:
        self._sql("DELETE FROM notes WHERE name = ?", (name,))
        self._kept()

    def __iter__(self) -> Iterator[str]:
        return iter([name for (name,) in self._sql("SELECT name FROM notes ORDER BY name").fetchall()])

    def __len__(self) -> int:
        return self._sql("SELECT COUNT(*) FROM notes").fetchone()[0]


def _raw(key: str) -> bytes:
    """16 of the hash's 32 bytes tell any number of questions apart."""
    return bytes.fromhex(key[:32])
