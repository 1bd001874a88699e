"""The matrix products of training in bfloat16, one at a time: what share of the peak torch reaches with each.

    OMP_NUM_THREADS=1 python benchmarks/products.py [--tokens 2048] [--inner 576] [--outer 1536] [--json FILE]

A linear layer's forward product, the gradient of its input, and the gradient of its weights: as torch takes it, with
a transposed copy of the gradient made first, and with that copy at hand. Besides, what a number of tokens costs that
has not been met before, in milliseconds and megabytes, since oneDNN compiles kernels for every one: attention of a
document in training, and the linear layers of SmolLM2-135M, one of each shape, in a pass that draws. Last, forward and
backward in milliseconds: attention of a row in training by the package's one operation, and operation by operation; an
RMS norm of 1,024 tokens in float32 by the package's, transformers' (Llama's) and torch's; and the likeliest token's
logit of 341 positions by `amax` and by `max`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from latent_thoughts.attention import Rule, documents
from latent_thoughts.stages.train import lean


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


def rows_of_documents() -> dict[str, Callable[[], object]]:
    sizes = np.random.default_rng(0).integers(80, 230, 7).tolist()
    total, rule = sum(sizes), Rule(0.125, None, None, None)
    q, k, v = (torch.randn(heads, total, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (9, 3, 3))
    row = documents.Documents(sizes, torch.device("cpu"))
    squares = row._squares(sizes, None, 3, q.dtype)
    return {
        "one operation": lambda: row.attend(0, q, k, v, rule).sum().backward(),
        "operation by operation": lambda: (
            torch.cat([documents._alone(square, q, k, v, rule) for square in squares], 1).sum().backward()
        ),
    }


def passes_over_memory() -> dict[str, Callable[[], object]]:
    """What training does without a product."""
    x, weight = torch.randn(1024, 576, requires_grad=True), torch.ones(576, requires_grad=True)
    theirs, logits = LlamaRMSNorm(576, 1e-5), torch.randn(341, 49152)
    return {
        "RMS norm, ours": lambda: lean.RMSNorm.apply(x, weight, 1e-5).sum().backward(),  # pyright: ignore
        "RMS norm, transformers": lambda: theirs(x).sum().backward(),
        "RMS norm, torch": lambda: torch.nn.functional.rms_norm(x, (576,), weight, 1e-5).sum().backward(),
        "likeliest token, amax": lambda: logits.amax(1),
        "likeliest token, max": lambda: logits.max(1),
    }


def layers() -> Callable[[int], object]:
    shapes = [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576)]
    matrices = [torch.randn(*shape).bfloat16() for shape in shapes]
    return lambda rows: [torch.randn(rows, w.shape[1]).bfloat16() @ w.T for w in matrices]


def met(name: str, run: Callable[[int], object], numbers: list[int]) -> list[dict[str, Any]]:
    """Every number twice in turn, so that both have the machine's same moments."""
    run(64)
    held, times = common.memory(), np.zeros((2, len(numbers)))
    for n, number in enumerate(numbers):
        for again in (0, 1):
            began = time.perf_counter()
            run(number)
            times[again, n] = 1e3 * (time.perf_counter() - began)
    more = 1e3 * (common.memory() - held) / len(numbers)
    words = ("met first", "met again")
    rows = [common.row(name, word, "ms", t.tolist()) for word, t in zip(words, times, strict=True)]
    return [*rows, common.row(name, "memory of each", "MB", [more])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=576)
    parser.add_argument("--outer", type=int, default=1536)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    machine = common.machine()
    peak, flops = machine["matmul_gflops_bfloat16"] * 1e9, 2 * a.tokens * a.inner * a.outer
    shares = {name: flops / common.seconds(run) / peak for name, run in products(a.tokens, a.inner, a.outer).items()}
    rows = [common.row(name, "peak_share", "share", [share]) for name, share in shares.items()]
    numbers = np.random.default_rng(0).permutation(np.arange(80, 240))[:40].tolist()
    rows += met("attention", attend, numbers)
    rows += met("linear layers", layers(), numbers)
    attention = {f"attention of a row, {name}": work for name, work in rows_of_documents().items()}
    for name, work in {**attention, **passes_over_memory()}.items():
        rows.append(common.row(name, "milliseconds", "ms", [1e3 * common.seconds(work)]))
    ratios = {f"{name}/peak": share for name, share in shares.items()}
    common.finish("products", machine, rows, ratios, a.json, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
