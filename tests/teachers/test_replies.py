"""The store of replies: what goes in comes out, it does not grow for ever, and it outlives a kill."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latent_thoughts import places, transfer
from latent_thoughts.store import fingerprint
from latent_thoughts.teachers import replies as module
from latent_thoughts.teachers.base import Completion, Failure
from latent_thoughts.teachers.replies import Replies, opened, payer_of
from latent_thoughts.types import UserError


def key(n: int) -> str:
    return fingerprint(n)


def said(n: int) -> Completion:
    return Completion(str(n), "stop", 1, 1)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(), finish=st.sampled_from(["stop", "length", "refusal"]), tokens=st.integers(0, 10**6))
def test_a_reply_comes_back_as_it_was(tmp_path: Path, text: str, finish: str, tokens: int) -> None:
    reply = Completion(text, finish, tokens, tokens + 1)
    with opened(tmp_path / "r.sqlite", "stage") as replies:
        replies.put(fingerprint(text, finish, tokens), reply)
    with opened(tmp_path / "r.sqlite", "stage") as replies:
        assert replies.get(fingerprint(text, finish, tokens)) == reply
        assert replies.get(fingerprint("other")) is None


def test_failures_are_of_one_run_alone(tmp_path: Path) -> None:
    with opened(tmp_path / "r.sqlite", "s") as replies:
        replies.put(key(1), Failure("timeout", "silent"))
        assert replies.get(key(1)) == Failure("timeout", "silent")
    with opened(tmp_path / "r.sqlite", "s") as replies:
        assert replies.get(key(1)) is None


def test_two_runs_on_one_store_leave_each_others_failures_alone(tmp_path: Path) -> None:
    with opened(tmp_path / "r.sqlite", "a") as one:
        one.put(key(1), Failure("timeout", "silent \ud83d"))
        with opened(tmp_path / "r.sqlite", "b") as other:
            assert other.get(key(1)) is None
        assert one.get(key(1)) == Failure("timeout", "silent \\ud83d")


def test_a_store_that_another_process_writes_is_not_told_to_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT", 0.1)
    with opened(tmp_path / "r.sqlite", "s"):
        pass
    with contextlib.closing(sqlite3.connect(tmp_path / "r.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with (
            pytest.raises(UserError, match=r"r\.sqlite is in use by another process: run again later"),
            opened(tmp_path / "r.sqlite", "s") as replies,
        ):
            replies.put(key(1), said(1))


def test_what_was_paid_is_counted_by_stage(tmp_path: Path) -> None:
    for stage, numbers in (("a", (1, 2)), ("b", (2, 3))):  # the second stage finds one of the first's replies
        with opened(tmp_path / "r.sqlite", stage) as replies:
            for n in numbers:
                if replies.get(key(n)) is None:
                    replies.put(key(n), Completion("x", "stop", 10, 5))
    with opened(tmp_path / "r.sqlite", "a") as replies:
        assert replies.spent() == (2, 20, 10)
    with opened(tmp_path / "r.sqlite", "b") as replies:
        assert replies.spent() == (1, 10, 5)


def test_a_stage_pays_under_its_place(tmp_path: Path, bucket: Path) -> None:
    run = tmp_path / "run"
    assert payer_of(run / "iter_00" / "synthesize", run / "replies.sqlite") == "iter_00/synthesize"
    shared = tmp_path / "shared" / "r.sqlite"
    assert payer_of(run / "iter_00" / "synthesize", shared) == str(run / "iter_00" / "synthesize")
    assert payer_of(bucket / "run" / "synthesize", bucket / "run" / "r.sqlite") == "synthesize"
    assert payer_of(run / "synthesize", bucket / "r.sqlite") == str(run / "synthesize")
    for n in (1, 2):  # other settings, another key
        with opened(tmp_path / "r.sqlite", key(n), "iter_00/synthesize") as replies:
            replies.put(key(n), Completion("x", "stop", 10, 5))
    with opened(tmp_path / "r.sqlite", key(3), "iter_00/synthesize") as replies:
        assert replies.spent() == (2, 20, 10)


def test_what_a_neighbour_has_just_paid_for_stays(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    with opened(path, "old") as replies:
        replies.put(key(0), said(0))
    with opened(path, "one") as one, opened(path, "two") as two:
        two.put(key(1), said(1))
        assert one.prune(0) == 1
        assert one.get(key(0)) is None and two.get(key(1)) == said(1)


def test_replies_no_longer_used_go_and_the_file_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    noise = [os.urandom(4000).hex() for _ in range(200)]
    with opened(path, "old") as replies:
        for n, text in enumerate(noise):
            replies.put(key(n), Completion(text, "stop", 1, 1))
    before = path.stat().st_size
    with opened(path, "new") as replies:
        assert replies.get(key(0)) is not None  # used again
        assert replies.prune(10**9) == 0
        removed = replies.prune(400_000)
        left = [n for n in range(200) if replies.get(key(n)) is not None]
        assert removed == 200 - len(left) and 60 < len(left) < 120
        assert 0 in left and left[1:] == list(range(left[1], 200))  # the oldest went
    assert path.stat().st_size < 0.8 * before


def test_what_is_forgotten_was_paid_for_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    with opened(path, "old", "synthesize") as replies:
        replies.put(key(0), Completion("x", "stop", 10, 5))
    with opened(path, "new", "synthesize") as replies:
        assert replies.prune(0) == 1 and replies.prune(0) == 0
        assert replies.get(key(0)) is None and replies.kept == 0 and replies.spent() == (1, 10, 5)
    with opened(path, "new", "other") as replies:  # another pays for it again
        replies.put(key(0), Completion("y", "stop", 20, 7))
        assert replies.get(key(0)) == Completion("y", "stop", 20, 7) and replies.spent() == (1, 20, 7)
    with opened(path, "new", "synthesize") as replies:
        assert replies.spent() == (1, 10, 5)


def test_a_reply_that_is_paid_for_again_is_there_for_all(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One machine has forgotten it, and puts its copy of the store while another has asked anew."""
    with opened(bucket / "r.sqlite", "old", "synthesize") as replies:
        replies.put(key(0), said(0))
    with opened(bucket / "r.sqlite", "a", "synthesize") as one:
        assert one.prune(0) == 1
        one.sync(at_once=True)
        monkeypatch.setenv("LATENT_THOUGHTS_CACHE", str(Path(os.environ["LATENT_THOUGHTS_CACHE"]) / "other"))
        with opened(bucket / "r.sqlite", "b", "other") as two:
            assert two.get(key(0)) is None
            two.put(key(0), said(0))
    for payer in ("synthesize", "other"):
        with opened(bucket / "r.sqlite", "c", payer) as replies:
            assert replies.get(key(0)) == said(0) and replies.spent() == (1, 1, 1)


