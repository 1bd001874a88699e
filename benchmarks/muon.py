"""Our Muon against torch.optim.Muon, one optimizer step of the demo's model on one core.

    python benchmarks/muon.py [--json FILE]

Interleaved repeats in one process; the machine's peaks are measured beside them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import common

from latent_thoughts.optim import Muon

SHAPES = {2: [(64, 64)] * 8 + [(128, 64)] * 4 + [(64, 128)] * 2, 12: [(64, 64)] * 48 + [(256, 64)] * 36}
REPEATS = 7


def parameters(layers: int) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES[layers]]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


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
                times[name].append(1e3 * common.seconds(step, at_least=0.2))
        rows += [common.row(name, f"step of {layers} layers", "ms", values) for name, values in times.items()]
        ratios[f"torch/ours {layers} layers"] = statistics.median(times["torch"]) / statistics.median(times["ours"])
    common.finish("muon", common.machine(), rows, ratios, arguments.json)


if __name__ == "__main__":
    main()
