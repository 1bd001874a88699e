"""The matrix products of training in bfloat16, one at a time: what share of the peak torch reaches with each.

    OMP_NUM_THREADS=1 python benchmarks/products.py [--tokens 2048] [--inner 576] [--outer 1536] [--json FILE]

A linear layer's forward product, the gradient of its input, and the gradient of its weights: as torch takes it, with
a transposed copy of the gradient made first, and with that copy at hand. Besides, attention of a document whose
length has not been met before, and met again: oneDNN compiles kernels for every length.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import torch


def products(tokens: int, inner: int, outer: int) -> dict[str, Callable[[], object]]:
    x = torch.randn(tokens, inner).bfloat16()
    w, slope = torch.randn(outer, inner).bfloat16(), torch.randn(tokens, outer).bfloat16()
    turned = slope.T.contiguous()
    return {
        "forward": lambda: x @ w.T,
        "gradient of the input": lambda: slope @ w,
        "gradient of the weights": lambda: slope.T @ x,
        "gradient of the weights, copy first": lambda: slope.T.contiguous() @ x,
        "gradient of the weights, copy at hand": lambda: turned @ x,
    }


def attend(tokens: int, heads: int = 3, each: int = 3, width: int = 64) -> None:
    """Forward and backward, as `attention.documents` does it for a short document."""
    q, k, v = (torch.randn(heads, n * tokens, width, dtype=torch.bfloat16, requires_grad=True) for n in (each, 1, 1))
    (torch.softmax(q @ k.mT, -1) @ v).sum().backward()


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=576)
    parser.add_argument("--outer", type=int, default=1536)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    machine = common.machine()
    peak, work = machine["matmul_gflops_bfloat16"] * 1e9, 2 * a.tokens * a.inner * a.outer
    shares = {name: work / common.seconds(run) / peak for name, run in products(a.tokens, a.inner, a.outer).items()}
    rows = [common.row(name, "peak_share", "share", [share]) for name, share in shares.items()]
    attend(64)
    lengths = np.random.default_rng(0).permutation(np.arange(80, 240))[:40].tolist()
    for name in ("a length met first", "met again"):
        times = [milliseconds(lambda n=n: attend(n)) for n in lengths]
        rows.append(common.row(f"attention, {name}", "milliseconds", "ms", times))
    ratios = {f"{name}/peak": share for name, share in shares.items()}
    common.finish("products", machine, rows, ratios, a.json, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
