"""The M-step: losses, budgets, and resumption to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latent_thoughts import attention
from latent_thoughts.config import Train, resolve
from latent_thoughts.data import format
from latent_thoughts.data.packing import Batches
from latent_thoughts.data.records import DOCUMENTS
from latent_thoughts.em import Run
from latent_thoughts.stages import train as training
from latent_thoughts.stages.train import Trainer
from latent_thoughts.store import Stage
from latent_thoughts.types import Chunk, ThoughtDocument, UserError
from tests.conftest import CONTROLS, tiny


@pytest.fixture
def run(tmp_path: Path, small: dict[str, Any]) -> Run:
    run = Run(resolve(small), tmp_path)
    run.prepare()
    run.synthesize()
    return run


def trainer(run: Run, **settings: Any) -> training.Trainer:
    config = run.recipe.train.model_copy(update=settings)
    sources = [(run.warm_start / "synthesize", "warm_start")]
    return training._trainer(config, run.recipe.model, run.base, sources, 0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "train" / "model" / "model.safetensors")


def test_resumed_training_equals_uninterrupted_training(run: Run, tmp_path: Path) -> None:
    """Interrupted right after a checkpoint and in between: same weights to the bit, same loss curve."""
    run.train_warm_start(tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def stop_at(step: int) -> None:
        original = training.Trainer.step

        def step_or_stop(self: training.Trainer, rows: Any, rate: float) -> Any:
            if self.counters.step == step:
                raise Interrupted
            return original(self, rows, rate)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.Trainer, "step", step_or_stop)
            with pytest.raises(Interrupted):
                run.train_warm_start(tmp_path / "parts")

    stop_at(10)
    stop_at(17)
    run.train_warm_start(tmp_path / "parts")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    def curve(folder: str) -> list[str]:
        lines = (tmp_path / folder / "train" / "metrics.jsonl").read_text().splitlines()
        return [line.split('"lr"')[1] for line in lines]

    assert curve("whole") == curve("parts")
    assert len(curve("whole")) == 6


def test_micro_batches_give_the_gradient_of_the_whole(run: Run) -> None:
    found = []
    for micro in (None, 1, 3):
        t = trainer(run, dropout=0.0, micro_rows=micro, clip=1e9)
        losses = t.step(t.batches.next_batch(), 0.0)
        found.append((losses["loss"], losses["norm"]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_loss_equals_transformers_own_on_documents_alone(run: Run) -> None:
    """The packed batch's mean loss against a forward pass a document, with the labels laid out by hand."""
    t = trainer(run, dropout=0.0, layout="prior")
    rows = t.batches.next_batch()
    measured = t.step(rows, 0.0)["loss"]
    t.model.set_attn_implementation("sdpa")
    total = count = 0.0
    for row in rows:
        for number in range(row.document_ids.max() + 1):
            ids = row.ids[row.document_ids == number]
            keep = row.labels[row.document_ids == number] != format.IGNORE
            with torch.no_grad():
                logprobs = torch.log_softmax(t.model(torch.from_numpy(ids)[None]).logits[0], -1)
            picked = logprobs[np.flatnonzero(keep) - 1, ids[keep]]
            total, count = total - float(picked.sum()), count + keep.sum()
    assert measured == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma3_text", "gemma2", "gpt_oss"])
