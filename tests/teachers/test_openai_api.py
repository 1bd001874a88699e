"""A teacher behind an endpoint that breaks in every way: nothing is lost, nothing is asked twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback import FAULTS, Body, Loopback, _answer, completion, plain_reply

from latent_thoughts.config.synthesize import Teacher
from latent_thoughts.data import records
from latent_thoughts.em import Run
from latent_thoughts.model import load_tokenizer
from latent_thoughts.stages.synthesize.asking import HOPELESS
from latent_thoughts.teachers import openai_client
from latent_thoughts.teachers.base import Completion
from latent_thoughts.types import UserError


def thoughts(run: Run) -> dict[tuple[str, int], str]:
    """Every chunk's thought, by document and chunk."""
    tokenizer = load_tokenizer(run.base / "model")[0]
    return {
        (d.id, n): tokenizer.decode(kept[0])
        for d in records.documents(run.synthesized("latent_thoughts"), "warm_start")
        for n, kept in enumerate(d.thoughts)
        if kept
    }


def test_every_chunk_gets_its_own_reply(make: Any) -> None:
    with Loopback() as server:
        run = make(server.url)
        counts = run.synthesize().counts
    found = thoughts(run)
    documents = {d.id: d for d in records.documents(run.prepared, "warm_start")}
    assert len(server.asked) == len(found) == counts["kept"] == 60
    for (name, n), thought in found.items():
        chunk = documents[name].chunks[n].text.strip()
        question = next(q for q in server.asked if f"Passage:\n{chunk}\n" in q)
        context = documents[name].chunks[n - 1].text.strip() if n else "(nothing: the text begins here)"
        assert f"Context:\n{context}\n" in question
        reply = plain_reply({"messages": [{"content": question}]})["choices"][0]["message"]["content"]
        assert thought == reply


def test_a_second_run_asks_nothing_and_a_changed_prompt_asks_all(make: Any, tmp_path: Path) -> None:
    from latent_thoughts.teachers import prompts

    (path,) = [p for p in prompts.copy_to(tmp_path / "prompts") if p.name == "latent_thoughts.yaml"]
    with Loopback() as server:
        make(server.url).synthesize()
        first = thoughts(make(server.url))
        make(server.url).synthesize()
        make(server.url, f"synthesize.prompts=[{path}]").synthesize()  # a copy is the same prompt
        assert len(server.asked) == 60
        path.write_text(path.read_text().replace("come between", "stand between"))
        run = make(server.url, f"synthesize.prompts=[{path}]")
        run.synthesize()
        assert len(server.asked) == 120
        assert all("stand between" in question for question in server.asked[60:])
        make(server.url).synthesize()  # the first prompt again
        assert len(server.asked) == 120 and thoughts(make(server.url)) == first


def test_no_more_than_the_limit_at_once(make: Any) -> None:
    with Loopback(latency=0.02) as server:
        make(server.url, "synthesize.teacher.concurrency=5").synthesize()
    assert server.most_at_once == 5


def test_requests_a_minute_are_held_to(make: Any) -> None:
    """The library's bucket lets a minute's worth through at once, and then one at a time."""
    with Loopback() as server:
        make(server.url, "synthesize.teacher.requests_per_minute=1200", "data.limit=1").synthesize()
        assert len(server.asked) == 3
        run = make(server.url, "synthesize.teacher.requests_per_minute=40", folder="slow")
        with Processes(run) as processes:
            child = processes.start()
            while len(server.asked) < 43:
                time.sleep(0.01)
            time.sleep(2.0)  # at 40 a minute, one in 1.5 seconds
            asked = len(server.asked) - 3
            processes.kill(child)
    assert 40 <= asked <= 43


