"""A GPU's training and drawing, with random weights and documents of random tokens: no data and no model needed.

    python benchmarks/gpu.py [--models 135m,1.1b] [--rows 8,16] [--steps 9] [--sequences 256,1024] [--json FILE]

- train: a step on rows of 2,048 tokens, all in one pass (bfloat16 by autocast, weights in float32, AdamW), plain and
  with `train.compile: blocks`. `share` is 6 x parameters x tokens over the best matrix product measured before.
  Documents are laid out by the training process, between steps. The first three steps are not timed.
- loss: the head and its cross-entropy, forward and backward, at 16,384 positions; and Liger's
  (pip install --no-deps liger-kernel), with hidden states and weights cast to bfloat16.
- draw: an E-step of 135m over chunks of 90 to 150 tokens behind contexts of 300 to 500, eight draws of 160 tokens each,
  twice as many draws as `engine.sequences`, with CUDA graphs and without.

Shapes: SmolLM2-135M's and TinyLlama's, both with 49,156 tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import common

from latent_thoughts.config import Engine, Sample, Train
from latent_thoughts.data.corpus import Corpus
from latent_thoughts.data.packing import Batches
from latent_thoughts.data.tokenizer import Controls
from latent_thoughts.engines.joint import Seeds, Task, infer
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.optim import optimizers
from latent_thoughts.parallel import Ranks
from latent_thoughts.stages.train import lean, loader
from latent_thoughts.stages.train.losses import losses_by_blocks
from latent_thoughts.stages.train.objective import Objective, logits_held
from latent_thoughts.stages.train.trainer import Trainer
from latent_thoughts.types import Chunk, ThoughtDocument

VOCABULARY, LENGTH, DRAWN = 49156, 2048, 160
CONTROLS = Controls(start=49152, end=49153, prior=49154, posterior=49155, bos=1, eos=2)
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "tie_word_embeddings": True},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4},
}  # fmt: skip


def model(name: str, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    ends = {"bos_token_id": None, "eos_token_id": None, "max_position_embeddings": LENGTH}
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, **ends, **SHAPES[name])
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def corpus(rng: np.random.Generator) -> Corpus:
    """As long as GSM8K's questions with their solutions."""
    sizes = np.clip(rng.lognormal(5.2, 0.4, 3000).astype(int), 60, 600)
    texts = [tuple(rng.integers(3, 49000, n).tolist()) for n in sizes]
    return Corpus.of(
        ThoughtDocument(str(n), (Chunk(str(n), 0, 0, "", text),), ((),), (True,), "") for n, text in enumerate(texts)
    )


def train(name: str, rows: int, compiled: bool, steps: int, peak: float) -> dict[str, float]:
    torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    net = model(name, torch.float32).train()
    settings = {"steps": steps, "layout": "raw", "lr": 1e-4, "sequence_length": LENGTH, "rows": rows}
    config = Train.model_validate(settings)
    batches = Batches(corpus(np.random.default_rng(0)), CONTROLS, config, 0)
    if not compiled:
        lean.install(net)
    objective = Objective(net, logits_held(config, net.device))
    if compiled:
        objective.compile_blocks(net.device)
    trainer = Trainer(objective, optimizers(net, config), batches, config, 0, True)
    stream, ends = loader.load(batches, Ranks()), []
    for _ in range(steps):
        before = trainer.counters.tokens
        trainer.step(next(stream), 1.0)
        torch.cuda.synchronize()
        ends.append((time.perf_counter(), trainer.counters.tokens - before))
    took = np.diff([end for end, _ in ends])[2:]
    rate = float(np.mean([tokens for _, tokens in ends[3:]]) / np.median(took))
    tied = SHAPES[name].get("tie_word_embeddings", False)
    weights = sum(p.numel() for p in net.parameters() if p.ndim > 1) - (
        0 if tied else VOCABULARY * net.config.hidden_size
    )
    memory = torch.cuda.max_memory_allocated() / 2**30
    return {"tokens_per_second": rate, "share": 6 * weights * rate / peak, "peak_gpu_gb": memory}


def timed(work: Callable[[], torch.Tensor], times: int = 5) -> float:
    """Milliseconds."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times * 1e3


def losses(width: int) -> dict[str, float]:
    hidden = torch.randn(16384, width, device="cuda").requires_grad_()
    weight = (torch.randn(VOCABULARY, width, device="cuda") * 0.02).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (len(hidden),), device="cuda")

    def ours() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            block = logits_held(Train(), hidden.device) // VOCABULARY
            total, _ = losses_by_blocks(hidden, weight, None, targets, block - block % 32)
        total.backward()
        return total

    found = {"ours_ms": timed(ours)}
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyLoss,
        )
    except ImportError:
        return found
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def liger() -> torch.Tensor:
        total = loss(weight.bfloat16(), hidden.bfloat16(), targets)
        total.backward()
        return total

    return found | {"liger_ms": timed(liger)}


def draw(sequences: int, graphs: bool) -> dict[str, float]:
    rng = np.random.default_rng(0)

    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, 49000, int(rng.integers(least, most))).tolist())

    engine = TorchEngine(model("135m", torch.bfloat16), Engine(sequences=sequences))
    engine.passes.replays = graphs
    tasks = [Task(Chunk(str(n), 1, 0, "", ids(90, 151)), (1, *ids(300, 500))) for n in range(sequences // 4)]
    settings = Sample(preset="paper", k=8, max_thought_tokens=DRAWN, max_tokens=LENGTH)
    infer(engine, tasks[:4], CONTROLS, settings, Seeds(0, 1), 1.0)
    began = time.perf_counter()
    found = infer(engine, tasks, CONTROLS, settings, Seeds(0, 1), 1.0)
    took = time.perf_counter() - began
    return {"tokens_per_second": sum(len(d.draw.ids) for p in found for d in p.draws) / took, "seconds": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="135m,1.1b")
    parser.add_argument("--rows", default="8,16")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--sequences", default="256,1024")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    machine, rows, ratios = common.machine("cuda"), [], {}
    units = {"tokens_per_second": "1/s", "peak_gpu_gb": "GB", "seconds": "s", "ours_ms": "ms", "liger_ms": "ms"}

    def record(system: str, found: dict[str, float]) -> dict[str, float]:
        print(system, found, file=sys.stderr, flush=True)
        rows.extend(common.row(system, name, units.get(name, "share"), [value]) for name, value in found.items())
        return found

    for name in filter(None, a.models.split(",")):
        for n in map(int, a.rows.split(",")):
            peak = machine["matmul_gflops_bfloat16"] * 1e9
            plain, blocks = (record(f"{name} {n} rows {way}", train(name, n, way == "blocks", a.steps, peak))
                             for way in ("plain", "blocks"))  # fmt: skip
            ratios[f"blocks/plain {name} {n} rows"] = blocks["tokens_per_second"] / plain["tokens_per_second"]
        record(f"{name} loss", losses(SHAPES[name]["hidden_size"]))
    for n in map(int, filter(None, a.sequences.split(","))):
        without, graphs = (record(f"draw {n} {way}", draw(n, way == "graphs")) for way in ("without", "graphs"))
        ratios[f"graphs/without {n} sequences"] = graphs["tokens_per_second"] / without["tokens_per_second"]
    common.finish("gpu", machine, rows, ratios, a.json, settings={k: str(v) for k, v in vars(a).items()})


if __name__ == "__main__":
    main()
