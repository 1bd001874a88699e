"""What benchmarks share: the machine's peaks, medians, and the JSON they leave."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from latent_thoughts.model import matmul_peak


def seconds(work: Callable[[], object], at_least: float = 0.5) -> float:
    """Mean seconds of one call, over calls that take `at_least` together."""
    work()
    began, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < at_least:
        work()
        count += 1
    return passed / count


def machine(device: str = "cpu") -> dict[str, Any]:
    """Peaks measured now: matrix product (GFLOP/s) by dtype, memory copy (GB/s, bytes read and written).

    A product's peak is the best of some sizes: of some, oneDNN has one thread do all the work.
    """

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    found["name"] = torch.cuda.get_device_name() if device == "cuda" else _cpu()
    if isa := os.environ.get("ONEDNN_MAX_CPU_ISA"):  # what oneDNN was told not to go beyond
        found["onednn_max_cpu_isa"] = isa
    for dtype in (torch.float32, torch.bfloat16):
        name = f"matmul_gflops_{str(dtype).removeprefix('torch.')}"
        if device == "cuda":
            found[name] = matmul_peak(torch.device(device), dtype) / 1e9
        else:
            found[name] = max(_matmul_gflops(size, dtype) for size in (512, 1024, 2048, 4096))
    source = torch.empty(2**28 // 4, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        wait()

    found["copy_gb_per_s"] = 2 * source.nbytes / seconds(copy) / 1e9
    return found


def _matmul_gflops(size: int, dtype: torch.dtype) -> float:
    a = torch.randn(size, size).to(dtype)  # a weight is stored transposed, as nn.Linear has it
    return 2 * size**3 / seconds(lambda: torch.nn.functional.linear(a, a)) / 1e9


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def peak_memory() -> float:
    """Of this process, GB. (getrusage's figure would start at the parent's.)"""
    return _status("VmHWM")


def memory() -> float:
    """Of this process now, GB."""
    return _status("VmRSS")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


def row(system: str, metric: str, unit: str, values: Sequence[float]) -> dict[str, Any]:
    median = statistics.median(values)
    return {"system": system, "metric": metric, "unit": unit, "median": median, "min": min(values), "max": max(values)}


def finish(
    name: str,
    machine: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, float],
    path: Path | None,
    **more: Any,
) -> None:
    """Prints the table; writes the JSON that docs/formats.md describes where a path is given."""
    for r in rows:
        spread = f"(min {r['min']:,.4g}, max {r['max']:,.4g})" if r["min"] != r["max"] else ""
        print(f"{r['system']:14} {r['metric']:44} {r['median']:>12,.4g} {r['unit']:10} {spread}")
    for ratio, value in ratios.items():
        print(f"{ratio}: {value:.2f}")
    print(", ".join(f"{k} {v:,.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in machine.items()))
    if path:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        result = {"name": name, "commit": git.stdout.strip(), "date": time.strftime("%Y-%m-%d"), **more}
        result |= {"machine": machine, "rows": rows, "ratios": ratios}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
