"""The store of replies: what goes in comes out, it does not grow for ever, and it outlives a kill."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latent_thoughts.store import fingerprint
from latent_thoughts.teachers.base import Completion, Failure
from latent_thoughts.teachers.replies import opened
from latent_thoughts.types import UserError


def key(n: int) -> str:
    return fingerprint(n)


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
