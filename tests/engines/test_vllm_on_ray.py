"""vLLM in an actor of Ray (`make test-vllm`): its draws, weighed by the torch engine, have the weights that it gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from latent_thoughts import model as models
from latent_thoughts import weights
from latent_thoughts.config import resolve
from latent_thoughts.data import format
from latent_thoughts.em import Run
from latent_thoughts.engines.base import ScoreRequest, Scoring, ask
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.stages import sample as sampling
from latent_thoughts.store import read_manifest

pytest.importorskip("ray")
pytestmark = [pytest.mark.vllm, pytest.mark.ray]
CLOSE = 2e-2  # nats a thought of up to ten tokens and its text, fp32 in both, other kernels


@pytest.fixture
def run(tmp_path: Path, small: dict[str, Any]) -> Run:
    """A warm start whose heads vLLM's CPU attention has a kernel for, and an E-step for one actor with vLLM."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    small["model"]["base"] |= sizes
    small["train"]["steps"] = 15
    small["sample"] |= {"preset": "paper", "posterior_share": 0.5}
    small["engine"] = {"kind": "vllm", "scorer": "vllm", "sequences": 16, "vllm_memory": 0.2}
    small["executor"] = {"kind": "ray", "workers": 1}
    made = Run(resolve(small), tmp_path / "run")
    here = Run(made.recipe.model_copy(update={"executor": resolve({}).executor}), made.folder)
    here.prepare()
    here.synthesize()
    here.train_warm_start()
    return made


def test_weights_are_those_of_the_torch_engine(run: Run, tmp_path: Path) -> None:
    import ray

    folder, recipe = tmp_path / "sample", run.recipe
    try:
        sampling.sample(recipe, recipe.sample, run.warm_start / "train", run.prepared, folder, 1)
    finally:
        ray.shutdown()
    names = [name for name in read_manifest(folder).shards if name.startswith("posterior-")]
    rows = [row for name in names for row in pq.read_table(folder / name).to_pylist()]
    assert len(rows) == 40
    _, controls = models.load_tokenizer(run.warm_start / "train" / "model")
    engine = TorchEngine(models.load(run.warm_start / "train" / "model", recipe.model), recipe.engine)
    finished = 0
    for row in rows:
        context, x = tuple(row["context_ids"]), tuple(row["chunk_ids"])
        thoughts = [(*d["ids"], controls.end) if d["finished"] else () for d in row["draws"]]
        prior, posterior = format.prior_prompt(controls, context), format.posterior_prompt(controls, context, x)
        asked = (ScoreRequest(prior, tuple(z + x for z in thoughts)), ScoreRequest(posterior, tuple(thoughts)))
        ((joint, backward),) = ask(engine, [Scoring(asked)])
        log_prior = np.array([s[0][: len(z)].sum() for s, z in zip(joint, thoughts, strict=True)])
        log_q = weights.log_mixture([s[0].sum() for s in backward], log_prior, 0.5)
        log_w = np.array([s[0].sum() for s in joint]) - log_q
        for found, expected, z in zip(row["log_weights"], log_w, thoughts, strict=True):
            finished += bool(z)
            assert found == pytest.approx(expected, abs=CLOSE) if z else found == -np.inf
    assert finished > 20
