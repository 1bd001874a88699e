"""OpenAI's Batch API: half the price, answers within a day.

A batch is written down before it is made and found again by a token in its metadata, so that a process that dies at
any moment neither pays for a batch twice nor forgets one. What an expired batch did not answer is asked again, by
itself; its lines in the error file are told from requests that failed.
"""

from __future__ import annotations

import json
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from latent_thoughts.config.synthesize import Teacher as Config
from latent_thoughts.teachers.base import Answer, Answers, Failure, Notes, Request
from latent_thoughts.teachers.chat import answer_of, said
from latent_thoughts.teachers.openai_client import failure_of, hidden, imported, settings, without_key, words
from latent_thoughts.types import UserError

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
        name = f"{_MARK}-{token}.jsonl"
        file = self._sound(self.client.files.create(file=(name, b"".join(lines)), purpose="batch"))
        self.notes[_NOTE + token] = ""
        batch = self.client.batches.create(
            input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", metadata={_MARK: token}
        )
        self.notes[_NOTE + token] = self._sound(batch).id

    def _collect(self) -> Iterator[tuple[str, Answer]]:
        """What came of all batches that are noted, as each is over."""
        while noted := [note for note in self.notes if note.startswith(_NOTE)]:
            for note in noted:
                if note not in self.notes:  # another run that shares the store has collected it
                    continue
                name = self.notes[note] or self._made(note)
                batch = self._still("batch", self.client.batches.retrieve, name) if name else None
                if batch is None or self._sound(batch).status in _OVER:
                    for key, answer in self._results(batch) if batch else ():
                        yield key, hidden(answer, self.config)
                    del self.notes[note]  # after its answers are stored
            if any(note in self.notes for note in noted):
                time.sleep(self.config.poll)

    def _still(self, kind: str, get: Callable[[str], Any], name: str) -> Any | None:
        """A batch or a file; None where the endpoint has forgotten it: its questions are asked again."""
        try:
            return get(name)
        except imported().NotFoundError as error:
            if kind not in (text := words(error, self.config)).lower():
                raise
            print(f"latent-thoughts: {kind} {name} is gone ({text}): its questions are asked again", file=sys.stderr)
            return None

    def _sound(self, made: Any) -> Any:
        """What the client took for a file or a batch. Raises UserError where the endpoint answered with something
        else."""
        if not isinstance(getattr(made, "id", None), str):
            said = without_key(str(made), self.config)[:80]
            raise UserError(f"the endpoint does not speak the Batch API: it answered {said!r}")
        return made

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
        for name in filter(None, (batch.output_file_id, batch.error_file_id)):
            if (file := self._still("file", self.client.files.content, name)) is not None:
                yield from (found for line in file.text.split("\n") if (found := answer_in(line)) is not None)


def answer_in(line: str) -> tuple[str, Answer] | None:
    """Key and answer in a line of an output or error file; None where there is none, so that it is asked again: the
    request was never processed, or the line is not one of ours."""
    try:
        value = json.loads(line)
        key, response, error = value["custom_id"], value.get("response"), value.get("error")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not re.fullmatch(r"[0-9a-f]{32,}", str(key)):
        return None
    if isinstance(response, dict):
        status = response.get("status_code", 200)
        return key, answer_of(status if isinstance(status, int) else 0, response.get("body"))
    code = error.get("code") if isinstance(error, dict) else None
    return None if code in _UNANSWERED else (key, Failure(str(code or "batch_error"), said(error or "no reason given")))


def _sized(requests: Iterator[Request]) -> Iterator[bytes]:
    """Lines of one input file, until it is full."""
    size = 0
    while size < BYTES and (request := next(requests, None)) is not None:
        line = {"custom_id": request.key, "method": "POST", "url": ENDPOINT, "body": request.payload}
        yield (encoded := json.dumps(line, ensure_ascii=False).encode() + b"\n")
        size += len(encoded)
