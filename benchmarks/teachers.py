"""How fast a teacher behind an endpoint is asked, and in how much memory.

    python benchmarks/teachers.py [--repeats 3] [--json FILE]

A server on loopback, in a process of its own, answers in 100 ms and lets 64 in at once. Ideal is chunks / 64 * 100 ms.
`asking` is from the first question to the last stored reply; `stage` is all of synthesize: the estimate before, and
checking, tokenising and writing the shards behind it. Memory is that of the whole process, and what it grew by after
imports and set-up.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import finish, machine, peak_memory, row

LATENCY, AT_ONCE, CHUNKS_A_DOCUMENT = 0.1, 64, 10


def child(folder: Path, chunks: int, url: str) -> None:
    """One run in this process; prints its figures."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "teachers"))
    from conftest import TINY, byte_tokenizer

    from latent_thoughts.config import resolve
    from latent_thoughts.em import Run
    from latent_thoughts.stages.synthesize.asking import Asking
    from latent_thoughts.teachers import openai_api

    draw, words = random.Random(0), [f"word{n}" for n in range(500)]
    with (folder / "source.jsonl").open("w") as file:
        for _ in range(chunks // CHUNKS_A_DOCUMENT):
            text = "".join(" ".join(draw.choices(words, k=30)) + ". " for _ in range(CHUNKS_A_DOCUMENT))
            file.write(json.dumps({"text": text}) + "\n")
    teacher = {"model": "m", "base_url": url, "concurrency": AT_ONCE}
    values = {
        "data": {"source": str(folder / "source.jsonl"), "held_out": 0, "warm_start": 1, "shard_documents": 50},
        "chunking": {"mode": "fixed", "mean": 1},
        "model": {"base": TINY, "tokenizer": str(byte_tokenizer(folder / "tokenizer"))},
        "synthesize": {"method": "latent_thoughts", "teacher": teacher},
    }
    run = Run(resolve(values), folder / "run")
    run.prepare()
    openai_api.imported()
    asking, ask = [], Asking.ask

    def timed(self: Any, *arguments: Any) -> int:
        began = time.perf_counter()
        answered = ask(self, *arguments)
        asking.append(time.perf_counter() - began)
        return answered

    Asking.ask = timed
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on: set-up has its own
    before, began = peak_memory(), time.perf_counter()
    counts = run.synthesize().counts
    stage = time.perf_counter() - began
    assert counts["kept"] == chunks, counts
    peak = peak_memory()
    print(json.dumps({"asking": sum(asking), "stage": stage, "peak": peak, "grown": peak - before}))


def measured(chunks: int, url: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", folder, "--chunks", str(chunks), "--url", url]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.chunks, options.url)
        return
    with tempfile.TemporaryDirectory() as folder:
        script, port = Path(__file__).parents[1] / "tests" / "teachers" / "loopback.py", Path(folder) / "port"
        server = subprocess.Popen([sys.executable, str(script), str(port), str(LATENCY), str(AT_ONCE)])
        try:
            while not (port.exists() and port.read_text()):
                time.sleep(0.05)
            few = [measured(options.chunks, port.read_text()) for _ in range(options.repeats)]
            many = [measured(10 * options.chunks, port.read_text())]
        finally:
            server.terminate()
            server.wait()
    ideal = options.chunks / AT_ONCE * LATENCY
    rows = [row("ideal", "seconds", "s", [ideal])]
    for name, found in (("", few), (", 10 x the chunks", many)):
        rows += [row("ours", f"{metric}{name}", "s", [f[metric] for f in found]) for metric in ("asking", "stage")]
        rows += [
            row("ours", f"{metric} memory{name}", "GB", [f[metric] for f in found]) for metric in ("peak", "grown")
        ]
    medians = {r["metric"]: r["median"] for r in rows}
    ratios = {
        "asking/ideal seconds": medians["asking"] / ideal,
        "stage/ideal seconds": medians["stage"] / ideal,
        "10 x the chunks, asking/ideal seconds": medians["asking, 10 x the chunks"] / (10 * ideal),
        "10 x the chunks/once peak memory": medians["peak memory, 10 x the chunks"] / medians["peak memory"],
    }
    finish("teachers", machine(), rows, ratios, options.json, chunks=options.chunks)


if __name__ == "__main__":
    main()
