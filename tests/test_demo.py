"""The demo: seeds side by side, one report, and nothing left running when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latent_thoughts.store import run_lock
from latent_thoughts.types import UserError

SMALL = [
    "train.steps=20", "train.rows=4", "em.iterations=1", "em.baselines=[raw_tokens]", "sample.k=2",
    "data.world={documents: 30, teacher_documents: 20, held_out_share: 0.02}", "evaluate.documents=8",
]  # fmt: skip


def command(out: Path) -> list[str]:
    overrides = [word for setting in SMALL for word in ("--set", setting)]
    arguments = ["demo", "--out", str(out), "--seeds", "3,4", *overrides]
    return [sys.executable, "-m", "latent_thoughts.cli", *arguments]


def is_held(folder: Path) -> bool:
    try:
        with run_lock(folder):
            return False
    except UserError:
        return True


def test_killed_demo_leaves_nothing_running_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seeds = [out / "seed_3", out / "seed_4"]
    while not any((seed / "iter_00" / "train" / "stage.json").exists() for seed in seeds):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(is_held(seed) for seed in seeds):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)
    said = subprocess.run(command(out), check=True, capture_output=True, text=True).stdout
    results = json.loads((out / "results.json").read_text())
    assert results["run"]["seeds"] == [3, 4]
    assert [(r["seed"], r["method"]) for r in results["rows"]] == [
        (seed, method) for seed in (3, 4) for method in ("raw_tokens", "warm_start", "em")
    ]
    assert (out / "report.html").exists()
    assert "Warm start" in said


def test_a_seed_that_fails_ends_the_demo_with_its_reason(tmp_path: Path) -> None:
    broken = [*command(tmp_path / "demo"), "--set", "evaluate.answer=never (.*)"]
    ended = subprocess.run(broken, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "latent-thoughts: evaluate.answer does not match" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("text", ["", ","])
def test_no_seeds(tmp_path: Path, text: str) -> None:
    arguments = [sys.executable, "-m", "latent_thoughts.cli", "demo", "--out", str(tmp_path), "--seeds", text]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "--seeds is empty" in ended.stderr
