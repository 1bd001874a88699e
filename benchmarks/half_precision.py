"""What half precision does to an E-step's weights: the thoughts of a run scored anew, in bfloat16 and in float32.

    python benchmarks/half_precision.py RUN [--iteration 1] [--chunks 100] [--json FILE]

RUN is the folder of an EM run; the draws are those of its E-step, the model the one that drew them. Compared with
float32 throughout are bfloat16 as the engine has it, and the same with a head that gives float32 logits, which are else
rounded to bfloat16. A weight's error is that of log w less its mean over the chunk's draws, which no choice depends on.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from latent_thoughts import model as models
from latent_thoughts import weights
from latent_thoughts.config import Recipe, load_recipe
from latent_thoughts.data import records
from latent_thoughts.engines.base import Job, in_order
from latent_thoughts.engines.joint import Seeds, Step, Task
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.store import read_manifest
from latent_thoughts.types import Chunk, Draw, Posterior


class Head(torch.nn.Module):
    """A head whose logits are float32 where the model is not."""

    def __init__(self, head: Any):
        super().__init__()
        self.weight = head.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden.float(), self.weight.float())


def drawn(row: dict[str, Any]) -> tuple[Task, list[tuple[str, Draw]], float]:
    """A chunk, what was drawn for it, and log p(x | c)."""
    chunk = Chunk(row["doc_id"], row["chunk_index"], 0, "", tuple(row["chunk_ids"]))
    draws = [(d["proposal"], Draw(tuple(d["ids"]), (), "end" if d["finished"] else "length", ())) for d in row["draws"]]
    return Task(chunk, tuple(row["context_ids"])), draws, row["raw_logprob"]


def scored(
    recipe: Recipe, folder: Path, dtype: str, head: bool, chunks: Sequence[Any]
) -> tuple[list[Posterior], float]:
    """Posteriors of the chunks, and the seconds they took."""
    model = models.load(folder, recipe.model, dtype)
    if head:
        model.set_output_embeddings(Head(model.get_output_embeddings()))
    controls, engine = models.load_tokenizer(folder)[1], TorchEngine(model)
    step = Step(controls, recipe.sample, Seeds(recipe.seed, 1), recipe.sample.temperature[0], rescore=True)
    began = time.perf_counter()
    found = in_order(engine, [Job(task.context, step.weigh(task, draws, raw)) for task, draws, raw in chunks])
    return found, time.perf_counter() - began


def differences(found: Sequence[Posterior], exact: Sequence[Posterior]) -> dict[str, np.ndarray]:
    """A number a chunk: of its finished draws the errors' spread, of its choice and its bound what changed."""
    spread, moved, bound = [], [], []
    for ours, theirs in zip(found, exact, strict=True):
        finished = np.isfinite(theirs.log_weights)
        error = ours.log_weights[finished] - theirs.log_weights[finished]
        spread.append(error.std(ddof=1))
        moved.append(np.abs(weights.normalised(ours.log_weights) - weights.normalised(theirs.log_weights)).sum() / 2)
        bound.append(weights.bound(ours.log_weights) - weights.bound(theirs.log_weights))
    return {"error of log w, nats": np.array(spread), "choice moved": np.array(moved), "bound, nats": np.array(bound)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--iteration", type=int, default=1)
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    recipe = load_recipe(options.run / "recipe.yaml")
    stage = options.run / f"iter_{options.iteration:02}" / "sample"
    manifest = read_manifest(stage)
    names = [name for name in manifest.shards if name.startswith("posterior-")]
    rows = itertools.chain.from_iterable(records.read_rows(stage, manifest, name) for name in names)
    several = (drawn(row) for row in rows if sum(d["finished"] for d in row["draws"]) > 1)
    chunks = list(itertools.islice(several, options.chunks))
    folder = options.run / f"iter_{options.iteration - 1:02}" / "train" / "model"
    exact, taken = scored(recipe, folder, "float32", False, chunks)
    table = [common.row("float32", "scoring", "s", [taken])]
    for system, head in (("bfloat16", False), ("float32 head", True)):
        found, taken = scored(recipe, folder, "bfloat16", head, chunks)
        table.append(common.row(system, "scoring", "s", [taken]))
        table += [common.row(system, name, "", values.tolist()) for name, values in differences(found, exact).items()]
    spreads = np.array([p.log_weights[np.isfinite(p.log_weights)].std(ddof=1) for p in exact])
    table.append(common.row("float32", "spread of log w itself, nats", "", spreads.tolist()))
    tokens = {"chunks": len(chunks), "text_tokens": float(np.mean([len(t.chunk.ids) for t, _, _ in chunks]))}
    common.finish("half_precision", common.machine(), table, {}, options.json, **tokens)


if __name__ == "__main__":
    main()
