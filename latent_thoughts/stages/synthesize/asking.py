"""Asking a teacher what the store does not answer: the estimate before, the cap on the way, a clean stop."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from latent_thoughts.config import Synthesize
from latent_thoughts.config.synthesize import Prices
from latent_thoughts.progress import track
from latent_thoughts.stages.synthesize.questions import Questions
from latent_thoughts.teachers.base import TOO_LONG, Completion, Failure, Request, Teacher
from latent_thoughts.teachers.openai_client import endpoint
from latent_thoughts.teachers.replies import Replies
from latent_thoughts.types import ThoughtDocument, UserError

# Tokens of a reply for one of the text: what the paper's thoughts took on FineMath; the others are guesses.
REPLY_SHARE = {"latent_thoughts": 2.3, "wrap_baseline": 1.0, "wrap_cot": 2.0}
HOPELESS = 20  # requests that failed with not one reply, or in a row: the others are not asked
ROUNDS = 2  # of the requests under way that fail in a row, where that is more: an outage of seconds fails one

Documents = Callable[[], Iterable[ThoughtDocument]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What asking will take. Tokens and costs are of the questions that are still open; `spent` was spent before."""

    what: str  # "chunks" or "documents"
    teacher: str
    local: bool
    units: int
    open: int
    prompt_tokens: int
    reply_tokens: int
    most_reply_tokens: int
    prices: Prices
    spent: float
    cap: float | None

    @property
    def cost(self) -> float:
        return price(self.prices, self.prompt_tokens, self.reply_tokens)

    @property
    def most(self) -> float:
        """Where every reply goes to its limit (and none is asked for twice)."""
        return price(self.prices, self.prompt_tokens, self.most_reply_tokens)


Approve = Callable[[Estimate], None]  # raises UserError where it is not to be done


def price(prices: Prices, prompt_tokens: int, completion_tokens: int) -> float:
    return (prompt_tokens * prices.input + completion_tokens * prices.output) / 1e6


def estimate(config: Synthesize, questions: Questions, documents: Documents, replies: Replies) -> Estimate:
    units = still = prompts = expected = 0
    nothing = replies.empty  # then nothing needs to be looked up
    for document in documents():
        for unit in questions.units(document):
            units += 1
            if nothing or questions.verdict(document, unit, replies.get).next is not None:
                still += 1
                prompts += questions.prompt_tokens(document, unit)
                expected += min(config.max_tokens, round(REPLY_SHARE[config.method] * unit.text_tokens))
    what = "chunks" if config.method == "latent_thoughts" else "documents"
    local = config.teacher.kind not in ("openai", "openai_batch")
    spent = price(config.prices, *replies.spent()[1:])
    where = "" if local else f" at {endpoint(config.teacher)}"
    most, name = still * config.max_tokens, f"{config.teacher.model} ({config.teacher.kind}){where}"
    return Estimate(what, name, local, units, still, prompts, expected, most, config.prices, spent, config.cap)


class Asking:
    """One teacher and one store. `stopped` says why asking ended before its time."""

    def __init__(self, config: Synthesize, questions: Questions, replies: Replies):
        self.config, self.questions, self.replies = config, questions, replies
        self.stopped: str | None = None
        self.failed = 0  # requests in a row
        self.had, *tokens = replies.spent()  # replies in earlier runs: those are not hopeless where the rest fails
        self.spent = price(config.prices, *tokens)
        self.under_way: dict[str, Request] = {}
        self.reserved = 0.0  # what their replies may cost at most

    def ask(self, teacher: Teacher, documents: Iterable[ThoughtDocument], total: int) -> int:
        """Asks every open question once and stores what comes; how many answers came.

        Nothing that came is lost where the cap or a fatal failure ends it: what is under way is waited for.
        """
        answered = good = tokens = too_long = 0
        asked = teacher.ask(self._open(documents))
        with track("synthesize", total, "requests") as advance, contextlib.closing(asked):
            for key, answer in asked:
                request = self.under_way.pop(key, None)
                if isinstance(answer, Completion):
                    answer = self._counted(answer, request)
                self.replies.put(key, answer)
                self.reserved -= self._most(request) if request else 0.0
                answered += 1
                if isinstance(answer, Failure):
                    too_long += answer.kind == TOO_LONG
                    self._consider(answer, answered - too_long, good + self.had)
                else:
                    good, self.failed = good + 1, 0
                    used = answer.prompt_tokens or 0, answer.completion_tokens or 0
                    tokens += used[1]
                    self.spent += price(self.config.prices, *used)
                advance(1, tokens=tokens, failed=answered - good, cost=self.spent)
        self.under_way, self.reserved = {}, 0.0  # what the teacher took and left unanswered is open again
        return answered

    def _open(self, documents: Iterable[ThoughtDocument]) -> Iterator[Request]:
        for document in documents:
            for unit in self.questions.units(document):
                request = self.questions.verdict(document, unit, self.replies.get).next
                if request is None or request.key in self.under_way:  # of two equal questions one is asked
                    continue
                cost = self._most(request)
                if self.config.cap is not None and self.spent + self.reserved + cost > self.config.cap:
                    if not self.under_way:
                        self.stopped = self.stopped or self._capped(self.config.cap)
                    return  # what is under way may turn out cheaper: then there is another round
                if self.stopped:
                    return
                self.under_way[request.key] = request
                self.reserved += cost
                yield request

    def _most(self, request: Request) -> float:
        """What a reply may cost."""
        return price(self.config.prices, request.prompt_tokens, request.max_tokens)

    def _counted(self, reply: Completion, request: Request | None) -> Completion:
        """The reply with its tokens. Where the endpoint does not tell them it counts as the largest there could be, so
        that the cap holds. (What an earlier process asked is not at hand: its prompt is taken to have cost nothing.)"""
        prompt = request.prompt_tokens if request else 0
        return replace(
            reply,
            prompt_tokens=prompt if reply.prompt_tokens is None else reply.prompt_tokens,
            completion_tokens=self.config.max_tokens if reply.completion_tokens is None else reply.completion_tokens,
        )

    def _consider(self, failure: Failure, answered: int, good: int) -> None:
        """Whether to go on. What is too long is that question's own failure, and not among those `answered`; and a
        batch hands its failures out together."""
        teacher = self.config.teacher
        self.failed += failure.kind != TOO_LONG and teacher.kind != "openai_batch"
        if failure.fatal:
            self.stopped = self.stopped or failure.message
        elif not good and answered >= HOPELESS:
            self.stopped = self.stopped or f"the first {answered} requests all failed: {failure.message}"
        elif self.failed >= max(HOPELESS, ROUNDS * teacher.concurrency):
            self.stopped = self.stopped or f"the last {self.failed} requests all failed: {failure.message}"

    def _capped(self, cap: float) -> str:
        return (
            f"the cap of {cap:g} is reached: {self.spent:.4g} is spent and the next reply might exceed it; "
            f"to go on, raise synthesize.cap and run the same command"
        )


@contextlib.contextmanager
def settled_memory() -> Iterator[None]:
    """Keeps what is loaded out of the garbage collector's rounds: with torch and transformers there, each of them would
    hold all requests up for a tenth of a second."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def refuse(stopped: str, replies: Replies) -> UserError:
    """The one line that a run ends with which could not ask everything."""
    return UserError(f"{stopped.rstrip('.')} ({replies.kept:,} replies are kept)")