def test_a_batch_has_the_losses_and_gradients_of_its_documents_alone(kind: str) -> None:
    """Every family's own attention, a document at a time, against one row without padding; and row by row."""
    rng = np.random.default_rng(0)
    sizes = [(5, 3), (9, 4), (1, None), (4, 0), (12, 2), (3, 3), (7, None), (2, 1), (20, 9)]
    documents = []
    for n, (text, thought) in enumerate(sizes):
        x = tuple(rng.integers(0, 17, text).tolist())
        z = () if thought is None else (tuple(rng.integers(0, 17, thought).tolist()),)
        documents.append(ThoughtDocument(str(n), (Chunk(str(n), 0, 0, "", x),), (z,), (True,), "test"))
    config = Train(sequence_length=48, rows=2, layout="posterior", clip=1e9)
    alone, rows = tiny(kind), Batches(documents, CONTROLS, config, 0).next_batch()
    losses = []
    for row in rows:
        for number in range(row.document_ids.max() + 1):
            ids, labels = row.ids[row.document_ids == number], row.labels[row.document_ids == number]
            keep = np.flatnonzero(labels != format.IGNORE)
            logprobs = torch.log_softmax(alone(torch.from_numpy(ids)[None], use_cache=False).logits[0], -1)
            losses.append(-logprobs[keep - 1, ids[keep]])
    expected = torch.cat(losses).mean()
    expected.backward()
    for branching in (True, False):
        model = tiny(kind)
        assert not branching or attention.install(model)
        t = Trainer(model, [], Batches(documents, CONTROLS, config, 0), config, 0, branching=branching)
        assert t.step(rows, 0.0)["loss"] == pytest.approx(float(expected), abs=1e-5)
        for (name, found), same in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert torch.allclose(found.grad, same.grad, atol=1e-5), (branching, name)


@pytest.mark.parametrize(("unit", "amount"), [("steps", 7), ("tokens", 1500), ("raw_tokens", 800), ("epochs", 2.5)])
def test_budgets(run: Run, tmp_path: Path, unit: str, amount: float) -> None:
    config = run.recipe.train.with_budget(unit, amount)
    counts = run._train(config, [(run.warm_start / "synthesize", "warm_start")], tmp_path / unit).counts
    spent = {**counts, "steps": counts["step"], "epochs": counts["epoch"]}[unit]
    assert amount <= spent < amount + {"steps": 1, "tokens": 256, "raw_tokens": 256, "epochs": 1}[unit]


def test_schedules() -> None:
    cosine = Train(schedule="cosine", warmup_steps=10, steps=100)
    assert training.learning_rate(cosine, 4, 0.04) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.04)))
    assert training.learning_rate(cosine, 99, 1.0) == pytest.approx(0)
    wsd = Train(schedule="wsd", decay_share=0.2, steps=100)
    assert [training.learning_rate(wsd, 50, p) for p in (0.5, 0.8, 0.9, 1.0)] == pytest.approx([1, 1, 0.5, 0])
    assert training.learning_rate(Train(schedule="constant"), 3, 0.9) == 1


def test_divergence_is_named(run: Run, tmp_path: Path) -> None:
    config = run.recipe.train.model_copy(update={"optimizer": "adamw", "lr": 1e18, "clip": 1e30})
    with pytest.raises(UserError, match=r"diverged at step \d+.*lower train.lr"):
        run._train(config, [(run.warm_start / "synthesize", "warm_start")], tmp_path / "bad")


def test_missing_input_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not complete .* run that stage first"):
        run._train(run.recipe.train, [(tmp_path / "nowhere", "corpus")], tmp_path / "bad")


def test_muon_takes_hidden_matrices_alone(run: Run) -> None:
    adamw, muon = trainer(run).optimizers
    shapes = [p.shape for group in muon.param_groups for p in group["params"]]
    assert len(shapes) == 7
    assert all(len(s) == 2 and s != t.model.get_input_embeddings().weight.shape for t in [trainer(run)] for s in shapes)
    assert sum(len(g["params"]) for g in adamw.param_groups) == 5  # two embeddings, three norms


def test_dropout_is_active_in_training_alone(run: Run) -> None:
    model = trainer(run, dropout=0.5).model
    model.set_attn_implementation("sdpa")
    ids = torch.arange(8)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_an_e_step_that_accepted_nothing_leaves_the_warm_start(run: Run, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "sample", "sample", "k")
    stage.write("corpus-00000.parquet", [], DOCUMENTS, {})
    stage.close(["corpus-00000.parquet"], {})
    empty = [(tmp_path / "sample", "corpus")]
    config = run.recipe.train.with_budget("steps", 2)
    given = [(run.warm_start / "synthesize", "warm_start")]
    assert run._train(config, given + empty, tmp_path / "some").counts["step"] == 2
    with pytest.raises(UserError, match="the E-step accepted no thought"):
        run._train(config, empty, tmp_path / "none")
