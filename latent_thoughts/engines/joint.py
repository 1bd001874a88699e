"""The E-step on one chunk: sample thoughts, score them, weigh them, choose one (method, section 5)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latent_thoughts import weights
from latent_thoughts.config import Sample
from latent_thoughts.data import format
from latent_thoughts.data.tokenizer import Controls
from latent_thoughts.engines.base import (
    Engine,
    How,
    Ids,
    Job,
    SampleRequest,
    Sampling,
    ScoreRequest,
    Scoring,
    ask,
    in_order,
)
from latent_thoughts.types import Chunk, Draw, Posterior, ScoredDraw, UserError

POSTERIOR, PRIOR = "posterior", "prior"


@dataclass(frozen=True, slots=True)
class Task:
    """One chunk to infer a thought for, behind its context (truncated once, for all forms)."""

    chunk: Chunk
    context: Ids


@dataclass(frozen=True, slots=True)
class Seeds:
    """Seeds that depend on (run seed, iteration, document, chunk, k) alone."""

    run: int
    iteration: int

    def draw(self, chunk: Chunk, k: int | str) -> int:
        text = f"{self.run}\n{self.iteration}\n{chunk.doc_id}\n{chunk.index}\n{k}"
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
        return int.from_bytes(digest.digest(), "big")

    def rng(self, chunk: Chunk, purpose: str) -> np.random.Generator:
        return np.random.default_rng(self.draw(chunk, purpose))


def tasks(chunks: Sequence[Chunk], target: Sequence[bool], controls: Controls, config: Sample) -> Iterator[Task]:
    """The tasks of one document. Raises UserError for a chunk that cannot fit."""
    for chunk in chunks:
        if not target[chunk.index]:
            continue
        before = [other.ids for other in chunks[: chunk.index]]
        context = format.context(controls, before, config.context_chunks)
        try:
            context = format.fit_context(context, chunk.ids, config.max_thought_tokens, config.max_tokens)
        except UserError as error:
            raise UserError(f"document {chunk.doc_id}, chunk {chunk.index}: {error}") from None
        yield Task(chunk, context)


def infer(
    engine: Engine,
    batch: Sequence[Task],
    controls: Controls,
    config: Sample,
    seeds: Seeds,
    temperature: float,
    each: Callable[[Posterior], None] | None = None,
    raw: Engine | None = None,
) -> list[Posterior]:
    """Runs the E-step on a batch of chunks; the result of a chunk does not depend on the others.

    `each` is told of every posterior as it comes, in any order. log p(x | c) is the model's own in the
    thoughtless form, or that of another model of raw text, `raw`. Raises UserError for a temperature that is not above
    0: what it would draw has no density.
    """
    if not temperature > 0:
        raise UserError(f"thoughts are drawn at a temperature above 0, not {temperature:g}")
    known = raw_logprobs(raw, batch, controls) if raw else [None] * len(batch)
    step = Step(controls, config, seeds, temperature, rescore=not engine.one_numerics)
    jobs = [Job(task.context, step.infer(task, logprob)) for task, logprob in zip(batch, known, strict=True)]
    return in_order(engine, jobs, each)


def raw_logprobs(engine: Engine, batch: Sequence[Task], controls: Controls) -> list[float]:
    """log p(x | c) of raw text, nats, one a task."""
    return likelihoods(
        engine, [ScoreRequest(format.raw_prompt(controls, task.context), (task.chunk.ids,)) for task in batch]
    )


def likelihoods(engine: Engine, requests: Sequence[ScoreRequest]) -> list[float]:
    """The log-probability of every request's one continuation, nats. Raises UserError for one that is not finite."""
    answers = ask(engine, [Scoring((request,)) for request in requests])
    return [_finite(float(answer[0][0].sum())) for answer in answers]


def _finite(logprob: float) -> float:
    """A failed score is an error: NaN would pass for a thought that does not pay, and for one that fails no limit."""
    if not np.isfinite(logprob):
        raise UserError(f"a text has no finite score but {logprob}: the model is broken")
    return logprob


