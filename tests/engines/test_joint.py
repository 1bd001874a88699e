"""The estimators' contract, checked exactly on an engine whose thoughts can all be enumerated."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from latent_thoughts import weights
from latent_thoughts.config import Sample
from latent_thoughts.data.tokenizer import Controls
from latent_thoughts.engines import joint
from latent_thoughts.engines.base import Job, in_order, uniforms
from latent_thoughts.engines.toy import ToyEngine
from latent_thoughts.types import Chunk, Draw, Posterior, UserError

# Ids 0 to 2 are words; the control tokens follow.
CONTROLS = Controls(start=3, end=4, prior=5, posterior=6, bos=7, eos=8)
C, X = (7, 1, 0), (2, 0, 1)
TASK = joint.Task(Chunk("doc", 1, 0, "text", X), C)
SEEDS = joint.Seeds(0, 1)
MAX = 3


@pytest.fixture(scope="module")
def engine() -> ToyEngine:
    return ToyEngine(9, seed=3, scale=1.0)


def config(**settings: object) -> Sample:
    return Sample(**{"k": 4, "max_thought_tokens": MAX, "max_tokens": 32, **settings})


def every_thought(engine: ToyEngine) -> list[tuple[int, ...]]:
    return list(engine.thoughts(MAX, CONTROLS.end, CONTROLS.never_in_thoughts))


def joint_probability(engine: ToyEngine) -> float:
    """Σ over finished z of p(z, x | c), from the definition: S and P condition, z E x are scored."""
    prefix = (*C, CONTROLS.start, CONTROLS.prior)
    return sum(np.exp(engine.score_one(prefix, (*z, CONTROLS.end, *X)).sum()) for z in every_thought(engine))


def recorded(engine: ToyEngine, proposal: str, z: tuple[int, ...], temperature: float) -> Draw:
    """A draw as the engine itself would record it."""
    prompt = (*C, 3, 4, *X, 3, 6) if proposal == "posterior" else (*C, 3, 5)
    scores = [tuple(engine.score_one(prompt, (*z, CONTROLS.end), t).tolist()) for t in (temperature, 1.0)]
    return Draw(z, scores[0], "end", scores[1])


def weigh(engine: ToyEngine, draws, settings: Sample, temperature: float, rescore: bool = True) -> Posterior:
    step = joint.Step(CONTROLS, settings, SEEDS, temperature, rescore)
    raw = float(engine.score_one((*C, CONTROLS.start, CONTROLS.end), X).sum())
    return in_order(engine, [Job(C, step.weigh(TASK, draws, raw))])[0]


def propose(engine: ToyEngine, tasks: list[joint.Task], settings: Sample, temperature: float):
    step = joint.Step(CONTROLS, settings, SEEDS, temperature, False)
    return [drawn for drawn, _ in in_order(engine, [Job(t.context, step.propose(t)) for t in tasks])]


def weigh_all(engine: ToyEngine, settings: Sample, temperature: float, rescore: bool = False) -> Posterior:
    """Every thought as a draw of its own, through the code that weighs draws."""
    draws = [("posterior", recorded(engine, "posterior", z, temperature)) for z in every_thought(engine)]
    return weigh(engine, draws, settings, temperature, rescore)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rescore", [False, True])
def test_mean_weight_is_the_joint_probability(
    engine: ToyEngine, share: float, temperature: float, rescore: bool
) -> None:
    found = weigh_all(engine, config(posterior_share=share), temperature, rescore)
    log_q = np.array([d.log_q for d in found.draws])
    assert np.exp(log_q).sum() < 1  # unfinished thoughts hold the rest
    mean = np.exp(log_q + found.log_weights).sum()
    assert mean == pytest.approx(joint_probability(engine), abs=1e-9, rel=1e-9)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_log_q_is_the_density_that_is_sampled(engine: ToyEngine, share: float, temperature: float) -> None:
    """Frequencies of real draws against exp(log_q)."""
    from scipy import stats

    settings = config(posterior_share=share, k=3)
    tasks = [replace(TASK, chunk=replace(TASK.chunk, doc_id=str(n))) for n in range(2000)]
    drawn = propose(engine, tasks, settings, temperature)
    exact = {d.draw.ids: np.exp(d.log_q) for d in weigh_all(engine, settings, temperature).draws}
    all_draws = [d for draws in drawn for _, d in draws]
    common = [z for z, p in exact.items() if p * len(all_draws) > 10]
    seen = [sum(d.finished and d.ids == z for d in all_draws) for z in common]
    expected = [exact[z] * len(all_draws) for z in common]
    rest = len(all_draws) - sum(seen), len(all_draws) - sum(expected)
    assert len(common) >= 3
    assert stats.chisquare([*seen, rest[0]], [*expected, rest[1]]).pvalue > 1e-4


def test_expected_bound_rises_with_k_and_stays_below_the_likelihood() -> None:
    """E[L_K] over all tuples of independent draws of the mixture, on an engine where every thought finishes."""
    engine = ToyEngine(9, seed=5)
    never = [*CONTROLS.never_in_thoughts]
    engine.logits[:, CONTROLS.prior, never] = engine.logits[:, CONTROLS.posterior, never] = -1e9
    engine.logits[CONTROLS.prior, :3] = engine.logits[CONTROLS.posterior, :3] = -1e9  # one word, then E
    engine.logits[CONTROLS.prior, :3, CONTROLS.end] = engine.logits[CONTROLS.posterior, :3, CONTROLS.end] = 0
    settings = config(posterior_share=0.5)
    found = weigh_all(engine, settings, 1.0)
    q = np.exp([d.log_q for d in found.draws])
    assert q.sum() == pytest.approx(1, abs=1e-9)
    likely = np.flatnonzero(q > 1e-12)
    expected = []
    for k in (1, 2, 3):
        tuples = list(itertools.product(likely, repeat=k))
        expected.append(sum(np.prod(q[list(t)]) * weights.bound(found.log_weights[list(t)]) for t in tuples))
    assert expected[0] < expected[1] < expected[2] < np.log(joint_probability(engine))


def test_spans_are_those_of_the_definition(engine: ToyEngine) -> None:
    """log p covers z, E and x; log q covers z and E; S, P, Q and the empty S E only condition."""
    z = (1, 2)
    found = weigh(engine, [("prior", Draw(z, (), "end"))], config(), 2.0)
    draw = found.draws[0]
    prior = engine.score_one((*C, 3, 5), (*z, 4, *X))
    assert draw.log_prior == pytest.approx(prior[:3].sum(), abs=1e-12)
    assert draw.log_x == pytest.approx(prior[3:].sum(), abs=1e-12)
    assert draw.log_posterior == pytest.approx(engine.score_one((*C, 3, 4, *X, 3, 6), (*z, 4)).sum(), abs=1e-12)
    inferred = joint.infer(engine, [TASK], CONTROLS, config(), SEEDS, 2.0)[0]
    assert inferred.raw_logprob == pytest.approx(engine.score_one((*C, 3, 4), X).sum(), abs=1e-12)
    assert found.gains[0] == pytest.approx(draw.log_x - found.raw_logprob, abs=1e-12)
    tempered = [engine.score_one((*C, 3, 4, *X, 3, 6), (*z, 4), 2.0), engine.score_one((*C, 3, 5), (*z, 4), 2.0)]
    assert draw.log_q == pytest.approx(np.logaddexp(*[t.sum() for t in tempered]) + np.log(0.5), abs=1e-12)


def test_unfinished_draws_weigh_nothing_and_are_never_chosen(engine: ToyEngine) -> None:
    draws = [("posterior", Draw((1, 1, 1), (), "length")), ("prior", Draw((0,), (), "control"))]
    found = weigh(engine, draws, config(), 1.0)
    assert found.chosen == -1
    assert weights.bound(found.log_weights) == -np.inf


def test_acceptance_by_gain(engine: ToyEngine) -> None:
    found = weigh_all(engine, config(accept="all", choose="best"), 1.0)
    assert found.chosen >= 0
    gain = found.gains[found.chosen]
    for margin, expected in ((gain - 1e-6, found.chosen), (gain, -1)):
        settings = config(accept="gain", choose="best", margin=margin)
        assert weigh_all(engine, settings, 1.0).chosen == expected


def test_acceptance_by_weight(engine: ToyEngine) -> None:
    """A thought's own cost counts: what a draw's weight has over log p(x | c), not what x alone gains by it."""
    found = weigh_all(engine, config(accept="all", choose="best"), 1.0)
    worth = found.log_weights[found.chosen] - found.raw_logprob
    assert found.chosen >= 0 and worth != pytest.approx(found.gains[found.chosen])
    for margin, expected in ((worth - 1e-6, found.chosen), (worth, -1)):
        settings = config(accept="weight", choose="best", margin=margin)
        assert weigh_all(engine, settings, 1.0).chosen == expected


def test_results_do_not_depend_on_the_batch(engine: ToyEngine) -> None:
    tasks = [replace(TASK, chunk=replace(TASK.chunk, doc_id=str(n))) for n in range(6)]
    settings = config()
    together = joint.infer(engine, tasks, CONTROLS, settings, SEEDS, 1.5)
    apart = [joint.infer(engine, [t], CONTROLS, settings, SEEDS, 1.5)[0] for t in reversed(tasks)][::-1]
    for a, b in zip(together, apart, strict=True):
        assert a.draws == b.draws
        assert a.chosen == b.chosen
        assert a.log_weights.tolist() == b.log_weights.tolist()
    assert len({a.draws for a in together}) > 1


def test_seeds_differ_in_every_part() -> None:
    chunk = TASK.chunk
    changed = [
        SEEDS.draw(chunk, 0), SEEDS.draw(chunk, 1), joint.Seeds(1, 1).draw(chunk, 0), joint.Seeds(0, 2).draw(chunk, 0),
        SEEDS.draw(replace(chunk, doc_id="other"), 0), SEEDS.draw(replace(chunk, index=2), 0),
    ]  # fmt: skip
    assert len(set(changed)) == len(changed)
    assert uniforms(changed[0], 3).tolist() == uniforms(changed[0], 5)[:3].tolist()


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_share_of_posterior_draws_is_exact_in_the_mean(engine: ToyEngine, share: float) -> None:
    tasks = [replace(TASK, chunk=replace(TASK.chunk, doc_id=str(n))) for n in range(1500)]
    drawn = propose(engine, tasks, config(k=1, posterior_share=share), 1.0)
    mean = np.mean([proposal == "posterior" for draws in drawn for proposal, _ in draws])
    assert mean == pytest.approx(share, abs=0.04 if share < 1 else 0)


def test_a_failed_score_is_an_error(engine: ToyEngine) -> None:
    class Failing(ToyEngine):
        def score_one(self, prefix, continuation, temperature=1.0):
            return super().score_one(prefix, continuation, temperature) * np.nan

    with pytest.raises(UserError, match="no finite score"):
        joint.infer(Failing(9), [TASK], CONTROLS, config(k=16), SEEDS, 1.0)
    with pytest.raises(UserError, match="no finite score"):  # else every thought would seem not to pay
        joint.infer(engine, [TASK], CONTROLS, config(k=16), SEEDS, 1.0, raw=Failing(9))


def test_context_is_truncated_once_from_the_left() -> None:
    chunks = [Chunk("d", n, 0, "", (n,) * 6) for n in range(3)]
    settings = config(max_tokens=20)
    found = list(joint.tasks(chunks, [False, True, True], CONTROLS, settings))
    # 20 - 3 (thought) - 6 (chunk) - 5 (control tokens) = 6 tokens of context
    assert [t.context for t in found] == [(0,) * 6, (1,) * 6]
    assert next(joint.tasks(chunks, [True, False, False], CONTROLS, settings)).context == (CONTROLS.bos,)
    with pytest.raises(UserError, match="document d, chunk 1: a chunk of 6 tokens"):
        list(joint.tasks(chunks, [False, True, False], CONTROLS, config(max_tokens=14)))


def test_gap_between_sampler_and_scorer_is_measured(engine: ToyEngine) -> None:
    honest = joint.infer(engine, [TASK], CONTROLS, config(k=8), SEEDS, 1.5)[0]
    assert any(p == "prior" and d.finished for p, d in ((d.proposal, d.draw) for d in honest.draws))
    assert honest.gap == pytest.approx(0, abs=1e-9)
    for proposal in ("prior", "posterior"):
        exact = recorded(engine, proposal, (0,), 1.5)
        wrong = replace(exact, logprobs=tuple(p + 0.5 for p in exact.logprobs))
        assert weigh(engine, [(proposal, wrong)], config(), 1.5).gap == pytest.approx(1.0, abs=1e-9)
    alone = weigh(engine, [("posterior", wrong)], config(), 1.5, rescore=False)
    assert alone.gap is None  # what one engine drew is not scored again


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_scoring_anew_changes_nothing_where_numerics_are_one(engine: ToyEngine, temperature: float) -> None:
    class Another(ToyEngine):
        one_numerics = False

    other = Another(9, seed=3, scale=1.0)
    tasks = [replace(TASK, chunk=replace(TASK.chunk, doc_id=str(n))) for n in range(20)]
    found = [joint.infer(e, tasks, CONTROLS, config(k=6, accept="all"), SEEDS, temperature) for e in (engine, other)]
    for a, b in zip(*found, strict=True):
        assert a.log_weights == pytest.approx(b.log_weights, abs=1e-9)
        assert a.chosen == b.chosen
    assert any(p.chosen >= 0 for p in found[0])
