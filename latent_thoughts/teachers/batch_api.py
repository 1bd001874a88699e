"""OpenAI's Batch API: half the price, answers within a day.

A batch is written down before it is made and found again by a token in its metadata, so that a process that dies at
any moment neither pays for a batch twice nor forgets one. What an expired batch did not answer is asked again, by
itself; its lines in the error file are told from requests that failed.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from latent_thoughts.config.synthesize import Teacher as Config
from latent_thoughts.teachers.base import Answer, Answers, Failure, Notes, Request
from latent_thoughts.teachers.chat import answer_of
from latent_thoughts.teachers.openai_client import failure_of, imported, settings

ENDPOINT = "/v1/chat/completions"
BYTES = 190 * 2**20  # of one input file; OpenAI takes 200 MB
_NOTE, _MARK = "batch ", "latent_thoughts"  # of a batch among the notes, and in its metadata
_OVER = ("completed", "failed", "expired", "cancelled")
_UNANSWERED = ("batch_expired", "batch_cancelled")  # error codes of lines that were never processed


class BatchTeacher:
    """Notes: "batch TOKEN" to the batch's id, "" while it is being made."""

    def __init__(self, config: Config, notes: Notes):
        self.config, self.notes = config, notes
        self.client = imported().OpenAI(**settings(config))

    def close(self) -> None:
        self.client.close()

    def ask(self, requests: Iterable[Request]) -> Answers:
        try:
            yield from self._collect()  # of an earlier process
            source = iter(requests)
            while lines := list(islice(_sized(source), self.config.batch_requests)):
                self._submit(lines)
            yield from self._collect()
        except imported().OpenAIError as error:
            failure = failure_of(error, self.config)
            yield "", Failure(failure.kind, failure.message, fatal=True)

    def _submit(self, lines: list[bytes]) -> None:
        token = uuid.uuid4().hex
        file = self.client.files.create(file=(f"{_MARK}-{token}.jsonl", b"".join(lines)), purpose="batch")
        self.notes[_NOTE + token] = ""
        batch = self.client.batches.create(
            input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", metadata={_MARK: token}
        )
        self.notes[_NOTE + token] = batch.id

    def _collect(self) -> Iterator[tuple[str, Answer]]:
        """What came of all batches that are noted, as each is over."""
        while noted := [note for note in self.notes if note.startswith(_NOTE)]:
            for note in noted:
                name = self.notes[note] or self._made(note)
                batch = self.client.batches.retrieve(name) if name else None
                if batch is None or batch.status in _OVER:
                    yield from self._results(batch) if batch else ()
                    del self.notes[note]  # after its answers are stored
            if any(note in self.notes for note in noted):
                time.sleep(self.config.poll)

    def _made(self, note: str) -> str | None:
        """The id of a batch whose maker died before writing it down; None where it was not made."""
        token = note.removeprefix(_NOTE)
        return next((b.id for b in self.client.batches.list(limit=100) if (b.metadata or {}).get(_MARK) == token), None)

    def _results(self, batch: Any) -> Iterator[tuple[str, Answer]]:
        if batch.status == "failed":  # none of it was processed: the file was refused
            errors = batch.errors.data if batch.errors and batch.errors.data else []
            reason = "; ".join(f"{e.message} (line {e.line})" if e.line else str(e.message) for e in errors[:3])
            message = f"batch {batch.id} was refused: {reason or 'no reason given'}"
            yield "", Failure("refused_batch", message, fatal=True)
        for file in (batch.output_file_id, batch.error_file_id):
            if file:
                for line in self.client.files.content(file).text.splitlines():
                    if line.strip() and (answer := answer_in(value := json.loads(line))) is not None:
                        yield value["custom_id"], answer


def answer_in(line: dict[str, Any]) -> Answer | None:
    """The answer in a line of an output or error file; None where the request was never processed."""
    response, error = line.get("response"), line.get("error") or {}
    if error.get("code") in _UNANSWERED:
        return None
    if response is None:
        return Failure(error.get("code") or "batch_error", error.get("message") or "no reason given")
    return answer_of(response.get("status_code", 200), response.get("body"))


def _sized(requests: Iterator[Request]) -> Iterator[bytes]:
    """Lines of one input file, until it is full."""
    size = 0
    while size < BYTES and (request := next(requests, None)) is not None:
        line = {"custom_id": request.key, "method": "POST", "url": ENDPOINT, "body": request.payload}
        yield (encoded := json.dumps(line, ensure_ascii=False).encode() + b"\n")
        size += len(encoded)
