"""What an E-step on GSM8K accepts, by rule: the same draws, chosen by weight, kept by their gain or by their weight.

    python benchmarks/sound_thoughts.py RUN... [--iteration 1]

RUN is the folder of one seed's run of `recipes/gsm8k.yaml`, which accepts by gain; human solutions come from --data,
GSM8K's train.jsonl. Of the thoughts that another rule would have kept of the run's own:

- right: the thought's last calculation gives the answer;
- valid: and every one of its calculations (`<<48/2=24>>`) is true;
- sound: and they have the results of the human solution, and no others.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

CALCULATION = re.compile(r"<<([^=<>]*)=([^<>]*)>>")
Judged = tuple[bool, bool, bool]


@dataclass(frozen=True)
class Kept:
    """A thought that the run kept, in nats: log p(x | c, z) and log w over log p(x | c), and log p(x | c, z) itself."""

    gain: float
    weight: float
    text: float
    prior: bool  # drawn without the text
    judged: Judged


RULES: dict[str, Callable[[Kept], bool]] = {
    "gain > 0": lambda d: d.gain > 0,
    "gain > 1": lambda d: d.gain > 1,
    "gain > 3": lambda d: d.gain > 3,
    "text > -1": lambda d: d.text > -1,
    "text > -0.1": lambda d: d.text > -0.1,
    "weight > -2": lambda d: d.weight > -2,
    "weight > 0": lambda d: d.weight > 0,
    "weight > 1": lambda d: d.weight > 1,
    "weight > 2": lambda d: d.weight > 2,
    "weight > 3": lambda d: d.weight > 3,
    "prior draws": lambda d: d.prior,
}


def number(text: str) -> float | None:
    try:
        return round(float(re.sub(r"[,$\s]", "", text)), 4)
    except ValueError:
        return None


def result(calculation: str) -> float | None:
    plain = re.sub(r"[,$\s]", "", calculation).replace("%", "/100").replace("x", "*")
    if not re.fullmatch(r"[\d.+\-*/()]{1,60}", plain) or "**" in plain:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's own, of 2(3)
            return round(float(eval(plain, {"__builtins__": {}})), 4)
    except (SyntaxError, TypeError, ZeroDivisionError, OverflowError):
        return None


def judge(thought: str, answer: float | None, solution: str) -> Judged:
    steps = [(result(left), number(right)) for left, right in CALCULATION.findall(thought)]
    if not steps or answer is None:
        return False, False, False
    right = steps[-1][1] == answer
    valid = right and all(a is not None and b is not None and abs(a - b) < 0.02 for a, b in steps)
    theirs = {number(value) for _, value in CALCULATION.findall(solution)}
    return right, valid, valid and {value for _, value in steps} == theirs


def solutions(path: Path) -> dict[str, tuple[str, float | None]]:
    found = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        solution, _, final = row["answer"].rpartition("\n#### ")
        found[row["question"].strip()] = (solution, number(final))
    return found


def chosen(run: Path, iteration: int, known: dict[str, tuple[str, float | None]]) -> tuple[int, list[Kept]]:
    """How many documents there are, and the thought of each that has one."""
    tokenizer, total, found = Tokenizer.from_file(str(run / "base/model/tokenizer.json")), 0, []
    for path in sorted((run / f"iter_{iteration:02}/sample").glob("posterior-*.parquet")):
        for row in pq.read_table(path, use_threads=False).to_pylist():
            total += 1
            if (n := row["chosen"]) < 0:
                continue
            draw, raw = row["draws"][n], row["raw_logprob"]
            solution, answer = known[tokenizer.decode(row["context_ids"]).strip()]
            gain, weight = row["gains"][n], row["log_weights"][n] - raw
            judged = judge(draw["text"], answer, solution)
            found.append(Kept(gain, weight, draw["log_x"], draw["proposal"] == "prior", judged))
    return total, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k/train.jsonl"))
    parser.add_argument("--iteration", type=int, default=1)
    a = parser.parse_args()
    known = solutions(a.data)
    runs = [chosen(run, a.iteration, known) for run in a.runs]
    total = sum(n for n, _ in runs)
    print(f"iteration {a.iteration}: {total:,} documents of {len(runs)} runs, figures of all together")
    print(f"{'kept where':14}{'documents':>12}{'share':>8}{'right':>8}{'valid':>8}{'sound':>8}")
    for name, keeps in RULES.items():
        kept = [d.judged for _, draws in runs for d in draws if keeps(d)]
        right, valid, sound = np.mean(kept, axis=0) if kept else (0.0, 0.0, 0.0)
        print(f"{name:14}{len(kept):12,}{len(kept) / total:8.1%}{right:8.1%}{valid:8.1%}{sound:8.1%}")


if __name__ == "__main__":
    main()
