"""python -m tests.faults.dying RECIPE FOLDER SEED KILLS: `em` killed at random moments, and started again each time.

An undisturbed run lies in FOLDER/undisturbed. Then runs are killed (SIGKILL) at moments drawn evenly from the half of
the time that one takes to its results, and started again; one that was killed in its report is left to finish, and
another begun, until KILLS are spent. They lie in FOLDER/killed_N. Prints what they were at when they died, as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.faults.forks import ended, open_stage, start


def main(recipe: str, folder: Path, seed: int, kills: int) -> None:
    began = time.monotonic()
    pid = start(["em", recipe, "--out", str(folder / "undisturbed")], folder / "log")
    while not (folder / "undisturbed" / "results.json").exists():
        time.sleep(0.01)
        assert time.monotonic() - began < 300, (folder / "log").read_text()
    took, rng, deaths, runs = time.monotonic() - began, random.Random(seed), list[str](), 0
    assert ended(pid) == 0, (folder / "log").read_text()
    while True:
        out = folder / f"killed_{runs}"
        pid = start(["em", recipe, "--out", str(out)], folder / "log")
        if len(deaths) < kills and not (out / "results.json").exists():
            time.sleep(rng.uniform(0, took / 2))
            os.kill(pid, signal.SIGKILL)  # which is lost on one that has ended
        if (code := ended(pid)) == -signal.SIGKILL:
            deaths.append(open_stage(out))
            continue
        assert code == 0, (folder / "log").read_text()
        runs += 1
        if len(deaths) == kills:
            break
    print(json.dumps({"deaths": deaths, "runs": runs, "seconds": took}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
