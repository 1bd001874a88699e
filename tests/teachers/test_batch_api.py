"""The Batch API: expired batches, error files, refused files, and processes that die on the way."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from batches import Batches
from loopback import Loopback, error
from test_openai_api import thoughts

from latent_thoughts.teachers import batch_api
from latent_thoughts.teachers.base import Failure
from latent_thoughts.teachers.replies import opened
from latent_thoughts.types import UserError

SETTINGS = ["synthesize.teacher.kind=openai_batch", "synthesize.teacher.poll=0.01"]


def test_a_batch_brings_what_the_same_questions_would_bring_one_by_one(make: Any) -> None:
    with Batches(looks=3) as server:
        run = make(server.url, *SETTINGS)
        run.synthesize()
        assert len(server.batches) == 1 and server.seen["batch_0"] == 3
        one_by_one = make(server.url, folder="other")
        one_by_one.synthesize()
    assert thoughts(run) == thoughts(one_by_one) and len(thoughts(run)) == 60


def test_many_requests_are_spread_over_batches(make: Any) -> None:
    with Batches() as server:
        make(server.url, *SETTINGS, "synthesize.teacher.batch_requests=25").synthesize()
        assert [len(server.lines(batch)) for batch in server.batches] == [25, 25, 10]


def test_an_expired_batch_is_submitted_again_for_what_is_missing(make: Any) -> None:
    def fate(batch: str, body: dict[str, Any]) -> str:
        number = int(body["messages"][-1]["content"].split("Passage:\nSentence ")[1][0])
        return "expired" if batch == "batch_0" and number == 1 else "answered"

    with Batches(fate) as server:
        run = make(server.url, *SETTINGS)
        run.synthesize()
        assert [len(server.lines(batch)) for batch in server.batches] == [60, 20]
    assert Counter(server.asked).most_common(1)[0][1] == 1  # nothing was paid for twice
    assert len(thoughts(run)) == 60


def test_a_batch_that_always_expires_does_not_go_round_for_ever(make: Any) -> None:
    with Batches(lambda batch, body: "expired") as server:
        with pytest.raises(UserError, match="left all of 60 questions unanswered"):
            make(server.url, *SETTINGS).synthesize()
        assert len(server.batches) == 1


def test_an_error_file_names_what_failed(make: Any) -> None:
    def fate(batch: str, body: dict[str, Any]) -> str:
        question = body["messages"][-1]["content"].split("Passage:\n")[1]
        return (
            "refused"
            if "Sentence 0 of document 3 " in question
            else "broken"
            if "Sentence 2 of document 4 " in question
            else "answered"
        )

    with Batches(fate) as server:
        run = make(server.url, *SETTINGS)
        with pytest.raises(UserError, match=r"2 of the questions failed"):
            run.synthesize()
        failures = [json.loads(line) for line in (run.synthesized("latent_thoughts") / "failures.jsonl").open()]
        kinds = {f["kind"]: f["message"] for f in failures}
        assert kinds == {"bad_request": "This prompt is not allowed.", "server_error": "It broke."}
        counts = make(server.url, *SETTINGS, "synthesize.failed=raw").synthesize().counts
        assert (counts["kept"], counts["failed"]) == (58, 2)
        assert [len(server.lines(batch)) for batch in server.batches] == [60, 2]


def test_a_refused_file_is_said_in_one_line(make: Any) -> None:
    with Batches(valid=False) as server:
        with pytest.raises(
            UserError, match=r"batch batch_0 was refused: This line is not parseable .* \(line 1\)"
        ) as e:
            make(server.url, *SETTINGS).synthesize()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("moment", ["made", "noted"])
def test_a_process_that_dies_finds_its_batch_again(make: Any, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Just after the batch was made and before its id was written down; or while waiting for it."""

    class Died(BaseException):
        pass

    def dies(*_: object) -> None:
        raise Died

    with Batches(looks=2) as server:
        run = make(server.url, *SETTINGS)
        with monkeypatch.context() as patch:
            if moment == "made":
                real = batch_api.BatchTeacher._submit

                def submit(self: Any, lines: list[bytes]) -> None:
                    real(self, lines)
                    (note,) = self.notes
                    self.notes[note] = ""
                    dies()

                patch.setattr(batch_api.BatchTeacher, "_submit", submit)
            else:
                patch.setattr(batch_api.time, "sleep", dies)
            with pytest.raises(Died):
                run.synthesize()
        assert len(server.batches) == 1
        make(server.url, *SETTINGS).synthesize()
        assert len(server.batches) == 1 and len(server.asked) == 60
    assert len(thoughts(run)) == 60
    with opened(run.folder / "replies.sqlite", "s") as replies:
        assert not list(replies.notes)


