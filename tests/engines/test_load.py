"""Which engine is loaded for what a recipe wants."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from latent_thoughts import machine
from latent_thoughts.config import resolve
from latent_thoughts.engines.base import ScoreRequest, Scoring, ask
from latent_thoughts.engines.load import loaded_engine, loaded_scorer
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.types import UserError
from tests.conftest import tiny

UNTEMPERED = {"sample": {"preset": "paper"}}  # all that vLLM can score


def test_a_model_that_only_scores_needs_no_vllm_where_torch_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    tiny("llama").save_pretrained(tmp_path / "model")
    asked = [Scoring((ScoreRequest((1, 2), ((3, 4),)),))]
    scores = []
    for engine in ({"kind": "torch"}, {"kind": "torch", "scorer": "vllm"}, {"kind": "vllm"}):
        with loaded_scorer(resolve({"engine": engine} | UNTEMPERED), tmp_path / "model") as scorer:
            assert isinstance(scorer, TorchEngine)
            scores.append(ask(scorer, asked)[0][0][0].tolist())
    assert scores[0] == scores[1] == scores[2]
    for wanted in (loaded_engine, loaded_scorer):
        engine = {"kind": "vllm", "scorer": "vllm" if wanted is loaded_scorer else "torch"}
        with (
            pytest.raises(UserError, match="needs vLLM"),
            wanted(resolve({"engine": engine} | UNTEMPERED), tmp_path / "model"),
        ):
            pass


def test_answers_must_fit_a_table_of_positions_too(tmp_path: Path) -> None:
    """An answer may be longer than the chunk it is for: of 128 positions 100 of context and thought leave 28."""
    tiny("gpt2").save_pretrained(tmp_path / "model")
    sample, answered = {"max_tokens": 100, "max_thought_tokens": 40}, {"answer": "(x)", "answer_tokens": 28}
    for evaluate in ({"answer_tokens": 29}, answered):
        with loaded_engine(resolve({"sample": sample, "evaluate": evaluate}), tmp_path / "model"):
            pass
    told = r"sample\.max_tokens \+ evaluate\.answer_tokens = 129 is more than the model's 128 positions: keep to 128"
    recipe = resolve({"sample": sample, "evaluate": answered | {"answer_tokens": 29}})
    with pytest.raises(UserError, match=told), loaded_engine(recipe, tmp_path / "model"):
        pass


@pytest.mark.parametrize(
    ("gpus", "shared", "parallel", "refused"),
    [(0, False, 2, False), (1, False, 1, False), (2, False, 2, False), (1, True, 1, True), (1, False, 2, True)],
)
def test_vllm_is_refused_where_it_has_too_few_gpus(
    gpus: int, shared: bool, parallel: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is loaded, and before vLLM says so in its way."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(machine, "gpu_shared", shared)
    engine = {"kind": "vllm", "scorer": "vllm", "vllm_parallel": parallel}
    recipe = resolve({"engine": engine} | UNTEMPERED)
    told = "lower executor.workers" if refused else "needs vLLM"
    with pytest.raises(UserError, match=told), loaded_engine(recipe, tmp_path):
        pass
