"""The torch engine against plain forward passes of transformers, on real (tiny, random) models."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latent_thoughts.attention import Lanes, Span
from latent_thoughts.config import Engine as Limits
from latent_thoughts.config import resolve
from latent_thoughts.engines.base import (
    How,
    Job,
    Program,
    SampleRequest,
    Sampling,
    ScoreRequest,
    Scoring,
    ask,
    in_order,
)
from latent_thoughts.engines.load import loaded_engine
from latent_thoughts.engines.passes import Passes, pick
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.types import Draw, UserError
from tests.conftest import CONTROLS, VOCABULARY, tiny

# sliding windows, soft caps, sinks, values narrower than keys
KINDS = ["llama", "gpt2", "qwen3", "gemma3_text", "gemma2", "gpt_oss", "deepseek_v3"]


def how(max_tokens: int, temperature: float = 1.0) -> How:
    return How(max_tokens, CONTROLS.end, CONTROLS.never_in_thoughts, temperature)


def sample(engine: TorchEngine, asked: list[SampleRequest], how: How) -> list[tuple[Draw, ...]]:
    return [answer[0].draws for answer in ask(engine, [Sampling((r,), how) for r in asked])]


def score(engine: TorchEngine, asked: list[ScoreRequest], temperatures: tuple[float, ...]) -> list[list[np.ndarray]]:
    return [answer[0] for answer in ask(engine, [Scoring((r,), temperatures) for r in asked])]


def plain(model: Any, prefix: tuple[int, ...], continuation: tuple[int, ...], temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities from one forward pass over the whole sequence."""
    if not continuation:
        return np.zeros(0)
    ids = torch.tensor([[*prefix, *continuation]])
    with torch.no_grad():
        rows = torch.log_softmax(model(ids).logits[0].double() / temperature, -1)
    return np.array([float(rows[len(prefix) + t - 1, i]) for t, i in enumerate(continuation)])


