"""python -m tests.faults.contended RECIPE FOLDER: a limit on files, and a second process on a run folder.

Prints what the commands said, as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.faults.forks import ended, start


def said(arguments: list[str], log: Path) -> dict[str, Any]:
    return {"code": ended(start(arguments, log)), "said": log.read_text()}


def limited(recipe: str, folder: Path) -> dict[str, Any]:
    """No file may grow beyond 20 kB, as the model's does. (Python ignores SIGXFSZ, so that writing fails by EFBIG.)"""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        return said(["prepare", recipe, "--out", str(folder / "limited")], folder / "log")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def main(recipe: str, folder: Path) -> None:
    found, run = {"limited": limited(recipe, folder)}, folder / "run"
    first, lock = start(["em", recipe, "--out", str(run)], folder / "log of the first"), run / ".lock"
    while not (lock.exists() and lock.read_text() == str(first)):
        time.sleep(0.01)
    found["first"] = {"pid": first}
    found["second"] = said(["em", recipe, "--out", str(run)], folder / "log")
    found["repairing"] = said(["doctor", str(run), "--repair"], folder / "log")
    os.kill(first, signal.SIGKILL)
    found["first"]["code"] = ended(first)
    lock.write_text(str(os.getpid()))  # numbers of processes recur: it is the kernel's lock that counts
    found["after"] = said(["prepare", recipe, "--out", str(run)], folder / "log")
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
