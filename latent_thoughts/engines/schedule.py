"""Which spans share the next pass, and whose turn it is: keeps the batch full while jobs come and go."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from latent_thoughts.attention import Path, Span
from latent_thoughts.engines.base import How, Ids, Sampled, SampleRequest, Sampling, uniforms
from latent_thoughts.engines.drawing import Drawing, Waiting
from latent_thoughts.engines.limits import Limits
from latent_thoughts.engines.passes import Growing, Item, Passes
from latent_thoughts.engines.work import Work
from latent_thoughts.types import Draw

ALIKE = 16  # a prefix shorter than this is cheaper encoded again for each continuation than kept


class Schedule:
    """Keeps the batch full: encodes what is asked for, grows draws, sends programs their answers.

    Jobs are admitted while lanes are free and the key-value positions they hold stay within the
    limit (one job is always admitted). A program that asks again goes before new jobs.
    """

    def __init__(self, passes: Passes, limits: Limits, todo: Sequence[Work]):
        self.passes, self.limits = passes, limits
        for work in todo:  # where an attempt ran out of memory, its requests begin anew
            work.path, work.prompts, work.drawing = (), {}, 0
        self.todo = deque(todo)
        self.items: deque[Item] = deque()  # to encode
        self.scores: deque[Item] = deque()  # to encode when there is enough for a pass, or nothing else to do
        self.active: list[Work] = []
        self.drawing = Drawing(passes, limits)
        self.stems: dict[Ids, Path] = {}
        self.waiting: dict[Ids, list[Work]] = {}  # for their stem
        self.users = Counter(work.job.stem for work in todo if not work.over)

    def run(self) -> Iterator[Work]:
        while self.todo or self.active:
            self._admit()
            if self.items:
                self._encode(self.items)
            elif self.scores and (not self.drawing.growing or self._a_pass(self.scores)):
                self._encode(self.scores)
            elif self.drawing.growing:
                self.drawing.grow()
            self.drawing.fill(self._samplings)
            for work in [w for w in self.active if w.over]:
                self.active.remove(work)
                work.told = True
                yield work

    def _admit(self) -> None:
        if not self.todo:
            return
        stems = {w.job.stem for w in self.active}
        held = sum(w.held() for w in self.active) + sum(map(len, stems))
        busy = sum(w.drawing for w in self.active)
        while self.todo:
            work = self.todo[0]
            if work.over:  # finished when memory ran out
                self.active.append(self.todo.popleft())
                continue
            held, busy = held + work.held(), busy + sum(work.draws())
            if self.active and (held > self.limits.tokens or busy > self.limits.sequences):
                break
            self.active.append(self.todo.popleft())
            self._stem(work)

    def _samplings(self, trunk: Path) -> Iterator[Work]:
        """Jobs that want draws behind a trunk."""
        for work in (*self.active, *self.todo):
            if isinstance(work.request, Sampling) and self.stems.get(work.job.stem, ()) is trunk:
                yield work

    def _stem(self, work: Work) -> None:
        """Encodes the job's stem, unless it is there or on its way, and then the job's context."""
        stem = work.job.stem
        if not stem or stem in self.stems:
            self._context(work, self.stems.get(stem, ()))
            return
        self.waiting.setdefault(stem, []).append(work)
        if len(self.waiting[stem]) == 1:
            self._add(self.items, Item((), stem, True, _nothing), lambda path, *_: self._stemmed(stem, path))

    def _stemmed(self, stem: Ids, path: Path) -> None:
        self.stems[stem] = path
        for work in self.waiting.pop(stem):
            self._context(work, path)

    def _context(self, work: Work, path: Path) -> None:
        if work.job.context:
            span = Item(path, work.job.context, True, _nothing)
            self._add(self.items, span, lambda path, *_: self._begin(work, path))
        else:
            self._begin(work, path)

    def _begin(self, work: Work, path: Path) -> None:
        work.path = path
        self._start(work)

    def _add(self, queue: deque[Item], item: Item, done: Callable[[Path, np.ndarray, Any], None]) -> None:
        """Queues a span, cut into pieces that fit a pass; `done` gets the path with the span behind it."""
        self._piece(queue, item, item.path, 0, [], done)

    def _piece(
        self, queue: deque[Item], item: Item, path: Path, start: int, found: list[np.ndarray], done: Callable[..., None]
    ) -> None:
        """Queues what of the item begins at `start`, and then the next piece. (A closure that called itself would be
        a cycle, and spans would live until the collector comes.)"""
        size = self.limits.pass_tokens
        if item.targets:  # the others ask for no logits, or for one row
            size = max(1, min(size, self.limits.logits // self.passes.vocabulary - 1))
        stop = min(start + size, len(item.ids))
        first, last = (min(max(at - item.at, 0), len(item.targets)) for at in (start, stop))
        whole = stop == len(item.ids)

        def then(span: Span | None, scores: np.ndarray, logits_V: torch.Tensor | None) -> None:
            found.append(scores)
            longer = path if span is None else (*path, span)
            if whole:
                done(longer, np.concatenate(found, 1), logits_V)
            else:
                self._piece(queue, item, longer, stop, found, done)

        keep, at = item.keep or not whole, max(item.at - start, 0)
        targets, going_on = item.targets[first:last], item.next and whole
        queue.append(Item(path, item.ids[start:stop], keep, then, at, targets, item.temperatures, going_on))

    def _a_pass(self, items: deque[Item]) -> bool:
        tokens, logits = sum(len(i.ids) for i in items), sum(i.logits for i in items) * self.passes.vocabulary
        return tokens >= self.limits.pass_tokens or logits >= self.limits.logits

    def _encode(self, items: deque[Item]) -> None:
        batch, tokens, logits = [], 0, 0
        while items:
            tokens += len(items[0].ids)
            logits += items[0].logits * self.passes.vocabulary
            if batch and (tokens > self.limits.pass_tokens or logits > self.limits.logits):
                break
            batch.append(items.popleft())
        self.passes.encode(batch)

    # What a job asks

    def _start(self, work: Work) -> None:
        request = work.request
        work.answers = [None] * len(request.requests)
        work.open, work.drawing = len(request.requests), sum(work.draws())
        if isinstance(request, Sampling):
            for n, r in enumerate(request.requests):
                self._prompt(work, n, r, request.how)
        else:
            for n, r in enumerate(request.requests):
                self._continuations(work, n, r.prefix, r.continuations, request.temperatures)
        if not request.requests:
            self._send(work)

    def _answer(self, work: Work, n: int, answer: Any) -> None:
        work.answers[n] = answer
        work.open -= 1
        if not work.open:
            self._send(work)

    def _send(self, work: Work) -> None:
        try:
            work.request = work.job.program.send(work.answers)
        except StopIteration as stop:
            work.result, work.over, work.path, work.prompts = stop.value, True, (), {}
            self.users[work.job.stem] -= 1
            if not self.users[work.job.stem]:
                self.stems.pop(work.job.stem, None)
        else:
            self._start(work)

    def _prompt(self, work: Work, n: int, r: SampleRequest, how: How) -> None:
        """Encodes a prompt, scores what is asked of it, and queues its draws."""
        start, stop = r.scored
        assert start > 0 or stop == 0

        def done(path: Path, scores: np.ndarray, logits_V: torch.Tensor | None) -> None:
            work.prompts[r.prompt] = path[len(work.path) :]
            draws: list[Draw | None] = [None] * len(r.seeds)
            left = len(r.seeds)

            def finished(k: int, draw: Draw) -> None:
                nonlocal left
                draws[k], left = draw, left - 1
                work.drawing -= 1
                if not left:
                    self._answer(work, n, Sampled(tuple(d for d in draws if d), scores[0]))

            growing = [
                Growing(how, uniforms(seed, how.max_tokens + 1), lambda draw, k=k: finished(k, draw))
                for k, seed in enumerate(r.seeds)
            ]
            if not growing:
                self._answer(work, n, Sampled((), scores[0]))
            for k in range(0, len(growing), self.limits.sequences):
                assert logits_V is not None
                trunk = self.stems.get(work.job.stem, ())
                self.drawing.queue.append(Waiting(path, trunk, logits_V, growing[k : k + self.limits.sequences]))

        targets = r.prompt[start:stop]
        prompt = Item(work.path, r.prompt, True, _nothing, max(0, start - 1), targets, next=bool(r.seeds))
        self._add(self.items, prompt, done)

    def _continuations(
        self, work: Work, n: int, prefix: Ids, continuations: Sequence[Ids], temperatures: tuple[float, ...]
    ) -> None:
        """Scores continuations behind a prefix, which is encoded once where that pays."""
        if not continuations:
            self._answer(work, n, [])
            return
        if prefix in work.prompts or len(prefix) < ALIKE or len(continuations) == 1:
            self._score(work, n, prefix, continuations, temperatures)
            return

        def done(path: Path, *_: Any) -> None:
            work.prompts[prefix] = path[len(work.path) :]
            self._score(work, n, prefix, continuations, temperatures)

        self._add(self.items, Item(work.path, prefix, True, _nothing), done)

    def _score(
        self, work: Work, n: int, prefix: Ids, continuations: Sequence[Ids], temperatures: tuple[float, ...]
    ) -> None:
        scores: list[Any] = [None] * len(continuations)
        left = len(continuations)
        if known := work.prompts.get(prefix):
            path, prefix = (*work.path, *known[:-1], known[-1].head(len(known[-1]) - 1)), prefix[-1:]
        else:
            path = work.path
        assert prefix

        def done(k: int, values: np.ndarray) -> None:
            nonlocal left
            scores[k], left = values, left - 1
            if not left:
                self._answer(work, n, scores)

        for k, ids in enumerate(continuations):
            if not ids:
                done(k, np.zeros((len(temperatures), 0)))
                continue
            # The last token is predicted, not fed.
            span = Item(path, (*prefix, *ids[:-1]), False, _nothing, len(prefix) - 1, ids, temperatures)
            self._add(self.scores, span, lambda _, values, __, k=k: done(k, values))


def _nothing(*_: Any) -> None:
    """What a span that is to be queued does when it is done: the queue decides."""