def requests(seed: int = 0) -> list[ScoreRequest]:
    """Prefixes of every length from 1 to 12, continuations of 0 to 9 tokens."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, VOCABULARY, n).tolist())

    return [ScoreRequest(ids(n), tuple(ids(int(m)) for m in rng.integers(0, 10, 3))) for n in range(1, 13)]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_a_plain_forward_pass(kind: str) -> None:
    model = tiny(kind)
    found = score(TorchEngine(tiny(kind), Limits(sequences=8)), requests(), (1.0, 2.0))
    for request, row in zip(requests(), found, strict=True):
        for continuation, scores in zip(request.continuations, row, strict=True):
            assert scores.shape == (2, len(continuation))
            for temperature, values in zip((1.0, 2.0), scores, strict=True):
                expected = plain(model, request.prefix, continuation, temperature)
                assert values == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_sampled_logprobs_are_those_of_the_sampled_distribution(kind: str, temperature: float) -> None:
    model = tiny(kind)
    asked = [SampleRequest(r.prefix, tuple(range(10 * n, 10 * n + 5))) for n, r in enumerate(requests())]
    drawn = sample(TorchEngine(tiny(kind), Limits(sequences=16)), asked, how(8, temperature))
    finishes = set()
    for request, row in zip(asked, drawn, strict=True):
        for draw in row:
            finishes.add(draw.finish)
            ids = (*draw.ids, CONTROLS.end) if draw.finished else draw.ids
            assert len(draw.ids) <= 8
            assert draw.model_logprobs == pytest.approx(plain(model, request.prompt, ids), abs=1e-4)
            assert draw.logprobs == pytest.approx(plain(model, request.prompt, ids, temperature), abs=1e-4)
            assert not {CONTROLS.end, *CONTROLS.never_in_thoughts} & set(draw.ids)
    assert finishes == {"end", "length", "control"}


def test_a_draw_depends_on_its_prompt_and_seed_alone() -> None:
    asked = [SampleRequest(r.prefix, tuple(range(7 * n, 7 * n + 7))) for n, r in enumerate(requests())]
    wide = sample(TorchEngine(tiny("llama"), Limits(sequences=64)), asked, how(12))
    narrow = TorchEngine(tiny("llama"), Limits(sequences=3, tokens=40, pass_tokens=5))
    narrow = sample(narrow, asked[::-1], how(12))[::-1]
    assert [[(d.ids, d.finish) for d in row] for row in wide] == [[(d.ids, d.finish) for d in row] for row in narrow]
    assert len({d.ids for row in wide for d in row}) > 20


def test_lanes_close_up_around_the_draws_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[dict[int, int]] = []
    move = Lanes.move
    monkeypatch.setattr(Lanes, "move", lambda self, to: (moved.append(dict(to)), move(self, to)))
    asked = [
        Sampling((SampleRequest(r.prefix, (n, n + 100)),), How(25 if n in (4, 9) else 2, -1, frozenset()))
        for n, r in enumerate(requests())
    ]
    together = ask(TorchEngine(tiny("llama")), asked)
    assert any(set(to.values()) == {0, 1} and max(to) > 1 for to in moved)  # of twelve lanes two are left
    for (found,), request in zip(together, asked, strict=True):
        ((alone,),) = ask(TorchEngine(tiny("llama")), [request])
        assert [d.ids for d in found.draws] == [d.ids for d in alone.draws]
        for draw in found.draws:
            assert draw.logprobs == pytest.approx(plain(tiny("llama"), request.requests[0].prompt, draw.ids), abs=1e-4)


def test_frequencies_follow_the_model() -> None:
    from scipy import stats

    model, prompt = tiny("llama"), (1, 2, 3)
    draws = sample(TorchEngine(tiny("llama")), [SampleRequest(prompt, tuple(range(4000)))], how(1))[0]
    exact = np.exp([plain(model, prompt, (i,))[0] for i in range(VOCABULARY)])
    plain_ids = [i for i in range(VOCABULARY) if i not in {CONTROLS.end, *CONTROLS.never_in_thoughts}]
    seen = [sum(bool(d.ids) and d.ids[0] == i for d in draws) for i in plain_ids]
    seen += [sum(not d.ids and d.finished for d in draws), sum(not d.ids and not d.finished for d in draws)]
    expected = [exact[i] for i in plain_ids] + [exact[CONTROLS.end], exact[list(CONTROLS.never_in_thoughts)].sum()]
    assert stats.chisquare(seen, np.array(expected) * len(draws)).pvalue > 1e-4


def test_greedy_takes_the_likeliest_token() -> None:
    model, prompt = tiny("llama"), (1, 2, 3)
    draw = sample(TorchEngine(tiny("llama")), [SampleRequest(prompt, (0,))], How(5, -1, frozenset(), 0))[0][0]
    ids = list(prompt)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert draw.ids == tuple(ids[3:])


def program(n: int, rng: np.random.Generator, found: dict[str, Any]) -> Program:
    """Two prompts with draws behind a context, then scores behind short, long and known prefixes."""

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, VOCABULARY, count).tolist())

    prompts = [
        SampleRequest(ids(n % 7 + 3), tuple(range(9 * n, 9 * n + 4)), (2, n % 7 + 2)),
        SampleRequest(ids(2), (n,)),
    ]
    prompts.append(SampleRequest(ids(4), (), (1, 4)))
    sampled = yield Sampling(tuple(prompts), how(8, 1.3))
    prefixes = [ids(2), ids(20), prompts[0].prompt]
    scoring = tuple(ScoreRequest(prefix, (ids(5), ids(0), ids(9))) for prefix in prefixes)
    scores = yield Scoring(scoring, (1.0, 1.3))
    found |= {"prompts": prompts, "sampled": sampled, "scoring": scoring, "scores": scores}
    return n


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limits", [Limits(), Limits(sequences=6, tokens=200, pass_tokens=7, logits=4 * VOCABULARY)])
def test_what_stands_behind_a_shared_context_equals_a_plain_forward_pass(kind: str, limits: Limits) -> None:
    model, rng = tiny(kind), np.random.default_rng(1)
    contexts = [tuple(rng.integers(0, VOCABULARY, n).tolist()) for n in (*range(12), 0, 30)]
    stems = [(), tuple(rng.integers(0, VOCABULARY, 19).tolist()), tuple(rng.integers(0, VOCABULARY, 5).tolist())]
    found: list[dict[str, Any]] = [{} for _ in contexts]
    jobs = [Job(c, program(n, np.random.default_rng([2, n]), found[n]), stems[n % 3]) for n, c in enumerate(contexts)]
    wholes = [job.whole for job in jobs]
    assert in_order(TorchEngine(tiny(kind), limits), jobs) == list(range(len(jobs)))
    for c, f in zip(wholes, found, strict=True):
        for r, sampled in zip(f["prompts"], f["sampled"], strict=True):
            start, stop = r.scored
            assert sampled.scores == pytest.approx(plain(model, c + r.prompt[:start], r.prompt[start:stop]), abs=1e-4)
            assert len(sampled.draws) == len(r.seeds)
            for d in sampled.draws:
                ids = (*d.ids, CONTROLS.end) if d.finished else d.ids
                assert d.logprobs == pytest.approx(plain(model, c + r.prompt, ids, 1.3), abs=1e-4)
        for r, scores in zip(f["scoring"], f["scores"], strict=True):
            for continuation, values in zip(r.continuations, scores, strict=True):
                for t, row in zip((1.0, 1.3), values, strict=True):
                    assert row == pytest.approx(plain(model, c + r.prefix, continuation, t), abs=1e-4)


def test_out_of_memory_halves_the_limits_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [SampleRequest(r.prefix, tuple(range(7 * n, 7 * n + 7))) for n, r in enumerate(requests())]
    expected = sample(TorchEngine(tiny("llama")), asked, how(12))
    grow = Passes.grow

    def scarce(self: Passes, lanes: Any, rows: Any, draws: Any) -> Any:
        if len(draws) > 20:
            raise torch.OutOfMemoryError("pretended")
        return grow(self, lanes, rows, draws)

    monkeypatch.setattr(Passes, "grow", scarce)
    engine = TorchEngine(tiny("llama"), Limits(sequences=64))
    found = sample(engine, asked, how(12))
    assert [[d.ids for d in row] for row in found] == [[d.ids for d in row] for row in expected]
    assert engine.limits.sequences == 16
    assert capsys.readouterr().err.count("out of memory") == 2
    monkeypatch.setattr(Passes, "grow", lambda *_: scarce(*_[:3], [None] * 99))
    with pytest.raises(UserError, match="not enough memory for a single sequence"):
        sample(engine, asked, how(12))


def test_a_pass_too_long_for_memory_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no fewer sequences can be in hand than one, their passes still can be shorter."""
    asked = [SampleRequest((1, 2) * 200, (0, 1))]
    expected = sample(TorchEngine(tiny("llama")), asked, how(3))
    encode = Passes.encode

    def scarce(self: Passes, items: Any, *rest: Any) -> Any:
        if sum(len(item.ids) for item in items) > 128:
            raise torch.OutOfMemoryError("pretended")
        return encode(self, items, *rest)

    monkeypatch.setattr(Passes, "encode", scarce)
    found = sample(TorchEngine(tiny("llama"), Limits(sequences=1)), asked, how(3))
    assert [[d.ids for d in row] for row in found] == [[d.ids for d in row] for row in expected]


