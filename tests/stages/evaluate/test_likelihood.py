"""The bound on a model whose thoughts can all be enumerated; figures of likelihood from score rows made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from latent_thoughts.config import resolve
from latent_thoughts.data.tokenizer import Controls
from latent_thoughts.engines.toy import ToyEngine
from latent_thoughts.stages.evaluate.likelihood import Scorer, hashes, summary
from latent_thoughts.types import Chunk, ThoughtDocument

CONTROLS = Controls(start=3, end=4, prior=5, posterior=6, bos=7, eos=8)  # behind three words
X = (2, 0, 1)


def documents(count: int) -> list[ThoughtDocument]:
    return [
        ThoughtDocument(f"d{n}", (Chunk(f"d{n}", 0, 0, "10", (1, 0)), Chunk(f"d{n}", 1, 2, "201", X)), ((), ()),
                        (False, True), "raw")
        for n in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize(("ends", "seldom"), [(-2.0, True), (0.0, False), (2.0, False)])
def test_the_bound_stays_below_the_likelihood_however_seldom_a_thought_ends(ends: float, seldom: bool) -> None:
    """In the mean over many chunks, none of which is left out: over those with a thought that ended it may not."""
    engine, most = ToyEngine(9, seed=3, scale=1.0), 2
    engine.logits[..., [*CONTROLS.never_in_thoughts]] -= 3
    engine.logits[..., CONTROLS.end] += ends
    engine.logits[CONTROLS.start, CONTROLS.prior, CONTROLS.end] -= 4  # the empty thought is no common one
    thoughts = engine.thoughts(most, CONTROLS.end, CONTROLS.never_in_thoughts)
    prefix = (CONTROLS.bos, 1, 0, CONTROLS.start, CONTROLS.prior)
    likelihood = np.log(sum(np.exp(engine.score_one(prefix, (*z, CONTROLS.end, *X)).sum()) for z in thoughts))
    recipe = resolve({"sample": {"max_thought_tokens": most}, "evaluate": {"bound": [1, 2, 4]}})
    rows = Scorer(recipe, engine, CONTROLS, thinks=True).rows(documents(1000))
    by_k = {k: np.array([dict(r["bounds"])[k] for r in rows]) for k in (1, 2, 4)}
    for k, values in by_k.items():
        assert values.mean() + 3 * values.std() / np.sqrt(len(values)) < likelihood, k
    assert by_k[1].mean() < by_k[2].mean() < by_k[4].mean()
    never = np.array([dict(r["finished"])[4] for r in rows]) == 0
    assert summary(rows)["bound_4_unfinished"] == pytest.approx(never.mean())
    assert (by_k[4][~never].mean() > likelihood) == seldom == (never.mean() > 0.5)
    empty = engine.score_one(prefix, (CONTROLS.end, *X)).sum()
    assert by_k[4][never] == pytest.approx(np.full(never.sum(), empty))


def test_a_thought_that_ends_at_once_has_ended() -> None:
    """A model that says little is not one that finds no end."""
    engine = ToyEngine(9, seed=3, scale=1.0)
    for mark in (CONTROLS.prior, CONTROLS.posterior):
        engine.logits[CONTROLS.start, mark, CONTROLS.end] += 40
    recipe = resolve({"sample": {"max_thought_tokens": 2}, "evaluate": {"bound": [1, 4]}})
    found = summary(Scorer(recipe, engine, CONTROLS, thinks=True).rows(documents(5)))
    assert found["bound_1_unfinished"] == found["bound_4_unfinished"] == 0


def test_chunks_are_known_by_their_text_and_what_stands_before_it() -> None:
    (first,) = documents(1)
    other = ThoughtDocument("other", (Chunk("other", 0, 0, "10", (9,)), *first.chunks[1:]), ((), ()), (False, True), "")
    assert hashes(other) == hashes(first)  # of another tokenizer
    changed = ThoughtDocument("d0", (Chunk("d0", 0, 0, "11", (1, 1)), *first.chunks[1:]), ((), ()), (False, True), "")
    assert not set(hashes(changed)) & set(hashes(first))


def row(
    document: str, index: int, place: float, nll: float, bounds: dict[int, float], size: int = 10
) -> dict[str, Any]:
    return {
        "doc_id": document, "chunk_index": index, "place": place, "tokens": size, "characters": 4 * size,
        "bytes": 5 * size, "log_raw": -2 * nll, "log_thoughtless": -nll, "bounds": list(bounds.items()),
        "finished": [(1, float(bounds[1] > -30)), (4, 1.0)],
    }  # fmt: skip


ROWS = [
    row("a", 0, 0.0, 10.0, {1: -20.0, 4: -9.0}),
    row("a", 1, 0.5, 10.0, {1: -40.0, 4: -5.0}),
    row("b", 0, 0.0, 20.0, {1: -22.0, 4: -21.0}, 20),
]


def test_every_unit_and_the_gain() -> None:
    found = summary(ROWS)
    assert (found["documents"], found["chunks"]) == (2, 3)
    assert found["nll_per_token"] == pytest.approx(1) and found["nll_raw_per_token"] == pytest.approx(2)
    assert found["nll_per_character"] == pytest.approx(1 / 4)
    assert found["nll_bits_per_byte"] == pytest.approx(1 / 5 / np.log(2))
    assert found["bound_4_per_token"] == pytest.approx(-35 / 40)
    assert found["bound_4_bits_per_byte"] == pytest.approx(35 / 200 / np.log(2))
    assert found["bound_1_unfinished"] == pytest.approx(1 / 3) and found["bound_4_unfinished"] == 0
    assert found["bound_1_per_token"] == pytest.approx(-82 / 40)
    assert found["gain_4_per_token"] == pytest.approx((1 + 5 - 1) / 40)
    assert found["gain_4_positive"] == pytest.approx(2 / 3)
    first, second = found["gain_4_by_place"]
    assert (first["from"], first["chunks"], first["gain_per_token"]) == (0.0, 2, pytest.approx(0))
    assert (second["from"], second["chunks"], second["gain_per_token"]) == (0.5, 1, pytest.approx(0.5))


def test_a_raw_model_stands_on_the_same_axis() -> None:
    rows = [{**r, "log_thoughtless": None, "bounds": [(k, r["log_raw"]) for k in (1, 4)]} for r in ROWS]
    found = summary(rows)
    assert found["bound_1_per_token"] == found["bound_4_per_token"] == -found["nll_per_token"]
    assert found["nll_per_token"] == found["nll_raw_per_token"] and found["gain_4_per_token"] == 0
