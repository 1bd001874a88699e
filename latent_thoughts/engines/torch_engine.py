"""The in-process engine: any Hugging Face causal LM whose attention can be replaced, CPU or CUDA.

A context is encoded once for all that stands behind it, a prompt once for all its draws. Draws of
many jobs grow together; one that ends makes room for the next. Nothing is padded but attention.
Axis suffixes: N tokens or draws, V vocabulary; the others are attention.py's.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from latent_thoughts.config import Engine as Limits
from latent_thoughts.engines import attention
from latent_thoughts.engines.attention import Extend, Lanes, Path, Span
from latent_thoughts.engines.base import How, Ids, Job, Request, Sampled, SampleRequest, Sampling, uniforms
from latent_thoughts.types import Draw, UserError

ALIKE = 16  # a prefix shorter than this is cheaper encoded again for each continuation than kept


@dataclass(slots=True)
class Item:
    """A span to encode behind a path. `done` gets the span, if it is to `keep`, and its last `logits`."""

    path: Path
    ids: Ids
    logits: int
    keep: bool
    done: Callable[[Span | None, torch.Tensor], None]


@dataclass(slots=True)
class Growing:
    """One draw in the making: `token` is drawn, and not yet fed to the model."""

    how: How
    numbers: np.ndarray
    finished: Callable[[Draw], None]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    model_logprobs: list[float] = field(default_factory=list)

    def take(self, token: int, logprob: float, model_logprob: float) -> bool:
        """Goes on by one token; False where that ends the draw."""
        how = self.how
        finish = "end" if token == how.stop else "length" if len(self.ids) == how.max_tokens else None
        if finish is None and token in how.abort:
            finish = "control"
        if finish in (None, "end"):
            self.logprobs.append(logprob)
            self.model_logprobs.append(model_logprob)
        if finish is None:
            self.ids.append(token)
            return True
        self.finished(Draw(tuple(self.ids), tuple(self.logprobs), finish, tuple(self.model_logprobs)))
        return False


@dataclass(slots=True)
class Lane:
    """Draws behind one prompt, waiting for a place or growing."""

    path: Path
    logits_V: torch.Tensor
    draws: list[Growing]


@dataclass(slots=True)
class Work:
    """A job under way: its encoded context and prompts, the request in hand, and its answers so far."""

    index: int
    job: Job
    request: Request
    path: Path = ()
    prompts: dict[Ids, Path] = field(default_factory=dict)
    answers: list[Any] = field(default_factory=list)
    open: int = 0  # answers that are missing
    drawing: int = 0  # draws that are not finished
    result: Any = None
    over: bool = False
    told: bool = False  # the result has been handed out

    def prompt(self) -> int:
        """Positions of the longest prompt or prefix of the request in hand, with the context."""
        requests = self.request.requests
        longest = max((len(r.prompt if isinstance(r, SampleRequest) else r.prefix) for r in requests), default=0)
        return len(self.job.context) + longest

    def size(self) -> int:
        """Positions of the longest sequence, about: jobs of like size run together."""
        if isinstance(self.request, Sampling):
            return self.prompt() + self.request.how.max_tokens
        return self.prompt() + max((len(c) for r in self.request.requests for c in r.continuations), default=0)

    def draws(self) -> list[int]:
        """Draws asked for, a request."""
        return [len(r.seeds) for r in self.request.requests] if isinstance(self.request, Sampling) else []

    def held(self) -> int:
        """Positions kept besides the lanes: the context and the prompts."""
        requests = self.request.requests
        prompts = sum(len(r.prompt if isinstance(r, SampleRequest) else r.prefix) for r in requests)
        return len(self.job.context) + prompts


class TorchEngine:
    """Runs jobs within `limits`; where memory does not suffice it halves them and goes on."""

    one_numerics = True

    def __init__(self, model: Any, limits: Limits | None = None):
        self.model, self.limits = model.eval(), limits or Limits()
        self.device = next(model.parameters()).device
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        if not attention.install(model):
            raise UserError(f"model type {model.config.model_type} does not let its attention be replaced")

    @torch.inference_mode()
    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        todo = [Work(n, job, next(job.program)) for n, job in enumerate(jobs)]
        todo.sort(key=lambda w: (w.size(), w.index))
        while todo:
            try:
                for work in Schedule(self, todo).run():
                    yield work.index, work.result
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                    raise
                self._halve(error)
            todo = [w for w in todo if not w.told]

    def _halve(self, error: RuntimeError) -> None:
        limits = self.limits
        if limits.sequences == 1:
            raise UserError(f"not enough memory for a single sequence: {str(error).splitlines()[0]}") from None
        names = ("sequences", "tokens", "pass_tokens", "logits")
        self.limits = limits.model_copy(update={name: max(1, getattr(limits, name) // 2) for name in names})
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        settings = ", ".join(f"engine.{name}={getattr(self.limits, name)}" for name in names)
        print(f"latent-thoughts: out of memory; going on with {settings}", file=sys.stderr)

    def encode(self, items: Sequence[Item]) -> None:
        """One pass over the items' spans; hands each its span and logits."""
        paths, sizes, keep = zip(*[(item.path, len(item.ids), item.keep) for item in items], strict=True)
        branches = Extend(paths, sizes, keep, self.device)
        wanted, end = [], 0
        for item in items:
            end += len(item.ids)
            wanted += range(end - item.logits, end)
        logits_NV = self._forward([i for item in items for i in item.ids], branches.positions(), branches, wanted)
        start = 0
        for item, span in zip(items, branches.spans(), strict=True):
            item.done(span, logits_NV[start : start + item.logits])
            start += item.logits

    def grow(self, lanes: Lanes, rows: Sequence[tuple[int, int]], draws: Sequence[Growing]) -> torch.Tensor:
        """One pass over the last tokens of growing draws; returns logits (N, V)."""
        positions = lanes.place(rows, [len(d.ids) - 1 for d in draws])
        return self._forward([d.ids[-1] for d in draws], positions, lanes, list(range(len(draws))))

    def _forward(self, ids: list[int], positions: list[int], branches: attention.Pass, wanted: list[int]) -> Any:
        def row(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.long, device=self.device)

        out = self.model(
            input_ids=row(ids)[None],
            position_ids=row(positions)[None],
            use_cache=False,
            logits_to_keep=row(wanted),
            branches=branches,
        )
        return out.logits[0]

    def draw(self, logits_NV: torch.Tensor, draws: Sequence[Growing], temperature: float) -> list[bool]:
        """The next token of every draw by its own random number; returns which draws go on."""
        logits_NV = logits_NV.float()
        scale = temperature or 1.0
        if temperature == 0:
            tokens_N = logits_NV.argmax(-1)
        else:
            tempered_NV = torch.softmax(logits_NV / scale, -1)
            u_N = torch.tensor([d.numbers[len(d.ids)] for d in draws], dtype=torch.float64, device=self.device)
            tokens_N = pick(tempered_NV, u_N)
        model_N = _logprobs(logits_NV, tokens_N, 1.0)
        logprob_N = model_N if scale == 1 else _logprobs(logits_NV, tokens_N, scale)
        columns = (tokens_N.tolist(), logprob_N.tolist(), model_N.tolist())
        return [d.take(*values) for d, *values in zip(draws, *columns, strict=True)]