def test_other_errors_are_not_taken_for_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Passes, "encode", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        sample(TorchEngine(tiny("llama")), [SampleRequest((1, 2), (0,))], how(3))


def test_a_stem_is_encoded_once() -> None:
    stem, engine, encoded = tuple(range(16)), TorchEngine(tiny("llama")), []
    encode = engine.passes.encode
    engine.passes.encode = lambda items: (encoded.extend(i.ids for i in items), encode(items))[1]  # pyright: ignore

    def draw(n: int) -> Program:
        return (yield Sampling((SampleRequest((n,), (n,)),), how(3)))

    in_order(engine, [Job((1, 2), draw(n), stem) for n in range(5)])
    assert encoded.count(stem) == 1


def test_a_draw_ends_where_who_asked_wants_no_more() -> None:
    def halt(ids: Any) -> bool:
        return len(ids) > 1 and ids[-1] == ids[-2]

    asked = [SampleRequest((1, 2, 3), tuple(range(60)))]
    free, cut = (sample(TorchEngine(tiny("llama")), asked, How(9, -1, frozenset(), halt=h))[0] for h in (None, halt))
    assert any(d.finish == "halt" for d in cut)
    for whole, draw in zip(free, cut, strict=True):
        stops = [n for n in range(1, len(whole.ids) + 1) if halt(whole.ids[:n])]
        assert draw.ids == (whole.ids[: stops[0]] if stops else whole.ids)
        assert draw.finish == ("halt" if stops else "length")
        assert len(draw.logprobs) == len(draw.ids)


def test_top_p_draws_from_the_likeliest_tokens_and_says_how_likely_they_were() -> None:
    model, prompt = tiny("llama"), (1, 2, 3)
    asked = [SampleRequest(prompt, tuple(range(500)))]
    draws = sample(TorchEngine(tiny("llama")), asked, How(1, -1, frozenset(), 0.8, 0.7))[0]
    shares = np.exp([plain(model, prompt, (i,), 0.8)[0] for i in range(VOCABULARY)])
    order = np.argsort(-shares)
    kept = order[: int(np.searchsorted(np.cumsum(shares[order]), 0.7)) + 1]
    assert 1 < len(kept) < VOCABULARY and {d.ids[0] for d in draws} == set(kept.tolist())
    for d in draws:
        assert d.logprobs[0] == pytest.approx(np.log(shares[d.ids[0]] / shares[kept].sum()), abs=1e-4)
        assert d.model_logprobs[0] == pytest.approx(plain(model, prompt, d.ids)[0], abs=1e-4)


