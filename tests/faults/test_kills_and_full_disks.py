"""EM that is killed at random moments, that runs out of disk, and that is started twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from latent_thoughts.files import out_of_space
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


@pytest.mark.slow
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
    undisturbed = ["em", str(recipe), "--out", str(tmp_path / "undisturbed")]
    subprocess.run([sys.executable, "-m", "latent_thoughts.cli", *undisturbed], check=True, capture_output=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "undisturbed")


def test_a_limit_on_files_and_a_second_process_are_one_line_each(recipe: Path, tmp_path: Path) -> None:
    found = script("contended", recipe, tmp_path)
    lines = {
        name: [x for x in each.get("said", "").splitlines() if x.startswith("latent")] for name, each in found.items()
    }
    assert "Traceback" not in str(found)
    assert found["limited"]["code"] == 1 and len(lines["limited"]) == 1 and "no space left" in lines["limited"][0]
    for name in ("second", "repairing"):
        assert found[name]["code"] == 1
        assert lines[name] == [f"latent-thoughts: {tmp_path}/run is in use by process {found['first']['pid']}"]
    assert found["first"]["code"] == -signal.SIGKILL  # it was there till then
    assert found["after"]["code"] == 0  # a lock that a dead process left holds nobody up


def test_a_writer_that_found_less_than_it_wrote_tells_of_a_full_disk() -> None:
    """torch's words, in place of the error of the disk; what its reader says of a damaged file is another thing."""
    assert out_of_space(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"))
    assert not out_of_space(RuntimeError("PytorchStreamReader failed reading zip archive: not a ZIP archive"))