def pick(shares_NV: torch.Tensor, u_N: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF sampling: the first token at which the running sum exceeds u times the total.

    Sums are in float64, over blocks first and then within the block that holds the answer.
    """
    size = 256
    blocks_NBS = torch.nn.functional.pad(shares_NV, (0, -shares_NV.shape[1] % size)).unflatten(1, (-1, size))
    sums_NB = blocks_NBS.sum(-1, dtype=torch.float64).cumsum(-1)
    goal_N1 = (u_N * sums_NB[:, -1])[:, None]
    block_N1 = torch.searchsorted(sums_NB, goal_N1, right=True).clamp(max=sums_NB.shape[1] - 1)
    before_N1 = torch.where(block_N1 > 0, sums_NB.gather(1, (block_N1 - 1).clamp(min=0)), 0.0)
    block_NS = blocks_NBS[torch.arange(len(u_N), device=u_N.device), block_N1[:, 0]]
    within_NS = block_NS.double().cumsum(-1)
    place_N1 = torch.searchsorted(within_NS, goal_N1 - before_N1, right=True)
    # The two sums may differ in the last digit; what is picked must have a share.
    last_N1 = (size - 1 - (block_NS > 0).flip(1).int().argmax(1))[:, None]
    return (block_N1 * size + torch.minimum(place_N1, last_N1))[:, 0]


def _logprobs(logits_NV: torch.Tensor, tokens_N: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of tokens under tempered logits, float64 (N,)."""
    tempered = logits_NV if temperature == 1 else logits_NV / temperature
    chosen = tempered.gather(1, tokens_N[:, None])[:, 0].double()
    return chosen - torch.logsumexp(tempered, -1).double()


def _table(logits_NV: torch.Tensor, tokens_N: torch.Tensor, temperatures: tuple[float, ...]) -> np.ndarray:
    """Shape (temperatures, N), a block of rows at a time."""
    blocks = []
    for rows, tokens in zip(logits_NV.split(128), tokens_N.split(128), strict=True):
        rows = rows.float()
        blocks.append(torch.stack([_logprobs(rows, tokens, t) for t in temperatures]))
    return torch.cat(blocks, 1).cpu().numpy()


class Schedule:
    """Keeps the batch full: encodes what is asked for, grows draws, sends programs their answers.

    Jobs are admitted while lanes are free and the key-value positions they hold stay within the
    limit (one job is always admitted). A program that asks again goes before new jobs.
    """

    def __init__(self, engine: TorchEngine, todo: Sequence[Work]):
        self.engine, self.limits = engine, engine.limits
        for work in todo:  # where an attempt ran out of memory, its requests begin anew
            work.path, work.prompts, work.drawing = (), {}, 0
        self.todo = deque(todo)
        self.items: deque[Item] = deque()  # to encode
        self.scores: deque[Item] = deque()  # to encode when there is enough for a pass, or nothing else to do
        self.queue: deque[Lane] = deque()  # prompts whose draws wait for a lane
        self.growing: dict[tuple[int, int], Growing] = {}  # by lane and place in it
        self.active: list[Work] = []
        self.lanes: Lanes | None = None
        self.free: list[int] = []

    def run(self) -> Iterator[Work]:
        while self.todo or self.active:
            self._admit()
            if self.items:
                self._encode(self.items)
            elif self.scores and (not self.growing or self._a_pass(self.scores)):
                self._encode(self.scores)
            elif self.growing:
                self._grow()
            self._fill()
            for work in [w for w in self.active if w.over]:
                self.active.remove(work)
                work.told = True
                yield work

    def _admit(self) -> None:
        held, busy = sum(w.held() for w in self.active), sum(w.drawing for w in self.active)
        while self.todo:
            work = self.todo[0]
            if work.over:  # finished when memory ran out
                self.active.append(self.todo.popleft())
                continue
            held, busy = held + work.held(), busy + sum(work.draws())
            if self.active and (held > self.limits.tokens or busy > self.limits.sequences):
                break
            self.active.append(self.todo.popleft())
            if work.job.context:
                self._add(self.items, (), work.job.context, 0, True, lambda path, _, w=work: self._begin(w, path))
            else:
                self._begin(work, ())

    def _begin(self, work: Work, path: Path) -> None:
        work.path = path
        self._start(work)

    def _add(
        self,
        queue: deque[Item],
        path: Path,
        ids: Ids,
        logits: int,
        keep: bool,
        done: Callable[[Path, torch.Tensor], None],
    ) -> None:
        """Queues a span, cut into pieces that fit a pass; `done` gets the path with the span behind it."""
        size = max(1, min(self.limits.pass_tokens, self.limits.logits // self.engine.vocabulary))
        cuts = [*range(0, len(ids), size), len(ids)]
        found: list[torch.Tensor] = []

        def piece(n: int, path: Path) -> None:
            part = ids[cuts[n] : cuts[n + 1]]
            wanted = max(0, min(len(part), logits - (len(ids) - cuts[n + 1])))

            last = n + 2 == len(cuts)

            def then(span: Span | None, logits_NV: torch.Tensor) -> None:
                found.append(logits_NV)
                longer = path if span is None else (*path, span)
                if last:
                    done(longer, torch.cat(found) if len(found) > 1 else logits_NV)
                else:
                    piece(n + 1, longer)

            queue.append(Item(path, part, wanted, keep or not last, then))

        piece(0, path)

    def _a_pass(self, items: deque[Item]) -> bool:
        tokens, logits = sum(len(i.ids) for i in items), sum(i.logits for i in items) * self.engine.vocabulary
        return tokens >= self.limits.pass_tokens or logits >= self.limits.logits

    def _encode(self, items: deque[Item]) -> None:
        batch, tokens, logits = [], 0, 0
        while items:
            tokens += len(items[0].ids)
            logits += items[0].logits * self.engine.vocabulary
            if batch and (tokens > self.limits.pass_tokens or logits > self.limits.logits):
                break
            batch.append(items.popleft())
        self.engine.encode(batch)

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
        else:
            self._start(work)

    def _prompt(self, work: Work, n: int, r: SampleRequest, how: How) -> None:
        """Encodes a prompt, scores what is asked of it, and queues its draws."""
        start, stop = r.scored
        wanted = max(1, len(r.prompt) - start + 1 if stop > start else 1)
        assert wanted <= len(r.prompt)

        def done(path: Path, logits_NV: torch.Tensor) -> None:
            work.prompts[r.prompt] = path[len(work.path) :]
            tokens = torch.tensor(r.prompt[start:stop], dtype=torch.long, device=logits_NV.device)
            scores = _table(logits_NV[: stop - start], tokens, (1.0,))[0] if stop > start else np.zeros(0)
            draws: list[Draw | None] = [None] * len(r.seeds)
            left = len(r.seeds)

            def finished(k: int, draw: Draw) -> None:
                nonlocal left
                draws[k], left = draw, left - 1
                work.drawing -= 1
                if not left:
                    self._answer(work, n, Sampled(tuple(d for d in draws if d), scores))

            growing = [
                Growing(how, uniforms(seed, how.max_tokens + 1), lambda draw, k=k: finished(k, draw))
                for k, seed in enumerate(r.seeds)
            ]
            if not growing:
                self._answer(work, n, Sampled((), scores))
            for k in range(0, len(growing), self.limits.sequences):
                self.queue.append(Lane(path, logits_NV[-1].clone(), growing[k : k + self.limits.sequences]))

        self._add(self.items, work.path, r.prompt, wanted, True, done)

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

        def done(path: Path, _: torch.Tensor) -> None:
            work.prompts[prefix] = path[len(work.path) :]
            self._score(work, n, prefix, continuations, temperatures)

        self._add(self.items, work.path, prefix, 0, True, done)

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

        def done(k: int, logits_NV: torch.Tensor) -> None:
            nonlocal left
            ids = torch.tensor(continuations[k], dtype=torch.long, device=logits_NV.device)
            scores[k] = _table(logits_NV, ids, temperatures)
            left -= 1
            if not left:
                self._answer(work, n, scores)

        for k, ids in enumerate(continuations):
            if ids:
                # The last token is predicted, not fed.
                fed = (*prefix, *ids[:-1])
                self._add(self.scores, path, fed, len(ids), False, lambda _, logits_NV, k=k: done(k, logits_NV))
            else:
                done(k, torch.zeros(0, self.engine.vocabulary))

    # Drawing

    def _fill(self) -> None:
        """Draws the first tokens of waiting prompts and gives the draws a lane."""
        while self.queue and self._room(lane := self.queue[0]):
            self.queue.popleft()
            logits_NV = lane.logits_V.expand(len(lane.draws), -1)
            on = self.engine.draw(logits_NV, lane.draws, lane.draws[0].how.temperature)
            if any(on):
                assert self.lanes is not None
                at = self.free.pop()
                self.lanes.fill(at, lane.path)
                going = [d for d, goes in zip(lane.draws, on, strict=True) if goes]
                self.growing.update({(at, r): d for r, d in enumerate(going)})

    def _room(self, lane: Lane) -> bool:
        """Whether the draws may start now. Makes the lanes, and makes them anew where they are too narrow."""
        shared, draws, own = attention.length(lane.path), len(lane.draws), max(1, lane.draws[0].how.max_tokens)
        lanes = self.lanes
        if lanes is None or shared > lanes.shared or own > lanes.own or draws > lanes.draws:
            if self.growing:
                return False
            self._make_lanes(shared, draws, own)
        return bool(self.free) and (not self.growing or len(self.growing) + draws <= self.limits.sequences)

    def _make_lanes(self, shared: int, draws: int, own: int) -> None:
        """As wide as the requests in sight need, as many as sequences and positions allow."""
        for work in (*self.active, *self.todo):
            if isinstance(work.request, Sampling):
                shared, own = max(shared, work.prompt()), max(own, work.request.how.max_tokens)
                draws = max([draws, *work.draws()])
        draws = min(draws, self.limits.sequences)
        count = min(self.limits.tokens // (shared + draws * own), -(-self.limits.sequences // draws) + 1)
        self.lanes = Lanes(max(1, count), draws, shared, own, self.engine.device)
        self.free = list(range(self.lanes.lanes))[::-1]  # the first comes last, and is taken first

    def _grow(self) -> None:
        """One token for every draw that has a place."""
        assert self.lanes is not None
        places, draws = list(self.growing), list(self.growing.values())
        logits_NV = self.engine.grow(self.lanes, places, draws)
        for temperature in {d.how.temperature for d in draws}:
            at = [n for n, d in enumerate(draws) if d.how.temperature == temperature]
            chosen = logits_NV if len(at) == len(draws) else logits_NV[torch.tensor(at, device=logits_NV.device)]
            for n, goes in zip(at, self.engine.draw(chosen, [draws[n] for n in at], temperature), strict=True):
                if not goes:
                    del self.growing[places[n]]
        left = {lane for lane, _ in places} - {lane for lane, _ in self.growing}
        self.free = sorted({*self.free, *left}, reverse=True)
