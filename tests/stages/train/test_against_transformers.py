"""Whole steps against transformers' own Trainer: the same packed rows, optimizer and clipping give the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from latent_thoughts.config import Train
from latent_thoughts.data.corpus import Corpus
from latent_thoughts.data.packing import Batches, positions
from latent_thoughts.optim import optimizers
from latent_thoughts.parallel import Ranks
from latent_thoughts.stages.train import loader
from latent_thoughts.stages.train.objective import Objective
from latent_thoughts.stages.train.trainer import Trainer
from latent_thoughts.types import Chunk, ThoughtDocument
from tests.conftest import CONTROLS, tiny

STEPS = 30


def corpus() -> Corpus:
    """Counting documents, so that there is something to learn."""
    rng = np.random.default_rng(0)
    made = []
    for n in range(60):
        start, length = int(rng.integers(17)), int(rng.integers(3, 12))
        x = tuple((start + k) % 17 for k in range(length))
        made.append(ThoughtDocument(str(n), (Chunk(str(n), 0, 0, "", x),), (((start,) * 3,),), (True,), "test"))
    return Corpus.of(made)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_losses_are_those_of_the_trainer_on_the_same_rows(kind: str, tmp_path: Path) -> None:
    import transformers

    config = Train(steps=STEPS, sequence_length=48, rows=2, lr=3e-3, weight_decay=0.0, clip=1.0, schedule="constant")
    batches, ours = Batches(corpus(), CONTROLS, config, 0), []
    given = [batch for batch, _ in zip(loader.load(batches, Ranks()), range(STEPS), strict=False)]
    model = tiny(kind).train()
    t = Trainer(Objective(model, 2**20), optimizers(model, config), batches, config, 0)
    for batch in given:
        ours.append(t.step(batch, 1.0)["loss"])

    class Rows(Dataset):  # pyright: ignore[reportMissingTypeArgument]
        def __len__(self) -> int:
            return STEPS

        def __getitem__(self, n: int) -> dict[str, Any]:
            (row,) = given[n].micros
            arrays = {"input_ids": row.ids, "position_ids": positions(row), "labels": row.labels}
            return {name: torch.from_numpy(values)[None] for name, values in arrays.items()}

    theirs = []

    class Recording(transformers.Trainer):
        def training_step(self, *arguments: Any, **more: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **more)
            theirs.append(float(loss))
            return loss

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(Rows())

    reference = tiny(kind)
    reference.set_attn_implementation("sdpa")
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=STEPS, learning_rate=3e-3, lr_scheduler_type="constant", adam_beta2=0.95,
        weight_decay=0.0, max_grad_norm=1.0, per_device_train_batch_size=1, use_cpu=True, save_strategy="no",
        report_to="none", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    Recording(reference, arguments, lambda rows: rows[0], Rows()).train()
    assert len(theirs) == STEPS and ours[-1] < 0.5 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-3)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-3)