class Processes:
    """`latent-thoughts synthesize` in processes of its own, as often as `start` is called."""

    def __init__(self, run: Run):
        path = run.folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(run.recipe.model_dump(mode="json")))
        script = str(Path(__file__).with_name("forking.py"))
        command = [sys.executable, script, "synthesize", str(path), "--out", str(run.folder), "--yes"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def _line(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def start(self) -> int:
        """The process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self._line()

    def ended(self) -> int:
        """Waits; the exit status."""
        return self._line()

    def kill(self, child: int) -> None:
        os.kill(child, signal.SIGKILL)
        assert self.ended() == -signal.SIGKILL

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def test_a_faulty_endpoint_and_three_kills_lose_nothing(make: Any, values: dict[str, Any], tmp_path: Path) -> None:
    """500 chunks; a quarter of the requests fail in one of six ways; the process is killed three times on the way.

    A kill is a fault too, for every request whose reply it cuts off. The server counts those by what it sees: the
    client is gone when the reply is to be sent, or goes at once when it has been, with no request behind it.
    """
    concurrency, kills = 32, 3
    rows = [{"text": f"Text {n} is about {n * n}. "} for n in range(500)]
    Path(values["data"]["source"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["data"]["shard_documents"] = 100
    values["synthesize"]["failed"] = "raw"
    values["synthesize"]["teacher"] |= {"concurrency": concurrency, "retries": 5, "timeout": 0.5}
    with Loopback(faults=0.25, latency=0.05, seed=1) as server:
        run = make(server.url)
        with Processes(run) as processes:
            for _ in range(kills):
                before, child = len(server.asked), processes.start()
                while len(server.asked) < before + 120:
                    time.sleep(0.005)
                processes.kill(child)
                while server.connections:  # until the server has seen it
                    time.sleep(0.005)
            cut_off = server.unconfirmed
            processes.start()
            assert processes.ended() == 0
            asked = len(server.asked)
            processes.start()
            assert processes.ended() == 0 and len(server.asked) == asked  # there is nothing left to ask
    manifest = run.synthesize()
    lines = (run.synthesized("latent_thoughts") / "failures.jsonl").read_text().splitlines()
    failures = [json.loads(line) for line in lines]
    assert set(FAULTS) <= set(server.faults)
    assert len(thoughts(run)) == manifest.counts["kept"] == 500 - len(failures)
    assert manifest.counts["failed"] == len(failures) == len({f["doc_id"] for f in failures})
    assert not {(f["doc_id"], f["chunk_index"]) for f in failures} & set(thoughts(run))
    assert all(f["kind"] and f["message"] for f in failures)
    print(f"{asked} asked, {dict(server.faults)}, {cut_off} cut off, {len(failures)} failures")
    assert asked <= 500 + sum(server.faults.values()) + cut_off
    assert server.faults["dropped"] + cut_off <= kills * concurrency
    assert len(set(server.asked)) == 500


FAILING = [
    ({"key": "sk-right"}, [], r"refuses the key in TEST_KEY"),
    ({"model": "other"}, [], r"does not know model m: The model `m` does not exist"),
    ({"window": 10}, [], r"maximum context length"),
]


@pytest.mark.parametrize(("server_settings", "overrides", "message"), FAILING)
def test_what_cannot_work_is_said_in_one_line(
    make: Any, monkeypatch: pytest.MonkeyPatch, server_settings: dict[str, Any], overrides: list[str], message: str
) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-secret-and-wrong")
    with Loopback(**server_settings) as server, pytest.raises(UserError, match=message) as caught:
        make(server.url, *overrides).synthesize()
    assert "\n" not in str(caught.value) and "sk-secret" not in str(caught.value)
    assert len(server.asked) < 60 or "window" in server_settings  # it does not go on asking, but what is too long


@pytest.mark.parametrize(("key", "kept"), [("sk-a-key-that-is-secret", False), ("EMPTY", True)])
def test_a_key_in_a_reply_is_taken_out(monkeypatch: pytest.MonkeyPatch, key: str, kept: bool) -> None:
    """What stands for a key where none is asked for may be a word of the reply's."""
    monkeypatch.setenv("TEST_KEY", key)
    answer = openai_client.hidden(Completion(f"Bearer {key} it was", "stop", 1, 1), Teacher(key_env="TEST_KEY"))
    assert isinstance(answer, Completion)
    assert answer.text == (f"Bearer {key} it was" if kept else "Bearer (the key in TEST_KEY) it was")


def test_no_half_of_a_key_is_left_where_a_message_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-secret-and-wrong")
    said = openai_client.words(ValueError(f"{'x' * 290} sk-secret-and-wrong"), Teacher(key_env="TEST_KEY"))
    assert said.startswith("x" * 290) and len(said) == 300 and "sk-" not in said


@pytest.mark.parametrize("date", ["Fri, 01 Jan 99999 00:00:00 GMT", f"1 Jan {10**20} 00:00:00", "soon"])
def test_a_pause_that_is_no_time_is_none(date: str) -> None:
    assert openai_client._pause({"retry-after": date}) == 0


class Odd(Loopback):
    """Answers every question with this."""

    def __init__(self, status: int, content: bytes, kind: str = "application/json"):
        super().__init__()
        self.status, self.content, self.kind = status, content, kind

    async def _faulty(self, reader: Any, writer: Any, body: Body) -> None:
        _answer(writer, self.status, self.content, {"Content-Type": self.kind})


GOOD = completion("It follows, step by step, from all that is known.")


@pytest.mark.parametrize(
    ("status", "content", "kind", "message"),
    [
        (202, b'{"status": "queued"}', "application/json", "answered with no choices"),
        (204, b"", "application/json", "answered with not JSON"),
        (200, b"[" * 200_000, "application/json", "answered with not JSON"),
        (200, json.dumps(GOOD).replace('"It f', '5, "x": "').encode(), "application/json", "a message that is no text"),
        (404, b'{"detail": "Not Found"}', "application/json", r"answers 404 \(Not Found\): correct .*base_url"),
        (404, b"<html>nothing here", "text/html", r"answers 404 \(<html>nothing here\): correct .*base_url"),
        (400, b'{"error": "bad \\ud83d"}', "application/json", r"bad \\ud83d"),
    ],
)
def test_odd_answers_are_failures_in_one_line(make: Any, status: int, content: bytes, kind: str, message: str) -> None:
    with Odd(status, content, kind) as server, pytest.raises(UserError, match=message) as caught:
        make(server.url, "synthesize.teacher.retries=0", "data.limit=1").synthesize()
    assert "\n" not in str(caught.value)


class Ending(Odd):
    """Answers some questions, and from then on every one with this."""

    def __init__(self, good: int, status: int, content: bytes, headers: dict[str, str]):
        super().__init__(status, content)
        self.good, self.headers = good, headers

    async def _faulty(self, reader: Any, writer: Any, body: Body) -> None:
        if len(self.asked) <= self.good:
            _answer(writer, 200, json.dumps(plain_reply(body)).encode())
        else:
            _answer(writer, self.status, self.content, self.headers)


MONEY = b'{"error": {"message": "Insufficient Balance"}}'


@pytest.mark.parametrize("failed", ["error", "raw"])
@pytest.mark.parametrize(
    ("status", "content", "headers", "message"),
    [
        (402, MONEY, {}, r"wants to be paid \(Insufficient Balance\): run again when it is \(5 replies are kept\)"),
        (503, b'{"error": "overloaded"}', {}, r"the last 20 requests all failed: overloaded \(5 replies are kept\)"),
        (429, b'{"error": "slow down"}', {"Retry-After": "180"}, r"not to be asked before 2\d{3}-.* \(slow down\)"),
        (429, b"{}", {"Retry-After": "inf"}, r"asks not to be asked before"),
        (503, b"{}", {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}, r"asks not to be asked before"),
    ],
)
def test_a_run_that_has_become_hopeless_ends(
    make: Any, status: int, content: bytes, headers: dict[str, str], message: str, failed: str
) -> None:
    overrides = ["synthesize.teacher.retries=0", "synthesize.teacher.concurrency=2", f"synthesize.failed={failed}"]
    with Ending(5, status, content, headers) as server, pytest.raises(UserError, match=message):
        make(server.url, *overrides).synthesize()
    assert len(server.asked) < 30


def test_a_question_that_a_filter_declines_is_one_the_teacher_declines(make: Any) -> None:
    error = {"message": "The prompt was filtered.", "code": "content_filter", "status": 400}
    with Ending(2, 400, json.dumps({"error": error}).encode(), {}) as server:
        run = make(server.url, "synthesize.checks.refusal=raw", "data.limit=1", "synthesize.teacher.concurrency=1")
        counts = run.synthesize().counts
    assert (counts["kept"], counts["raw"], counts["fault_refusal"]) == (2, 1, 1)


REFUSED = b'{"error": {"message": "Country not supported"}}'
LIMIT = b'{"error": {"message": "Unsupported parameter: use \'max_completion_tokens\' instead"}}'


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (403, REFUSED, r"/v1 refuses to answer: Country not supported \(no key is set in TEST_KEY\)"),
        (400, LIMIT, r"instead \(set synthesize\.teacher\.limit_name=max_completion_tokens\)"),
    ],
)
def test_an_error_names_what_is_to_be_set(
    make: Any, monkeypatch: pytest.MonkeyPatch, status: int, content: bytes, message: str
) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    with Odd(status, content) as server, pytest.raises(UserError, match=message):
        make(server.url, "data.limit=1").synthesize()


