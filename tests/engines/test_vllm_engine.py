"""vLLM as an engine, against plain forward passes: real vLLM on a tiny random model (`make test-vllm`)."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latent_thoughts import model as models
from latent_thoughts.config import Model, Sample, resolve
from latent_thoughts.data import format
from latent_thoughts.em import em
from latent_thoughts.engines.base import How, Job, SampleRequest, Sampling, ScoreRequest, Scoring, ask, in_order
from latent_thoughts.engines.joint import Seeds, Task, infer
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.store import read_manifest
from latent_thoughts.types import Chunk, Draw, UserError
from tests.conftest import CONTROLS, VOCABULARY

pytestmark = pytest.mark.vllm
CLOSE = 2e-3  # nats a token, fp32 in both, other kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose head width vLLM's CPU attention has a kernel for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=17, eos_token_id=18, max_position_embeddings=256, **sizes)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "norm" not in name:
                parameter.mul_(4)
    path = tmp_path_factory.mktemp("vllm") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Any:
    from latent_thoughts.engines.vllm_engine import VllmEngine

    # so few tokens at a time that prompts would be prefilled in parts, if that were allowed
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 130, "seed": 0, "gpu_memory_utilization": 0.2}
    with contextlib.closing(VllmEngine(folder, "float32", max_tokens=128, **limits)) as engine:
        yield engine


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return models.load(folder, Model(dtype="float32")).eval()


def ids(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    return tuple(rng.integers(0, VOCABULARY - 6, count).tolist())


def plain(model: Any, prefix: tuple[int, ...], continuation: tuple[int, ...], temperature: float = 1.0) -> np.ndarray:
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([[*prefix, *continuation]])).logits[0].double() / temperature, -1)
    return np.array([float(rows[len(prefix) + t - 1, i]) for t, i in enumerate(continuation)])


def how(temperature: float = 1.0) -> How:
    return How(12, CONTROLS.end, CONTROLS.never_in_thoughts, temperature)


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_sampled_logprobs_are_those_of_the_sampled_distribution(engine: Any, model: Any, temperature: float) -> None:
    rng = np.random.default_rng(1)
    asked = [SampleRequest(ids(rng, n), tuple(range(10 * n, 10 * n + 6)), (1, n)) for n in range(2, 40, 3)]
    drawn = ask(engine, [Sampling((r,), how(temperature)) for r in asked])
    finishes, distinct = set(), set()
    for request, (sampled,) in zip(asked, drawn, strict=True):
        assert sampled.scores == pytest.approx(plain(model, request.prompt[:1], request.prompt[1:]), abs=CLOSE)
        for draw in sampled.draws:
            finishes.add(draw.finish)
            distinct.add(draw.ids)
            scored = (*draw.ids, CONTROLS.end) if draw.finished else draw.ids
            assert draw.logprobs == pytest.approx(plain(model, request.prompt, scored, temperature), abs=CLOSE)
            assert len(draw.ids) <= 12 and not {CONTROLS.end, *CONTROLS.never_in_thoughts} & set(draw.ids)
    assert finishes == {"end", "length", "control"} and len(distinct) > 30


def test_the_same_seeds_give_the_same_draws(engine: Any) -> None:
    asked = [Sampling((SampleRequest((1, 2, 3, n), (5, 6, 7)),), how()) for n in range(8)]

    def drawn(requests: list[Sampling]) -> list[list[tuple[int, ...]]]:
        return [[d.ids for d in answer[0].draws] for answer in ask(engine, requests)]

    assert drawn(asked) == drawn(asked[::-1])[::-1]


def test_scores_equal_a_plain_forward_pass_in_any_order(engine: Any, model: Any) -> None:
    """Also behind prompts that the prefix cache holds: its positions carry no log-probabilities of their own."""
    rng = np.random.default_rng(2)
    shared = ids(rng, 64)
    asked = [ScoreRequest(shared + ids(rng, n), (ids(rng, 5), ids(rng, 0), ids(rng, 20))) for n in range(1, 9)]
    asked.append(ScoreRequest(shared[:1], (shared[1:],)))
    ask(engine, [Sampling((SampleRequest(r.prefix + c, (1,)),), how()) for r in asked for c in r.continuations])
    for order in (slice(None), slice(None, None, -1), slice(None)):
        found = ask(engine, [Scoring((r,)) for r in asked[order]])[order]
        for request, (row,) in zip(asked, found, strict=True):
            for continuation, scores in zip(request.continuations, row, strict=True):
                expected = plain(model, request.prefix, continuation)
                assert scores.shape == (1, len(continuation))
                assert scores[0] == pytest.approx(expected, abs=CLOSE)


def tasks() -> list[Task]:
    rng = np.random.default_rng(3)
    return [Task(Chunk(f"d{n}", 1, 0, "", ids(rng, 4 + n % 5)), ids(rng, 1 + 3 * n)) for n in range(12)]


@pytest.mark.parametrize("scorer", ["vllm", "torch"])
def test_the_e_step_agrees_with_the_torch_engine(engine: Any, model: Any, scorer: str) -> None:
    """The same draws, scored by either, have the same weights; the gap between drawing and scoring is told."""
    config = Sample(preset="default", k=6, temperature=(1.0, 1.0), max_thought_tokens=12, max_tokens=128)
    engine.scorer = TorchEngine(copy.deepcopy(model)) if scorer == "torch" else None
    found = infer(engine, tasks(), CONTROLS, config, Seeds(0, 1), 1.0)
    engine.scorer = None
    finished = 0
    for posterior, task in zip(found, tasks(), strict=True):
        thoughtless = format.thoughtless_prompt(CONTROLS, task.context)
        prior = format.prior_prompt(CONTROLS, task.context)
        backward = format.posterior_prompt(CONTROLS, task.context, task.chunk.ids)
        assert posterior.raw_logprob == pytest.approx(plain(model, thoughtless, task.chunk.ids).sum(), abs=20 * CLOSE)
        assert posterior.gap is None or posterior.gap < 20 * CLOSE
        for draw in posterior.draws:
            if not draw.draw.finished:
                continue
            finished += 1
            z = (*draw.draw.ids, CONTROLS.end)
            assert draw.log_prior == pytest.approx(plain(model, prior, z).sum(), abs=20 * CLOSE)
            assert draw.log_posterior == pytest.approx(plain(model, backward, z).sum(), abs=20 * CLOSE)
            assert draw.log_x == pytest.approx(plain(model, prior + z, task.chunk.ids).sum(), abs=20 * CLOSE)
    assert finished > 10


def test_tempered_draws_need_a_scorer(engine: Any, model: Any) -> None:
    config = Sample(preset="default", k=4, max_thought_tokens=12, max_tokens=128)
    with pytest.raises(UserError, match=r"engine\.scorer"):
        infer(engine, tasks(), CONTROLS, config, Seeds(0, 1), 2.0)


def test_jobs_of_several_steps_run_to_their_end(engine: Any) -> None:
    def program(n: int) -> Any:
        (first,) = yield Sampling((SampleRequest((n,), (n,)),), how())
        thought: Draw = first.draws[0]
        if n % 2:
            yield Scoring((ScoreRequest((1,), (thought.ids,)),))
        return n

    assert in_order(engine, [Job((3, n), program(n)) for n in range(6)]) == list(range(6))


def test_a_model_that_cannot_branch_goes_through_an_iteration(small: dict[str, Any], tmp_path: Path) -> None:
    """BLOOM's attention cannot be replaced: the torch engine refuses it, vLLM samples and scores."""
    small["model"]["base"] = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 2}
    small["sample"] |= {"preset": "paper"}
    small["engine"] = {"kind": "vllm", "scorer": "vllm", "sequences": 16, "vllm_memory": 0.2}
    small["em"] = {"iterations": 1, "baselines": []}
    recipe = resolve(small)
    em(recipe, tmp_path)
    found = read_manifest(tmp_path / "iter_01" / "sample").counts
    assert found["draws"] == 160 and found["accepted"] > 0
    assert read_manifest(tmp_path / "iter_01" / "train").counts["thought_tokens"] > 0
    trained = models.load(tmp_path / "iter_01" / "train" / "model", recipe.model)
    with pytest.raises(UserError, match="does not let its attention be replaced"):
        TorchEngine(trained, recipe.engine)
