"""Holding a run folder of a store: a lease that is renewed while its holder lives, and runs out when it does not.

RUN/.lock/00000007.json   {"host", "pid", "token", "until"}; the highest number is the lease that counts

A lease is taken by creating the next number, which of several processes one can do (a conditional put, in s3 and gs;
elsewhere the store looks first and then writes). Numbers only grow, so that nobody takes what another took in between.
Whoever finds a higher number than its own has lost the folder and ends at once. Clocks must agree to within a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latent_thoughts import places
from latent_thoughts.types import InUse, UserError

LEASE, RENEWED = 180.0, 20.0  # seconds: how long a lease lasts, and how often it is renewed


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Raises UserError where another process holds the folder, or held it less than LEASE seconds ago and died on
    another machine."""
    lease = _Lease(folder / ".lock")
    lease.take()
    done = threading.Event()
    keeper = threading.Thread(target=lease.keep, args=(done,), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join(RENEWED)
        with contextlib.suppress(*places.errors(), UserError):  # else it runs out by itself
            lease.write(0.0)
        _TOKENS.discard(lease.token)


def alive(folder: Path) -> bool:
    """Whether somebody holds the folder now."""
    lease = _Lease(folder / ".lock")
    return bool(last := lease.last()) and _lives(lease.read(last))


_TOKENS = set[str]()  # of the leases that this process holds


class _Lease:
    def __init__(self, folder: Path):
        self.folder, self.token, self.number = folder, uuid.uuid4().hex, 0
        self.renewed = 0.0  # on the clock that never jumps

    def take(self) -> None:
        last = self.last()
        if last:
            _refuse_held(self.folder, self.read(last))
        self.number, self.renewed = last + 1, time.monotonic()
        with contextlib.suppress(FileExistsError):
            places.create(self._path(self.number), self._content(time.time() + LEASE))
        # Answered or not (a request that is repeated may meet its own result): what counts is who stands there.
        if self.last() != self.number or self.read(self.number).get("token") != self.token:
            _refuse_held(self.folder, self.read(self.last()))
            raise UserError(f"{self.folder.parent} has just been taken by another process: run again")
        _TOKENS.add(self.token)
        for number in self._numbers():
            if number < self.number:
                self._path(number).unlink()

    def keep(self, done: threading.Event) -> None:
        """Renews the lease until `done`. Ends the process where it is lost: two must not work in one folder."""
        while not done.wait(RENEWED):
            with contextlib.suppress(Exception):  # whatever the store's library raises: it may answer the next time
                if self.last() != self.number:
                    _end(f"another process has taken {self.folder.parent} over")
                self.write(time.time() + LEASE)
            if time.monotonic() - self.renewed > LEASE:
                _end(f"{self.folder.parent} could not be reached for {LEASE:.0f} seconds; run again to go on")

    def write(self, until: float) -> None:
        began = time.monotonic()
        places.write(self._path(self.number), self._content(until))
        self.renewed = began

    def _content(self, until: float) -> bytes:
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": self.token, "until": until}
        return json.dumps(mine).encode()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08}.json"

    def read(self, number: int) -> dict[str, Any]:
        try:
            return json.loads(places.content(self._path(number)))
        except FileNotFoundError:  # its holder was followed by another
            return {}

    def _numbers(self) -> list[int]:
        return [int(path.stem) for path in places.below(self.folder) if path.stem.isdigit()]

    def last(self) -> int:
        return max(self._numbers(), default=0)


def _refuse_held(folder: Path, lease: dict[str, Any]) -> None:
    if _lives(lease):
        left = lease["until"] - time.time()
        raise InUse(
            f"{folder.parent} is in use by process {lease['pid']} on {lease['host']}; if it is dead, its hold ends in "
            f"{left:.0f} seconds (or remove {folder} now)"
        )


def _lives(lease: dict[str, Any]) -> bool:
    """As far as can be told: a process of this machine is looked for, another's word is taken."""
    if lease.get("until", 0.0) <= time.time():
        return False
    if lease["host"] != socket.gethostname():
        return True
    if lease["pid"] == os.getpid():
        return lease["token"] in _TOKENS
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _end(why: str) -> None:
    print(f"latent-thoughts: {why}", file=sys.stderr, flush=True)
    os._exit(1)
