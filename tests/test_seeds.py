"""Seeds side by side: a GPU each where there are any, and the loss of one as one line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_thoughts import seeds
from latent_thoughts.config import Recipe, resolve
from latent_thoughts.progress import Event
from latent_thoughts.store import write_json
from latent_thoughts.types import UserError

NAMES = [3, 4, 5, 6]


def noted(values: dict[str, Any], folder: Path, seed: int) -> None:
    """Instead of a run: which GPUs it may use, and in which process."""
    row = {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "process": os.getpid()}
    write_json(folder / "results.json", {"run": {}, "rows": [row]})


def waiting(values: dict[str, Any], folder: Path, seed: int) -> None:
    """As `noted`, when three of them have begun."""
    noted(values, folder, seed)
    deadline = time.monotonic() + 60
    while len(list(folder.parent.glob("seed_*/results.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)


def killed(values: dict[str, Any], folder: Path, seed: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(seeds, "cores", lambda: 2)
    return resolve({})


@pytest.mark.parametrize(
    ("count", "shares"), [(0, {None}), (1, {"0"}), (2, {"0", "1"}), (4, {"0,1", "2,3"})]
)  # fmt: skip
def test_every_seed_has_gpus_of_its_own(
    count: int, shares: set[str | None], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(seeds, "_run_seed", noted)
    seeds.run(recipe, tmp_path, NAMES)
    rows = seeds.read_json(tmp_path / "results.json")["rows"]
    assert len(rows) == len(NAMES) and {row["gpus"] for row in rows} <= shares
    assert len({row["process"] for row in rows}) <= min(2, count or 2)


def test_as_many_seeds_at_once_as_asked_for_share_a_gpu(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(seeds, "_run_seed", waiting)
    seeds.run(recipe, tmp_path, NAMES[:3], at_once=3)
    rows = seeds.read_json(tmp_path / "results.json")["rows"]
    assert {row["gpus"] for row in rows} == {"0"} and len({row["process"] for row in rows}) == 3
    with pytest.raises(UserError, match="--at-once must be 1 or more, not 0"):
        seeds.run(recipe, tmp_path, NAMES, at_once=0)


def test_a_killed_seed_is_one_line(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "_run_seed", killed)
    with pytest.raises(UserError, match="a seed's process was killed"):
        seeds.run(recipe, tmp_path, NAMES)


def failing(values: dict[str, Any], folder: Path, seed: int) -> None:
    """One seed fails, the others would go on without end and tell more of it than a pipe holds."""
    if seed == NAMES[0]:
        raise UserError("no document is held out")
    while True:
        seeds._events.put((seed, Event("train", 1, 2, "steps", "loss 1 " * 100)))


def test_a_failing_seed_ends_the_others(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "_run_seed", failing)
    with pytest.raises(UserError, match="no document is held out"):
        seeds.run(recipe, tmp_path, NAMES)
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:  # the pool's own thread reaps them too
        time.sleep(0.1)
    assert not multiprocessing.active_children()


def test_what_ended_is_told_of_every_seed(tmp_path: Path) -> None:
    for seed, ended in ((0, {}), (1, {"ended": ["one"]}), (2, {"ended": ["two"]})):
        seeds.write_json(tmp_path / f"seed_{seed}" / "results.json", {"run": {"torch": "2", **ended}, "rows": [seed]})
    seeds._merge(tmp_path, [0, 1, 2])
    joint = seeds.read_json(tmp_path / "results.json")
    assert joint == {"run": {"torch": "2", "seeds": [0, 1, 2], "ended": ["one", "two"]}, "rows": [0, 1, 2]}
