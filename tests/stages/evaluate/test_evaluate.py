"""Likelihood, bound and answers against independent computations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from latent_thoughts import model as models
from latent_thoughts.config import resolve
from latent_thoughts.data import records
from latent_thoughts.em import Run
from latent_thoughts.stages.evaluate import evaluate, statistics
from latent_thoughts.types import UserError


@pytest.fixture
def warm(tmp_path: Path, small: dict[str, Any]) -> Run:
    run = Run(resolve(small), tmp_path / "run")
    run.prepare()
    run.synthesize()
    run.train_warm_start()
    return run


def raw_nll(run: Run, between: list[int]) -> float:
    """NLL per token of the answers by a plain forward pass over BOS question `between` answer."""
    model = models.load(run.warm_start / "train" / "model", run.recipe.model).eval()
    _, controls = models.load_tokenizer(run.warm_start / "train" / "model")
    total = tokens = 0.0
    for d in records.documents(run.prepared, "held_out")[:12]:
        x = list(d.chunks[1].ids)
        ids = [controls.bos, *d.chunks[0].ids, *between, *x]
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([ids]).to(model.device)).logits[0], -1)
        total -= sum(float(rows[len(ids) - len(x) + n - 1, i]) for n, i in enumerate(x))
        tokens += len(x)
    return total / tokens


def test_nll_equals_a_plain_forward_pass(warm: Run) -> None:
    _, controls = models.load_tokenizer(warm.warm_start / "train" / "model")
    thinking = warm.evaluate(warm.warm_start).counts
    assert thinking["nll_per_token"] == pytest.approx(raw_nll(warm, [controls.start, controls.end]), abs=1e-5)
    raw = warm.evaluate(warm.warm_start, thinks=False).counts
    assert raw["nll_per_token"] == pytest.approx(raw_nll(warm, []), abs=1e-5)
    assert raw["bound_4_per_token"] == -raw["nll_per_token"]


def test_text_is_not_scored_anew_for_what_it_does_not_depend_on(warm: Run) -> None:
    key = warm.evaluate(warm.warm_start).key
    tuning = "evaluate.fine_tune={task: gsm8k, data: nowhere}"
    for setting, same in (("evaluate.thoughts_kept=9", True), (tuning, True), ("evaluate.bound=[1]", False)):
        recipe = resolve(warm.recipe.model_dump(), [setting])
        folders = (warm.warm_start / "train", warm.prepared, warm.warm_start / "evaluate")
        assert (evaluate(recipe, *folders, thinks=True).key == key) == same, setting


def test_more_draws_do_not_lower_the_bound(warm: Run) -> None:
    counts = warm.evaluate(warm.warm_start).counts
    assert counts["bound_1_per_token"] < counts["bound_4_per_token"]
    assert 0 <= counts["bound_4_unfinished"] <= counts["bound_1_unfinished"] < 1


def test_answers_are_graded_by_the_pattern(warm: Run) -> None:
    counts = warm.evaluate(warm.warm_start).counts
    rows = pq.read_table(warm.warm_start / "evaluate" / "answers.parquet").to_pylist()
    assert counts["accuracy_n"] == len(rows) == 12
    assert counts["accuracy"] == np.mean([r["answer"] == r["gold"] for r in rows])
    known = [r["right"] for r in rows if r["known"]]
    assert counts["accuracy_known"] == (np.mean(known) if known else None)
    golds = {d.id: d.chunks[1].text for d in records.documents(warm.prepared, "held_out")}
    assert all(f"ends in {r['gold']} ." in golds[r["doc_id"]] for r in rows)


def test_an_answer_pattern_that_never_matches_is_named(warm: Run) -> None:
    recipe = resolve(warm.recipe.model_dump(), ["evaluate.answer='answer: (.*)'"])
    with pytest.raises(UserError, match="evaluate.answer does not match"):
        Run(recipe, warm.folder).evaluate(warm.warm_start)


def test_ratio_and_its_error_against_a_bootstrap() -> None:
    rng = np.random.default_rng(0)
    sizes, groups = rng.integers(1, 20, 300).astype(float), rng.integers(0, 100, 300)
    values = sizes * rng.normal(2, 0.5, 300) + rng.normal(0, 3, 100)[groups]
    mean, error = statistics.ratio(values, sizes, groups)
    assert mean is not None and error is not None
    assert mean == pytest.approx(values.sum() / sizes.sum())
    by_group = [(values[groups == g].sum(), sizes[groups == g].sum()) for g in range(100) if (groups == g).any()]
    table = np.array(by_group)
    draws = [table[rng.integers(0, len(table), len(table))].sum(0) for _ in range(3000)]
    assert error == pytest.approx(np.std([v / s for v, s in draws]), rel=0.1)


def test_a_model_that_hardly_ends_a_thought_has_a_bound(warm: Run) -> None:
    """With room for one token hardly a thought ends: no chunk is left out, and how many have the empty one is said."""
    recipe = resolve(warm.recipe.model_dump(), ["sample.max_thought_tokens=1"])
    counts = Run(recipe, warm.folder).evaluate(warm.warm_start).counts
    rows = pq.read_table(warm.warm_start / "evaluate" / "likelihood-00000.parquet").to_pylist()
    assert 0 < counts["bound_4_unfinished"] == np.mean([dict(r["finished"])[4] == 0 for r in rows])
    bounds = [dict(r["bounds"])[4] for r in rows]
    assert counts["bound_4_per_token"] == pytest.approx(sum(bounds) / sum(r["tokens"] for r in rows))
    json.dumps(counts, allow_nan=False)