def test_what_was_put_outlives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    if (child := os.fork()) == 0:
        with opened(path, "s") as replies:
            for n in range(50):
                replies.put(key(n), Completion(str(n), "stop", 1, 1))
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with opened(path, "s") as replies:
        assert [getattr(replies.get(key(n)), "text", None) for n in range(50)] == [str(n) for n in range(50)]


def test_a_file_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "r.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match=r"r\.sqlite cannot be used"), opened(tmp_path / "r.sqlite", "s"):
        pass


def test_replies_in_a_store_are_there_for_the_next_machine(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for machine in range(3):
        monkeypatch.setenv("LATENT_THOUGHTS_CACHE", str(tmp_path / f"machine {machine}"))
        with opened(bucket / "r.sqlite", f"stage {machine}") as replies:
            assert [replies.get(key(n)) for n in range(machine)] == [said(n) for n in range(machine)]
            replies.put(key(machine), said(machine))
        assert not list((tmp_path / f"machine {machine}").rglob("*.sqlite*"))  # nothing is left in the cache
    assert len(places.below(bucket)) == 1  # each put a copy of all, and took away what it holds


def test_a_killed_process_loses_no_reply_of_a_store_on_its_machine(bucket: Path) -> None:
    """What was not put there yet is in the cache; notes are put before anything else happens."""
    with opened(bucket / "r.sqlite", "s") as replies:
        replies.put(key(0), said(0))
    child = """
import os, sys
from latent_thoughts.places import place
from latent_thoughts import places, transfer
from latent_thoughts.store import fingerprint
from latent_thoughts.teachers.base import Completion
from latent_thoughts.teachers.replies import opened
with opened(place(sys.argv[1]), "s") as replies:
    replies.notes["batch a"] = "1"
    replies.put(fingerprint(1), Completion("1", "stop", 1, 1))
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", child, str(bucket / "r.sqlite")])
    assert done.returncode == -signal.SIGKILL
    with opened(bucket / "r.sqlite", "s") as replies:
        assert [replies.get(key(n)) for n in range(2)] == [said(0), said(1)]
        assert dict(replies.notes) == {"batch a": "1"}
        del replies.notes["batch a"]
    with opened(bucket / "r.sqlite", "s") as replies:
        assert replies.get(key(1)) and not replies.notes


def test_two_runs_share_a_store_of_replies_behind_a_url(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENT_THOUGHTS_CACHE", str(tmp_path / "one"))
    with opened(bucket / "r.sqlite", "one") as first:
        first.put(key(1), said(1))
        monkeypatch.setenv("LATENT_THOUGHTS_CACHE", str(tmp_path / "two"))
        with opened(bucket / "r.sqlite", "two") as second:
            second.put(key(2), said(2))
    with opened(bucket / "r.sqlite", "three") as replies:
        assert replies.get(key(1)) and replies.get(key(2))


def test_a_copy_that_is_put_while_another_is_under_way_is_not_lost(
    bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run looks, puts its last replies and a note, and ends, all between our look and our put."""
    put = transfer.put

    def meanwhile(source: Path, target: Path) -> None:
        monkeypatch.setattr(transfer, "put", put)
        monkeypatch.setenv("LATENT_THOUGHTS_CACHE", str(source.parent / "other"))
        with opened(bucket / "r.sqlite", "b") as other:
            other.put(key(2), said(2))
            other.notes["batch b"] = "2"
        put(source, target)

    with opened(bucket / "r.sqlite", "a") as replies:
        replies.put(key(1), said(1))
        monkeypatch.setattr(transfer, "put", meanwhile)
        replies.sync(at_once=True)
        assert not replies.notes  # the other's batch is the other's to wait for
    with opened(bucket / "r.sqlite", "c") as replies:
        assert replies.get(key(1)) and replies.get(key(2)) and dict(replies.notes) == {"batch b": "2"}
    assert len(places.below(bucket)) == 1


def test_a_store_behind_a_url_of_an_earlier_version_is_taken_over(bucket: Path, tmp_path: Path) -> None:
    with opened(tmp_path / "r.sqlite", "0123456789abcdef") as replies:
        replies.put(key(1), said(1))
    transfer.put(tmp_path / "r.sqlite", bucket / "r.sqlite")
    with opened(bucket / "r.sqlite", "s", "iter_00/synthesize") as replies:
        assert replies.get(key(1)) == said(1) and replies.spent() == (0, 0, 0)
    assert not (bucket / "r.sqlite").exists() and len(places.below(bucket)) == 1


def test_a_reply_is_in_the_store_when_its_time_has_come(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replies, "SYNCED", 0.0)
    with opened(bucket / "r.sqlite", "s") as replies:
        replies.put(key(1), said(1))
        assert len(places.below(bucket / "r.sqlite.d")) == 1
