"""The torch engine against plain forward passes of transformers, on real (tiny, random) models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from latent_thoughts.config import Engine as Limits
from latent_thoughts.engines.base import SampleRequest, ScoreRequest
from latent_thoughts.engines.torch_engine import TorchEngine
from tests.conftest import CONTROLS, VOCABULARY, tiny

KINDS = ["llama", "gpt2", "qwen3", "gemma3_text"]
SETTINGS: dict[str, Any] = {"stop": CONTROLS.end, "abort": CONTROLS.never_in_thoughts}


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
    found = TorchEngine(model, Limits(sequences=8)).score(requests(), (1.0, 2.0))
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
    asked = [SampleRequest(r.prefix, tuple(range(10 * n, 10 * n + 5)), 8) for n, r in enumerate(requests())]
    drawn = TorchEngine(model, Limits(sequences=16)).sample(asked, temperature=temperature, **SETTINGS)
    finishes = set()
    for request, row in zip(asked, drawn, strict=True):
        for draw in row:
            finishes.add(draw.finish)
            ids = (*draw.ids, CONTROLS.end) if draw.finished else draw.ids
            assert len(draw.ids) <= 8
            assert draw.logprobs == pytest.approx(plain(model, request.prompt, ids, temperature), abs=1e-4)
            assert not {CONTROLS.end, *CONTROLS.never_in_thoughts} & set(draw.ids)
    assert finishes == {"end", "length", "control"}


def test_a_draw_depends_on_its_prompt_and_seed_alone() -> None:
    model = tiny("llama")
    asked = [SampleRequest(r.prefix, tuple(range(7 * n, 7 * n + 7)), 12) for n, r in enumerate(requests())]
    wide = TorchEngine(model, Limits(sequences=64)).sample(asked, temperature=1.0, **SETTINGS)
    narrow = TorchEngine(model, Limits(sequences=3, tokens=40)).sample(asked[::-1], temperature=1.0, **SETTINGS)[::-1]
    assert [[(d.ids, d.finish) for d in row] for row in wide] == [[(d.ids, d.finish) for d in row] for row in narrow]
    assert len({d.ids for row in wide for d in row}) > 20


def test_frequencies_follow_the_model() -> None:
    from scipy import stats

    model, prompt = tiny("llama"), (1, 2, 3)
    draws = TorchEngine(model).sample([SampleRequest(prompt, tuple(range(4000)), 1)], temperature=1.0, **SETTINGS)[0]
    exact = np.exp([plain(model, prompt, (i,))[0] for i in range(VOCABULARY)])
    plain_ids = [i for i in range(VOCABULARY) if i not in {CONTROLS.end, *CONTROLS.never_in_thoughts}]
    seen = [sum(bool(d.ids) and d.ids[0] == i for d in draws) for i in plain_ids]
    seen += [sum(not d.ids and d.finished for d in draws), sum(not d.ids and not d.finished for d in draws)]
    expected = [exact[i] for i in plain_ids] + [exact[CONTROLS.end], exact[list(CONTROLS.never_in_thoughts)].sum()]
    assert stats.chisquare(seen, np.array(expected) * len(draws)).pvalue > 1e-4


def test_greedy_takes_the_likeliest_token() -> None:
    model, prompt = tiny("llama"), (1, 2, 3)
    draw = TorchEngine(model).sample([SampleRequest(prompt, (0,), 5)], stop=-1, abort=frozenset(), temperature=0)[0][0]
    ids = list(prompt)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert draw.ids == tuple(ids[3:])


def test_batches_keep_within_the_limits() -> None:
    engine = TorchEngine(tiny("llama"), Limits(sequences=10, tokens=120, logits=VOCABULARY * 40))
    rng = np.random.default_rng(0)
    sizes = [tuple(int(v) for v in rng.integers(1, 20, 3)) for _ in range(60)]
    seen: list[tuple[int, int]] = []
    for batch in engine._batches(sizes, logits_a_row=None):
        rows = sum(len(part) for _, part in batch)
        width, new = max(sizes[r][0] for r, _ in batch), max(sizes[r][1] for r, _ in batch)
        seen += [(r, n) for r, part in batch for n in part]
        assert rows <= 10
        assert len(batch) == 1 or (rows * (width + new) <= 120 and rows * new <= 40)
    assert sorted(seen) == [(r, n) for r, (_, _, count) in enumerate(sizes) for n in range(count)]
