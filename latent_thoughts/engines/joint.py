"""The E-step on chunks: sample thoughts, score them, weigh them, choose one (method, section 5)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from latent_thoughts import weights
from latent_thoughts.config import Sample
from latent_thoughts.data import format
from latent_thoughts.data.tokenizer import Controls
from latent_thoughts.engines.base import Engine, Ids, SampleRequest, ScoreRequest
from latent_thoughts.types import Chunk, Draw, Posterior, ScoredDraw, UserError


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
    engine: Engine, batch: Sequence[Task], controls: Controls, config: Sample, seeds: Seeds, temperature: float
) -> list[Posterior]:
    """Runs the E-step on a batch of chunks; the result of a chunk does not depend on the others."""
    drawn = propose(engine, batch, controls, config, seeds, temperature)
    return score(engine, batch, drawn, controls, config, seeds, temperature)


def propose(
    engine: Engine, batch: Sequence[Task], controls: Controls, config: Sample, seeds: Seeds, temperature: float
) -> list[list[tuple[str, Draw]]]:
    """K draws a chunk: about `posterior_share` of them from q(z | c, x), the rest from p(z | c).

    The number of posterior draws is K times the share, rounded up or down at random so that its
    mean is exact, which keeps the mixture's weights unbiased for every K.
    """
    requests: list[SampleRequest] = []
    for task in batch:
        mean = config.k * config.posterior_share
        from_posterior = int(mean + seeds.rng(task.chunk, "mixture").random())
        numbers = [seeds.draw(task.chunk, k) for k in range(config.k)]
        posterior = format.posterior_prompt(controls, task.context, task.chunk.ids)
        prior = format.prior_prompt(controls, task.context)
        requests.append(SampleRequest(posterior, tuple(numbers[:from_posterior]), config.max_thought_tokens))
        requests.append(SampleRequest(prior, tuple(numbers[from_posterior:]), config.max_thought_tokens))
    draws = engine.sample(requests, stop=controls.end, abort=controls.never_in_thoughts, temperature=temperature)
    return [
        [("posterior", d) for d in draws[2 * n]] + [("prior", d) for d in draws[2 * n + 1]] for n in range(len(batch))
    ]


def score(
    engine: Engine,
    batch: Sequence[Task],
    drawn: Sequence[Sequence[tuple[str, Draw]]],
    controls: Controls,
    config: Sample,
    seeds: Seeds,
    temperature: float,
) -> list[Posterior]:
    """Scores every distinct finished thought once under both forms, weighs and chooses.

    log q is taken under the tempered distribution that was sampled, log p never is.
    """
    distinct = [list(dict.fromkeys(d.ids for _, d in draws if d.finished)) for draws in drawn]
    end = (controls.end,)
    posterior, joint, raw = [], [], []
    for task, thoughts in zip(batch, distinct, strict=True):
        c, x = task.context, task.chunk.ids
        joint.append(ScoreRequest(format.prior_prompt(controls, c), tuple(z + end + x for z in thoughts)))
        raw.append(ScoreRequest(format.thoughtless_prompt(controls, c), (x,)))
        prompt = format.posterior_prompt(controls, c, x)
        posterior.append(ScoreRequest(prompt, tuple(z + end for z in thoughts)))
    temperatures = (1.0, temperature)
    scores = engine.score([*posterior, *joint], temperatures)
    raw_scores = engine.score(raw)
    results = []
    for n, task in enumerate(batch):
        table = {z: _sums(scores[n][i], scores[len(batch) + n][i], len(z) + 1) for i, z in enumerate(distinct[n])}
        results.append(_posterior(task, drawn[n], table, float(raw_scores[n][0].sum()), config, seeds))
    return results


@dataclass(frozen=True, slots=True)
class _Sums:
    log_posterior: float
    log_prior: float
    log_x: float
    tempered_posterior: float
    tempered_prior: float


def _sums(posterior: np.ndarray, joint: np.ndarray, thought: int) -> _Sums:
    """Sums log-probabilities, (temperatures 1 and T, tokens), over z with its end token, and over x."""
    return _Sums(
        log_posterior=float(posterior[0].sum()),
        log_prior=float(joint[0, :thought].sum()),
        log_x=float(joint[0, thought:].sum()),
        tempered_posterior=float(posterior[1].sum()),
        tempered_prior=float(joint[1, :thought].sum()),
    )


_NOT_SCORED = _Sums(*[-np.inf] * 5)


def _posterior(
    task: Task,
    drawn: Sequence[tuple[str, Draw]],
    table: dict[Ids, _Sums],
    raw_logprob: float,
    config: Sample,
    seeds: Seeds,
) -> Posterior:
    finished = np.array([d.finished for _, d in drawn])
    sums = [table[d.ids] if d.finished else _NOT_SCORED for _, d in drawn]
    log_q = weights.log_mixture(
        [s.tempered_posterior for s in sums], [s.tempered_prior for s in sums], config.posterior_share
    )
    log_x = np.array([s.log_x for s in sums])
    log_weights = weights.log_weights([s.log_prior + s.log_x for s in sums], log_q, finished)
    gains = log_x - raw_logprob
    chosen = weights.choose(log_weights, config.choose, seeds.rng(task.chunk, "choice"))
    if chosen >= 0 and config.accept == "gain" and not gains[chosen] > config.margin:
        chosen = -1
    draws = tuple(
        ScoredDraw(d, proposal, s.log_posterior, s.log_prior, s.log_x, float(q))
        for (proposal, d), s, q in zip(drawn, sums, log_q, strict=True)
    )
    gaps = [
        abs(sum(d.logprobs) - (s.tempered_posterior if proposal == "posterior" else s.tempered_prior))
        for (proposal, d), s in zip(drawn, sums, strict=True)
        if d.finished
    ]
    gap = float(np.mean(gaps)) if gaps else 0.0
    return Posterior(task.chunk, task.context, draws, log_weights, gains, chosen, raw_logprob, gap)
