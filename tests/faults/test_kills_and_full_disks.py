"""EM that is killed at random moments, that runs out of disk, and that is started twice."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import outcome

ROOT = Path(__file__).parents[2]
STAGES = {"base", "prepare", "synthesize", "train", "evaluate", "sample"}


def script(name: str, *arguments: object, prefix: tuple[str, ...] = ()) -> Any:
    """What a script of this folder prints."""
    command = [*prefix, sys.executable, "-m", f"tests.faults.{name}", *map(str, arguments)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def campaign(recipe: Path, folder: Path, seed: int, kills: int) -> Counter[str]:
    """Kills runs, sees that the finished ones come to what an undisturbed one does, and tells where they died."""
    found = script("dying", recipe, folder, seed, kills)
    assert len(found["deaths"]) == kills
    undisturbed = outcome(folder / "undisturbed")
    for number in range(found["runs"]):
        assert outcome(folder / f"killed_{number}") == undisturbed
    return Counter(name.rpartition("/")[2] for name in found["deaths"])


def test_a_few_random_kills(recipe: Path, tmp_path: Path) -> None:
    campaign(recipe, tmp_path, seed=0, kills=4)


@pytest.mark.slow
def test_fifty_random_kills_over_all_stages(recipe: Path, tmp_path: Path) -> None:
    deaths = campaign(recipe, tmp_path, seed=1, kills=50)
    print(dict(deaths))
    assert {"train", "sample", "evaluate"} <= deaths.keys() and len(deaths) >= 5


def crowded(recipe: Path, folder: Path, factor: float) -> list[dict[str, Any]]:
    """Attempts on a full disk; those that failed did so with a line, and left all that was there as it was."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no tmpfs of one's own may be mounted here (unshare -rm)")
    attempts = script("crowded", recipe, folder, factor, prefix=("unshare", "-rm"))
    for attempt in attempts:
        assert not attempt["traceback"], attempt["traceback"]
        assert attempt["kept"] and not attempt["wrong"], attempt
        if attempt["code"]:
            assert attempt["code"] == 1 and len(attempt["said"]) == 1, attempt
            assert "no space left" in attempt["said"][0] and "run the same command again" in attempt["said"][0]
    assert [a["command"] for a in attempts if a["code"] == 0] == [
        "prepare", "synthesize", "train", "evaluate", "sample", "em"
    ]  # fmt: skip
    return attempts


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(recipe: Path, tmp_path: Path) -> None:
    failed = {a["command"] for a in crowded(recipe, tmp_path, 30) if a["code"]}
    assert failed >= {"prepare", "train", "sample", "em"}


@pytest.mark.slow
def test_a_disk_that_fills_up_anywhere(recipe: Path, tmp_path: Path) -> None:
    attempts = crowded(recipe, tmp_path, 1.3)
    failed = [attempt for attempt in attempts if attempt["code"]]
    places = Counter(attempt["at"].rpartition("/")[2] for attempt in failed)
    print(dict(places))
    assert len(failed) > 30 and places.keys() >= STAGES - {"synthesize"}
    subprocess.run(command("em", recipe, tmp_path / "undisturbed"), check=True, capture_output=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "undisturbed")


def command(verb: str, recipe: Path, run: Path) -> list[str]:
    return [sys.executable, "-m", "latent_thoughts.cli", verb, str(recipe), "--out", str(run)]


def test_a_limit_on_the_size_of_files_is_one_line_too(recipe: Path, tmp_path: Path) -> None:
    """Where no disk of one's own can be had (Python leaves SIGXFSZ alone, so that writing fails by EFBIG)."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    found = subprocess.run(
        command("prepare", recipe, tmp_path / "run"), capture_output=True, text=True, preexec_fn=limit
    )
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert re.search(r"^latent-thoughts: no space left to write.*same command again", found.stderr, re.MULTILINE)


def test_the_second_process_on_a_run_folder_refuses_and_says_who_holds_it(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = subprocess.Popen(command("em", recipe, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        lock = run / ".lock"
        while not (lock.exists() and lock.read_text() == str(first.pid)):
            assert first.poll() is None
            time.sleep(0.02)
        second = subprocess.run(command("em", recipe, run), capture_output=True, text=True)
        assert second.returncode == 1
        assert f"latent-thoughts: {run} is in use by process {first.pid}" in second.stderr
        assert first.poll() is None  # and was not disturbed
    finally:
        first.kill()
        first.wait()
    lock.write_text(str(os.getpid()))  # numbers of processes recur: it is the kernel's lock that counts
    assert subprocess.run(command("prepare", recipe, run), capture_output=True).returncode == 0