def test_the_endpoint_may_come_from_the_environment_and_is_shown(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    with Loopback() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        make("null", "data.limit=1", approve=seen.append).synthesize()
    assert len(server.asked) == 3 and seen[0].teacher == f"m (openai) at {server.url}"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:secret@127.0.0.1/v1")
    with pytest.raises(UserError, match="OPENAI_BASE_URL holds keys") as caught:
        openai_client.settings(Teacher())
    assert "secret" not in str(caught.value)


def test_what_stands_behind_the_endpoints_address_goes_with_every_request(make: Any) -> None:
    with Loopback() as server:
        make(f"{server.url}/?api-version=2024-10-21", "data.limit=1").synthesize()
    assert set(server.paths) == {"/v1/chat/completions?api-version=2024-10-21"} and len(server.asked) == 3


@pytest.mark.parametrize("status", [200, 201])
def test_a_completion_is_one_whatever_its_header_calls_it(make: Any, status: int) -> None:
    with Odd(status, json.dumps(GOOD).encode(), "text/plain") as server:
        assert make(server.url, "data.limit=1").synthesize().counts["kept"] == 3


def test_an_endpoint_that_is_down(make: Any) -> None:
    with Loopback() as server:
        pass
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+/v1 cannot be reached: .*(refused|connect)"):
        make(server.url, "synthesize.teacher.retries=0").synthesize()


def test_a_chunk_too_long_for_the_teacher_is_named_and_the_others_are_kept(make: Any, values: dict[str, Any]) -> None:
    rows = [{"text": "Short one. "}, {"text": "word " * 90}, {"text": "Short two. "}]
    Path(values["data"]["source"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Loopback(window=400) as server:
        run = make(server.url)
        with pytest.raises(
            UserError, match=r"1 of the questions failed \(1 too_long\), first document \w+, chunk 0"
        ) as e:
            run.synthesize()
        assert "\n" not in str(e.value)
        assert len(server.asked) == 3
        with pytest.raises(UserError):
            make(server.url).synthesize()
        assert len(server.asked) == 4  # the two that are answered are not asked again
        counts = make(server.url, "synthesize.failed=drop").synthesize().counts
        assert (counts["kept"], counts["failed"], counts["documents"]) == (2, 1, 2)
        assert len(server.asked) == 5


def test_where_only_hopeless_questions_are_left_the_run_goes_on_without_them(make: Any, values: dict[str, Any]) -> None:
    rows = [{"text": "Short one. "}, *({"text": f"word {n} " * 90} for n in range(25))]
    Path(values["data"]["source"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["chunking"] = {"mode": "document", "max_tokens": 2000}
    with Loopback(window=400) as server:
        with pytest.raises(UserError, match=r"25 of the questions failed \(25 too_long\).*synthesize\.failed to raw"):
            make(server.url, "synthesize.teacher.concurrency=1").synthesize()
        counts = make(server.url, "synthesize.failed=raw").synthesize().counts
    assert (counts["kept"], counts["failed"]) == (1, 25)


def test_where_the_first_questions_are_too_long_the_others_are_asked(make: Any, values: dict[str, Any]) -> None:
    rows = [*({"text": f"word {n} " * 90} for n in range(25)), {"text": "Short one. "}]
    Path(values["data"]["source"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["chunking"] = {"mode": "document", "max_tokens": 2000}
    with Loopback(window=400) as server:
        run = make(server.url, "synthesize.teacher.concurrency=1", "synthesize.failed=raw")
        order = [d.chunks[0].text for d in records.documents(run.prepared, "warm_start")]
        assert order.index("Short one. ") >= HOPELESS
        counts = run.synthesize().counts
    assert (counts["kept"], counts["failed"]) == (1, 25)


def test_the_key_comes_from_the_environment_and_is_stored_nowhere(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-very-secret")
    with Loopback(key="sk-very-secret") as server:
        run = make(server.url)
        run.synthesize()
    assert len(thoughts(run)) == 60
    files = [p for p in run.folder.rglob("*") if p.is_file()]
    assert files and not any(b"sk-very-secret" in p.read_bytes() for p in files)


def test_openais_own_endpoint_needs_a_key(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(UserError, match="set the environment variable TEST_KEY"):
        make("null").synthesize()


def test_equal_questions_are_asked_once(make: Any, values: dict[str, Any]) -> None:
    texts = [f"Row {n}. The same ending. " for n in (1, 2)]
    Path(values["data"]["source"]).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    with Loopback(latency=0.05) as server:
        run = make(server.url, "synthesize.context_chunks=0")
        run.synthesize()
    assert Counter("ending" in question for question in server.asked) == {False: 2, True: 1}
    assert len(thoughts(run)) == 4


def test_a_reply_that_was_cut_is_told_from_a_whole_one(make: Any) -> None:
    with Loopback(lambda body: completion("It begins but", "length")) as server:
        run = make(server.url, "data.limit=1", "synthesize.attempts=2")
        with pytest.raises(UserError, match=r"not one thought came of the teacher's replies \(6 cut\)"):
            run.synthesize()
    assert len(server.asked) == 6
    whole = iter([False, True, False, False, False])
    answer = lambda body: completion("It begins but", "stop" if next(whole) else "length")  # noqa: E731
    with Loopback(answer) as server:
        counts = (
            make(server.url, "data.limit=1", "synthesize.attempts=2", "synthesize.temperature=0.9").synthesize().counts
        )
    assert (counts["fault_cut"], counts["raw"], counts["kept"], len(server.asked)) == (4, 2, 1, 5)
