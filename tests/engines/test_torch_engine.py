"""The torch engine against plain forward passes of transformers, on real (tiny, random) models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from latent_thoughts.config import Engine as Limits
from latent_thoughts.engines.base import How, SampleRequest, Sampling, ScoreRequest, Scoring, ask
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.types import Draw
from tests.conftest import CONTROLS, VOCABULARY, tiny

KINDS = ["llama", "gpt2", "qwen3", "gemma3_text"]


def how(max_tokens: int, temperature: float = 1.0) -> How:
    return How(max_tokens, CONTROLS.end, CONTROLS.never_in_thoughts, temperature)


def sample(engine: TorchEngine, asked: list[SampleRequest], how: How) -> list[tuple[Draw, ...]]:
    return [answer[0].draws for answer in ask(engine, [Sampling((r,), how) for r in asked])]


def score(engine: TorchEngine, asked: list[ScoreRequest], temperatures: tuple[float, ...]) -> list[list[np.ndarray]]:
    return [answer[0] for answer in ask(engine, [Scoring((r,), temperatures) for r in asked])]


def plain(model: Any, prefix: tuple[int, ...], continuation: tuple[int, ...], temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities from one forward pass over the whole sequence."""
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
