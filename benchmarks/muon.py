"""Our Muon against torch.optim.Muon, one optimizer step of the demo's model on one core.

    python benchmarks/muon.py [--json FILE]

Interleaved repeats in one process; the machine's fp32 matrix product is measured beside them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from latent_thoughts.optim import Muon

SHAPES = {2: [(64, 64)] * 8 + [(128, 64)] * 4 + [(64, 128)] * 2, 12: [(64, 64)] * 48 + [(256, 64)] * 36}
REPEATS, STEPS = 7, 10


def parameters(layers: int) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES[layers]]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    for _ in range(STEPS):
        work()
    return (time.perf_counter() - began) / STEPS * 1e3


def matmul_gflops() -> float:
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / milliseconds(lambda: a @ a) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, ratios = [], {}
    for layers in SHAPES:
        systems = {
            "ours": Muon(parameters(layers), lr=0.02, weight_decay=0.1).step,
            "torch": torch.optim.Muon(parameters(layers), lr=0.02, weight_decay=0.1).step,
        }
        times: dict[str, list[float]] = {name: [] for name in systems}
        for _ in range(REPEATS):
            for name, step in systems.items():
                times[name].append(milliseconds(step))
        for name, values in times.items():
            median = statistics.median(values)
            rows.append({"system": name, "metric": f"step of {layers} layers", "unit": "ms",
                         "median": median, "min": min(values), "max": max(values)})  # fmt: skip
            print(f"{layers:3} layers  {name:6} {median:7.2f} ms  (min {min(values):.2f}, max {max(values):.2f})")
        ratios[f"torch/ours {layers} layers"] = statistics.median(times["torch"]) / statistics.median(times["ours"])
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    machine = {"python": platform.python_version(), "torch": torch.__version__, "matmul_gflops_fp32": matmul_gflops()}
    print(f"matrix product, fp32, one core: {machine['matmul_gflops_fp32']:.0f} GFLOP/s")
    if arguments.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        result = {"name": "muon", "commit": commit, "machine": machine, "rows": rows, "ratios": ratios}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
