"""unshare -rm python -m tests.faults.crowded RECIPE FOLDER FACTOR: every stage on a disk that is full.

The run lies on a tmpfs of its own, which is filled up but for some room. Each command is run with 16 kB of room, and
again with FACTOR times as much, until it succeeds. Prints what came of each attempt, as JSON; the run is copied to
FOLDER/run.
"""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from latent_thoughts.doctor import examine
from tests.faults.forks import ended, open_stage, start

COMMANDS = [("prepare",), ("synthesize",), ("train",), ("evaluate",), ("sample", "--iteration", "1"), ("em",)]


def fill(disk: Path, room: int) -> None:
    """Leaves `room` bytes on a disk."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(max(0, file.tell() - room))


def attempt(command: tuple[str, ...], recipe: str, run: Path, room: int, log: Path) -> dict[str, Any]:
    fill(run.parent, room)
    complete = {path: path.read_bytes() for path in run.rglob("manifest.json")}
    name, *rest = command
    code = ended(start([name, recipe, "--out", str(run), *rest], log))
    said = log.read_text()
    wrong = [f"{f.path}: {f.what}" for f in examine(run, False) if f.wrong] if run.exists() else []
    return {
        "command": name,
        "room": room,
        "code": code,
        "said": [line for line in said.splitlines() if line.startswith("latent-thoughts:")],
        "traceback": said if "Traceback" in said else "",
        "at": open_stage(run),
        "kept": all(path.exists() and path.read_bytes() == content for path, content in complete.items()),
        "wrong": wrong,
    }


def main(recipe: str, folder: Path, factor: float) -> None:
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], check=True)
    run, attempts = disk / "run", list[dict[str, Any]]()
    for command in COMMANDS:
        room = 16_000.0
        while True:
            attempts.append(attempt(command, recipe, run, int(room), folder / "log"))
            if attempts[-1]["code"] != 1:
                break
            room *= factor
    (disk / "ballast").unlink()
    shutil.copytree(run, folder / "run")
    print(json.dumps(attempts))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
