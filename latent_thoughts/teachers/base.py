"""What a teacher is: questions in, replies out, in any order.

A new teacher is one class with `ask`, and a line in `load.py`. It stores nothing, checks nothing and counts no money:
that is the asking stage's. It pulls requests as it has room for them, so that a corpus of any size passes through.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

Payload = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """One question: the body of a chat completion (`model`, `messages`, `temperature`, a limit of tokens, ...).

    `key` is the hash of the payload and of the number of the attempt. `prompt_tokens` is an estimate, `max_tokens`
    the reply's limit.
    """

    key: str
    payload: Payload
    prompt_tokens: int
    max_tokens: int

    @property
    def seed(self) -> int:
        """A seed of the request's own, for teachers that take one."""
        return int(self.key[:8], 16) >> 1


@dataclass(frozen=True, slots=True)
class Completion:
    """A reply. `finish` is "stop", "length" (the limit cut it off) or the endpoint's word for something else.

    The tokens are those that are paid for, as the teacher counts them; None where it does not say.
    """

    text: str
    finish: str
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that brought no reply, all retries included.

    `kind` is one word for counting. Where `fatal` is set every other request would fail too (a refused key, an unknown
    model, an endpoint that is down).
    """

    kind: str
    message: str
    fatal: bool = False


Answer = Completion | Failure
Answers = Generator[tuple[str, Answer], None, None]  # by the requests' keys


class Teacher(Protocol):
    def ask(self, requests: Iterable[Request]) -> Answers:
        """Yields (key, answer) at most once for every request that it takes, in any order.

        A request that stays unanswered (in a batch that expired) will be asked again. Answers to requests of an earlier
        process (a batch that was under way) are yielded too, before the first request is taken.
        """
        ...

    def close(self) -> None:
        """Lets go of connections, processes and memory."""
        ...


# A few lines that outlive the process, for teachers whose work does (batches under way).
Notes = MutableMapping[str, str]

TOO_LONG = "too_long"  # the kind of failure where prompt and reply exceed the model's window


def too_long(prompt: int, reply: int, window: int) -> Failure | None:
    """The failure of a prompt that leaves a local model no room for its reply, in tokens."""
    if prompt + reply <= window:
        return None
    message = f"prompt of {prompt} tokens and reply of up to {reply} exceed the model's window of {window}"
    return Failure(TOO_LONG, message)
