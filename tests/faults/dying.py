"""python -m tests.faults.dying RECIPE FOLDER SEED KILLS: `em` killed at random moments, and started again each time.

An undisturbed run lies in FOLDER/undisturbed. Then runs are killed (SIGKILL) in their first moments, or at a moment
drawn evenly from one of their next stages, whose lengths are the undisturbed run's, and started again; one that comes
to its end is left, and another begun, until KILLS are spent. They lie in FOLDER/killed_N. Prints what they were at when
they died, as JSON.
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

FIRST, LAST = "first moments", "not at all"
START = 0.3  # seconds until a run goes on with a stage
AHEAD = 4  # a run is killed in one of so many stages to come


def lengths(run: Path) -> dict[str, float]:
    """Seconds that each stage took, in their order."""
    stages = [(path.stat().st_mtime, path.parent) for path in run.rglob("manifest.json")]
    began = {folder: (folder / "stage.json").stat().st_mtime for _, folder in stages}
    return {str(folder.relative_to(run)): end - began[folder] for end, folder in sorted(stages)}


def running(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait_for_the_moment(pid: int, out: Path, seconds: dict[str, float], rng: random.Random) -> None:
    left = [stage for stage in seconds if not (out / stage / "manifest.json").exists()]
    stage = rng.choice([FIRST, *left, LAST][: AHEAD + 1])
    again = (out / stage / "stage.json").exists()
    while running(pid) and (stage == LAST or (stage in left and not (out / stage / "stage.json").exists())):
        time.sleep(0.005)
    time.sleep(rng.uniform(0, seconds.get(stage, 0) + (START if again or stage == FIRST else 0)))


def main(recipe: str, folder: Path, seed: int, kills: int) -> None:
    pid = start(["em", recipe, "--out", str(folder / "undisturbed")], folder / "log")
    assert ended(pid) == 0, (folder / "log").read_text()
    seconds, rng, deaths, runs = lengths(folder / "undisturbed"), random.Random(seed), list[str](), 0
    while True:
        out = folder / f"killed_{runs}"
        pid = start(["em", recipe, "--out", str(out)], folder / "log")
        if len(deaths) < kills:
            wait_for_the_moment(pid, out, seconds, rng)
            os.kill(pid, signal.SIGKILL)  # which is lost on one that has ended
        if (code := ended(pid)) == -signal.SIGKILL:
            deaths.append(open_stage(out))
            continue
        assert code == 0, (folder / "log").read_text()
        runs += 1
        if len(deaths) == kills:
            break
    print(json.dumps({"deaths": deaths, "runs": runs, "seconds": sum(seconds.values())}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