@dataclass(frozen=True, slots=True)
class Step:
    """The E-step on one chunk, as a program for an engine: each method asks, and is sent the answers.

    With `rescore`, posterior draws are scored anew, because another engine drew them; without, the
    log-probabilities they were drawn with stand.
    """

    controls: Controls
    config: Sample
    seeds: Seeds
    temperature: float
    rescore: bool

    def infer(self, task: Task, raw_logprob: float | None = None) -> Generator[Any, Any, Posterior]:
        drawn, thoughtless = yield from self.propose(task)
        return (yield from self.weigh(task, drawn, thoughtless if raw_logprob is None else raw_logprob))

    def propose(self, task: Task) -> Generator[Any, Any, tuple[list[Drawn], float]]:
        """K draws: about `posterior_share` of them from q(z | c, x), the rest from p(z | c); and log p(x | c).

        The number of posterior draws is K times the share, rounded up or down at random so that its
        mean is exact, which keeps the mixture's weights unbiased for every K. The thoughtless form
        is how the posterior's prompt begins, so that its score costs nothing.
        """
        config, chunk = self.config, task.chunk
        mean = config.k * config.posterior_share
        from_posterior = int(mean + self.seeds.rng(chunk, "mixture").random())
        numbers = tuple(self.seeds.draw(chunk, k) for k in range(config.k))
        prompt = format.posterior_prompt(self.controls, (), chunk.ids)
        requests = [SampleRequest(prompt, numbers[:from_posterior], format.chunk_in_posterior_prompt(chunk.ids))]
        if from_posterior < config.k:
            requests.append(SampleRequest(format.prior_prompt(self.controls, ()), numbers[from_posterior:]))
        how = How(config.max_thought_tokens, self.controls.end, self.controls.never_in_thoughts, self.temperature)
        sampled = yield Sampling(tuple(requests), how)
        names = (POSTERIOR, PRIOR)
        drawn = [(name, draw) for name, found in zip(names, sampled, strict=False) for draw in found.draws]
        return drawn, _finite(float(sampled[0].scores.sum()))

    def weigh(self, task: Task, drawn: Sequence[Drawn], raw_logprob: float) -> Generator[Any, Any, Posterior]:
        """Scores every distinct finished thought once under both forms, weighs and chooses.

        log q is taken under the tempered distribution that was sampled, log p never is.
        """
        x, end = task.chunk.ids, (self.controls.end,)
        thoughts = list(dict.fromkeys(d.ids for _, d in drawn if d.finished))
        known = {} if self.rescore else {d.ids: d for name, d in drawn if name == POSTERIOR and d.finished}
        unknown = [z for z in thoughts if z not in known]
        joint = ScoreRequest(format.prior_prompt(self.controls, ()), tuple(z + end + x for z in thoughts))
        backward = ScoreRequest(format.posterior_prompt(self.controls, (), x), tuple(z + end for z in unknown))
        scores = yield Scoring((joint, backward), (1.0, self.temperature))
        posterior = {z: _totals(values) for z, values in zip(unknown, scores[1], strict=True)}
        posterior |= {z: (sum(d.model_logprobs), sum(d.logprobs)) for z, d in known.items()}
        table = {z: _scores(posterior[z], values, len(z) + 1) for z, values in zip(thoughts, scores[0], strict=True)}
        return self._posterior(task, drawn, table, raw_logprob)

    def _posterior(
        self, task: Task, drawn: Sequence[Drawn], table: dict[Ids, _Scores], raw_logprob: float
    ) -> Posterior:
        config = self.config
        finished = np.array([d.finished for _, d in drawn])
        scores = [table[d.ids] if d.finished else _NOT_SCORED for _, d in drawn]
        log_q = weights.log_mixture(
            [s.tempered_posterior for s in scores], [s.tempered_prior for s in scores], config.posterior_share
        )
        log_x = np.array([s.log_x for s in scores])
        log_weights = weights.log_weights([s.log_prior + s.log_x for s in scores], log_q, finished)
        gains = log_x - raw_logprob
        thoughts, rng = [d.ids for _, d in drawn], self.seeds.rng(task.chunk, "choice")
        kept = weights.choose(log_weights, thoughts, config.choose, rng, config.keep)
        if config.accept != "all":
            worth = gains if config.accept == "gain" else log_weights - raw_logprob
            kept = [n for n in kept if worth[n] > config.margin]
        draws = tuple(
            ScoredDraw(d, proposal, s.log_posterior, s.log_prior, s.log_x, float(q))
            for (proposal, d), s, q in zip(drawn, scores, log_q, strict=True)
        )
        gaps = [
            abs(sum(d.logprobs) - (s.tempered_posterior if proposal == POSTERIOR else s.tempered_prior))
            for (proposal, d), s in zip(drawn, scores, strict=True)
            if d.finished and (proposal == PRIOR or self.rescore)
        ]
        gap = float(np.mean(gaps)) if gaps else None
        return Posterior(task.chunk, task.context, draws, log_weights, gains, tuple(kept), raw_logprob, gap)


@dataclass(frozen=True, slots=True)
class Answering:
    """How to answer behind a context: with a thought first, or at once."""

    controls: Controls
    thinks: bool
    max_thought_tokens: int
    max_tokens: int  # of the answer
    temperature: float

    def job(self, context: Ids, seeds: tuple[int, int]) -> Job:
        """Returns (the thought, None for a model that does not think; the answer's ids).

        A thought that found no end is ended here: the model then answers as well as it can.
        """
        return Job(context, self._think(seeds)) if self.thinks else Job((), self._answer(context, None, seeds))

    def _think(self, seeds: tuple[int, int]) -> Generator[Any, Any, tuple[Draw | None, Ids]]:
        controls, prompt = self.controls, format.prior_prompt(self.controls, ())
        how = How(self.max_thought_tokens, controls.end, controls.never_in_thoughts, self.temperature)
        thought = (yield Sampling((SampleRequest(prompt, seeds[:1]),), how))[0].draws[0]
        return (yield from self._answer((*prompt, *thought.ids, controls.end), thought, seeds))

    def _answer(
        self, prompt: Ids, thought: Draw | None, seeds: tuple[int, int]
    ) -> Generator[Any, Any, tuple[Draw | None, Ids]]:
        controls = self.controls
        how = How(self.max_tokens, controls.eos, controls.never_in_thoughts | {controls.end}, self.temperature)
        answer = (yield Sampling((SampleRequest(prompt, seeds[1:]),), how))[0].draws[0]
        return thought, answer.ids


Drawn = tuple[str, Draw]  # by which proposal


@dataclass(frozen=True, slots=True)
class _Scores:
    """A thought's log-probabilities in nats, with its end token; tempered ones at the draws' temperature."""

    log_posterior: float
    log_prior: float
    log_x: float
    tempered_posterior: float
    tempered_prior: float


_NOT_SCORED = _Scores(*[-np.inf] * 5)


def _totals(values: np.ndarray) -> tuple[float, float]:
    """Sums of (temperatures 1 and T, tokens)."""
    untempered, tempered = values.sum(1).tolist()
    return untempered, tempered


def _scores(posterior: tuple[float, float], joint: np.ndarray, thought: int) -> _Scores:
    """From the joint's (temperatures 1 and T, tokens), of which the first `thought` are z and its end token."""
    prior = _totals(joint[:, :thought])
    return _Scores(posterior[0], prior[0], float(joint[0, thought:].sum()), posterior[1], prior[1])
