"""Holding a run folder of a store."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from latent_thoughts import leases, places
from latent_thoughts.store import run_lock
from latent_thoughts.types import UserError
from tests.s3 import Store

HOLDER = """
import sys, time
from latent_thoughts import leases
from latent_thoughts.places import place
from latent_thoughts.store import run_lock
leases.RENEWED = 0.2
with run_lock(place(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def lease(folder: Path) -> dict[str, Any]:
    (path,) = places.below(folder / ".lock")
    return json.loads(places.content(path))


def left_behind(folder: Path, host: str, seconds: float) -> None:
    """What a process of another machine that died would leave."""
    value = {"host": host, "pid": 1, "token": "t", "until": time.time() + seconds}
    places.write(folder / ".lock" / "00000041.json", json.dumps(value).encode())


def test_a_run_folder_is_held_once_and_let_go_of(bucket: Path) -> None:
    for _ in range(2):
        with run_lock(bucket / "run"):
            assert lease(bucket / "run")["host"] == socket.gethostname()
            with pytest.raises(UserError, match="run is in use by process"), run_lock(bucket / "run"):
                pass
            with run_lock(bucket / "other"):
                pass
    with pytest.raises(RuntimeError), run_lock(bucket / "run"):
        raise RuntimeError
    assert lease(bucket / "run")["until"] == 0


def test_a_killed_process_of_this_machine_holds_nothing(bucket: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(bucket / "run")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid}"), run_lock(bucket / "run"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with run_lock(bucket / "run"):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_a_lease_from_another_machine_is_waited_for(bucket: Path) -> None:
    left_behind(bucket / "run", "elsewhere", 100)
    with pytest.raises(UserError, match=r"process 1 on elsewhere; if it is dead, its hold ends in (99|100) seconds"):
        leases.held(bucket / "run").__enter__()
    left_behind(bucket / "run", "elsewhere", -1)
    with run_lock(bucket / "run"):
        assert lease(bucket / "run")["token"] != "t"
        assert [p.name for p in places.below(bucket / "run")] == ["00000042.json"]


def test_of_many_that_come_at_once_one_gets_it(bucket: Path) -> None:
    left_behind(bucket / "run", "elsewhere", -1)
    got, refused, done, together = [], [], threading.Event(), threading.Barrier(6)

    def come() -> None:
        together.wait()
        try:
            with run_lock(bucket / "run"):
                got.append(1)
                done.wait(20)
        except UserError as error:
            refused.append(str(error))
            if len(refused) == 5:
                done.set()

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 5


def test_it_is_renewed_and_a_store_that_fails_at_times_does_not_end_it(
    s3: Store, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEWED", 0.05)
    with s3.faults(0.2), run_lock(bucket / "run"):
        first = lease(bucket / "run")["until"]
        time.sleep(1.5)
        assert lease(bucket / "run")["until"] > first


def test_who_lost_the_folder_ends_at_once(bucket: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(bucket / "run")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        left_behind(bucket / "run", "elsewhere", 100)
        _, said = holder.communicate(timeout=20)
        assert holder.returncode == 1 and "another process has taken" in said
    finally:
        holder.kill()
        holder.wait()