@given(st.integers(1, 700), st.integers(0, 2**32), st.floats(0, 1, exclude_max=True))
def test_pick_is_the_inverse_of_the_distribution(size: int, seed: int, u: float) -> None:
    shares = np.random.default_rng(seed).dirichlet(np.full(size, 0.05)).astype(np.float32)
    shares[shares < 1e-30] = 0
    token = int(pick(torch.from_numpy(shares)[None], torch.tensor([u], dtype=torch.float64))[0])
    assert shares[token] > 0
    below, total = shares[:token].sum(dtype=np.float64), shares.sum(dtype=np.float64)
    assert below <= u * total + 1e-9
    assert below + shares[token] >= u * total - 1e-9


MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
REFUSED = {
    "bloom": {},  # no other attention may take its place
    "nemotron": {},  # does not tell its attention what it is to see
    "diffllama": {},  # attends twice a layer
    "phimoe": {**MOE, "sliding_window": 6},  # its window is in its mask alone
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_whose_attention_cannot_be_replaced_is_refused(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=23, intermediate_size=16, **sizes, **REFUSED[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(UserError, match=f"{kind} does not let its attention be replaced"):
        TorchEngine(model)
    assert model.config._attn_implementation == "eager"  # and it is what it was


def test_spans_are_let_go_with_the_job_that_needed_them() -> None:
    """Not only when the collector of cycles comes: memory must not grow with the number of jobs."""
    engine = TorchEngine(tiny("llama"), Limits(sequences=4, pass_tokens=8))
    rng = np.random.default_rng(0)

    def program() -> Any:
        drawn = yield Sampling((SampleRequest(tuple(rng.integers(0, 17, 11).tolist()), (1, 2, 3)),), how(5))
        continuations = tuple(d.ids for d in drawn[0].draws)
        return (yield Scoring((ScoreRequest(tuple(rng.integers(0, 17, 20).tolist()), continuations),)))

    gc.collect()
    gc.disable()
    try:
        jobs = [Job(tuple(rng.integers(0, 17, 13).tolist()), program()) for _ in range(12)]
        in_order(engine, jobs)
        del jobs
        assert not [o for o in gc.get_objects() if isinstance(o, Span)]
    finally:
        gc.enable()


def chooses_frequencies(kind: str) -> Any:
    """A model that does so beyond 16 positions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": None}  # fmt: skip
    of_kind: dict[str, dict[str, Any]] = {
        "dynamic": {"model_type": "llama", "max_position_embeddings": 16,
                    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
        "longrope": {"model_type": "phi3", "max_position_embeddings": 64, "original_max_position_embeddings": 16,
                     "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                                         "long_factor": [8.0] * 4}},
        "by layer": {"model_type": "gemma3_text", "max_position_embeddings": 16, "head_dim": 8, "sliding_window": 8,
                     "layer_types": ["full_attention", "sliding_attention"],
                     "rope_parameters": {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
                                         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes, **of_kind[kind]))


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "by layer"])
def test_no_sequence_changes_the_rotary_frequencies_of_others(kind: str, tmp_path: Path) -> None:
    model, engine = chooses_frequencies(kind), TorchEngine(chooses_frequencies(kind))
    short, whole, long = (Scoring((ScoreRequest((1, 2), ((3,) * n,)),)) for n in (6, 14, 16))
    for beside in ([short], [short, whole]):
        scores = ask(engine, beside)[0][0][0]
        expected = torch.log_softmax(model(torch.tensor([[1, 2, *[3] * 6]])).logits[0].double(), -1)[1:-1, 3]
        assert scores[0] == pytest.approx(expected.tolist(), abs=1e-5)
    draws = SampleRequest((1,) * 10, (7,))
    for request in (long, Sampling((draws,), How(10, VOCABULARY, frozenset()))):
        with pytest.raises(UserError, match="beyond 16 this model chooses its rotary frequencies"):
            ask(engine, [short, request])
    model.save_pretrained(tmp_path / "model")
    for most in (16, 17):
        told = contextlib.nullcontext() if most == 16 else pytest.raises(UserError, match="sample.max_tokens of 17")
        with (
            told,
            loaded_engine(resolve({"sample": {"max_tokens": most, "max_thought_tokens": 4}}), tmp_path / "model"),
        ):
            pass
    with loaded_engine(resolve({}), tmp_path / "model", longest=64):  # of a task, whose prompts may be short
        pass