def test_a_batch_that_is_gone_is_asked_again(make: Any, capfd: pytest.CaptureFixture[str]) -> None:
    class Forgetful(Batches):
        def _batches(self, method: str, path: str, *more: Any) -> tuple[int, bytes]:
            if path.endswith("batch_old"):
                return 404, json.dumps(error("No batch found with id 'batch_old'.")).encode()
            return super()._batches(method, path, *more)

    with Forgetful() as server:
        run = make(server.url, *SETTINGS)
        with opened(run.folder / "replies.sqlite", "s") as replies:
            replies.notes["batch abc"] = "batch_old"
        assert run.synthesize().counts["kept"] == 60
    assert "batch batch_old is gone (No batch found with id 'batch_old'.): its questions" in capfd.readouterr().err
    with opened(run.folder / "replies.sqlite", "s") as replies:
        assert not list(replies.notes)


def test_answers_that_are_gone_are_asked_for_again(make: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """A batch is kept for longer than its files."""

    class Forgetful(Batches):
        def _files(self, method: str, path: str, *more: Any) -> tuple[int, bytes]:
            if "file-old" in path:
                return 404, json.dumps(error("No such File object: file-old")).encode()
            return super()._files(method, path, *more)

    with Forgetful() as server:
        over = {"id": "batch_old", "object": "batch", "status": "completed", "output_file_id": "file-old"}
        server.batches["batch_old"], server.looks = over, 2
        server.seen["batch_old"] = 9
        run = make(server.url, *SETTINGS)
        with opened(run.folder / "replies.sqlite", "s") as replies:
            replies.notes["batch abc"] = "batch_old"
        assert run.synthesize().counts["kept"] == 60
    assert "file file-old is gone (No such File object: file-old): its questions" in capfd.readouterr().err


def test_a_batch_that_another_run_collects_first(make: Any) -> None:
    """Of runs that share a store of replies."""

    class Shared(Batches):
        def _batches(self, method: str, path: str, *more: Any) -> tuple[int, bytes]:
            if path.endswith("batch_old_0"):
                with opened(run.folder / "replies.sqlite", "other") as replies:
                    del replies.notes["batch 1"]
            return super()._batches(method, path, *more)

    with Shared() as server:
        run = make(server.url, *SETTINGS)
        for n in range(2):
            server.batches[f"batch_old_{n}"] = {"id": f"batch_old_{n}", "object": "batch", "status": "completed"}
            server.seen[f"batch_old_{n}"] = 9
            with opened(run.folder / "replies.sqlite", "s") as replies:
                replies.notes[f"batch {n}"] = f"batch_old_{n}"
        assert run.synthesize().counts["kept"] == 60
    assert server.seen["batch_old_1"] == 9


def test_the_key_is_not_in_what_failed(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-planted")

    class Telling(Batches):
        def _over(self, name: str) -> Any:
            found = super()._over(name)
            told = self.files[found["error_file_id"]].replace(b"It broke.", b"It broke for sk-planted.")
            self.files[found["error_file_id"]] = told
            return found

    with Telling(lambda batch, body: "broken") as server:
        run = make(server.url, *SETTINGS)
        with pytest.raises(UserError) as caught:
            run.synthesize()
    assert "planted" not in str(caught.value) and "It broke for (the key in TEST_KEY)" in str(caught.value)


def test_a_server_that_knows_no_batches(make: Any) -> None:
    with Loopback() as server, pytest.raises(UserError, match=r"answers 404 \(.*base_url"):
        make(server.url, *SETTINGS).synthesize()


KEY = "0" * 64


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("{", None), ("[1]", None), ("[" * 100_000, None), ('{"custom_id": 5}', None), ('{"custom_id": "mine"}', None),
        ({"response": {"status_code": 404, "body": {"error": "no model"}}}, Failure("bad_request", "no model")),
        ({"response": {"status_code": 500, "body": "oops"}}, Failure("server_error", "oops")),
        ({"response": {"status_code": "x", "body": "oops"}}, Failure("bad_request", "oops")),
        ({"response": {"status_code": 200, "body": None}}, Failure("broken_reply", "not a JSON object")),
        ({"response": None, "error": "boom"}, Failure("batch_error", "boom")),
        ({"error": {"code": "batch_expired"}}, None),
    ],
)  # fmt: skip
def test_lines_of_all_kinds(line: Any, answer: Any) -> None:
    text = line if isinstance(line, str) else json.dumps({"custom_id": KEY, **line})
    assert batch_api.answer_in(text) == (answer and (KEY, answer))


def test_a_refused_key(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-wrong-key")
    with Batches() as server:
        refusal = json.dumps(
            {"error": {"message": "Incorrect API key provided: sk-wrong-key", "code": "invalid_api_key"}}
        )
        server.pages = {"/v1/": lambda *_: (401, refusal.encode())}
        with pytest.raises(UserError, match="refuses the key in TEST_KEY") as caught:
            make(server.url, *SETTINGS).synthesize()
    assert "sk-wrong-key" not in str(caught.value)
