"""Units over processes of this machine: each once, in order, and mistakes as one line."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latent_thoughts import executors, machine
from latent_thoughts.config import Recipe, resolve
from latent_thoughts.executors import Result
from latent_thoughts.executors.local import take_gpus
from latent_thoughts.store import Stage, read_manifest, read_rows
from latent_thoughts.types import UserError
from tests.executors.faulty import SCHEMA, Simple, notes

UNITS = {f"part-{n:05}.parquet": 1.0 for n in range(12)}


def recipe(workers: int, kind: str = "local") -> Recipe:
    return resolve({"threads": 1, "executor": {"kind": kind, "workers": workers}})


def work(folder: Path, *trouble: tuple[str, str]) -> Simple:
    return Simple(Stage(folder / "stage", "x", "k" * 64), folder / "log", trouble)


@given(st.permutations(list(range(7))))
def test_results_come_in_the_units_order_however_they_came(order: list[int]) -> None:
    results = [Result(str(n), {"n": n}, {}) for n in order]
    assert list(executors.in_order(results, map(str, range(7)))) == [Result(str(n), {"n": n}, {}) for n in range(7)]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_unit_once_and_what_is_there_is_not_made_again(tmp_path: Path, workers: int) -> None:
    simple = work(tmp_path)
    there = list(UNITS)[3]
    simple.stage.write(there, [{"unit": "kept"}], SCHEMA, {"number": 3})
    amounts: list[float] = []
    results = list(executors.run(recipe(workers), simple, UNITS, lambda amount, counts: amounts.append(amount)))
    assert [r.counts["number"] for r in results] == list(range(12)) and sum(amounts) == 12
    begun = notes(tmp_path / "log")
    assert sorted(unit for unit, _ in begun) == sorted(set(UNITS) - {there})
    assert len({process for _, process in begun}) == workers
    assert len(notes(tmp_path / "log.open")) == len(notes(tmp_path / "log.closed")) == workers
    described = {name: d for r in results for name, d in r.shards.items()}
    simple.stage.close(list(UNITS), {}, described)
    manifest = read_manifest(simple.stage.folder)
    rows = [row["unit"] for name in manifest.shards for row in read_rows(simple.stage.folder, manifest, name)]
    assert rows == [unit if unit != there else "kept" for unit in UNITS]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mistake_arrives_as_its_one_line(tmp_path: Path, workers: int) -> None:
    bad = list(UNITS)[5]
    with pytest.raises(UserError, match=f"^{bad} is a mistake of the user's$"):
        list(executors.run(recipe(workers), work(tmp_path, (bad, "mistake")), UNITS, lambda *_: None))


def test_a_killed_process_is_named_and_the_next_run_goes_on(tmp_path: Path) -> None:
    bad = list(UNITS)[5]
    with pytest.raises(UserError, match="a worker process was killed"):
        list(executors.run(recipe(2), work(tmp_path, (bad, "dies once")), UNITS, lambda *_: None))
    before = {unit for unit, _ in notes(tmp_path / "log")}
    list(executors.run(recipe(1), work(tmp_path, (bad, "dies once")), UNITS, lambda *_: None))
    again = [unit for unit, _ in notes(tmp_path / "log")]
    assert len(again) <= len(UNITS) + 2 and before | set(again) == set(UNITS)


DRIVER = """
import signal
from pathlib import Path
from latent_thoughts import executors
from tests.executors.faulty import Simple
from tests.executors.test_local import UNITS, recipe
from latent_thoughts.store import Stage
folder = Path({folder!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background is told to ignore it
simple = Simple(Stage(folder / "stage", "x", "k" * 64), folder / "log", seconds=300)
list(executors.run(recipe(2), simple, UNITS, lambda *_: None))
"""


def session(number: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, own = stat.read_text().rpartition(") ")[2].split()[:4]
            found += [int(stat.parent.name)] if int(own) == number and state != "Z" else []
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc which processes there are")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_workers_end_with_their_driver(tmp_path: Path, how: signal.Signals) -> None:
    """Alone, as a batch system, or one that is short of memory, ends it; at once, whatever they are at."""
    command = [sys.executable, "-c", DRIVER.format(folder=str(tmp_path))]
    root = Path(__file__).parents[2]
    driver = subprocess.Popen(command, cwd=root, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(notes(tmp_path / "log")) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(session(driver.pid)) >= 4  # the driver, the server that forks, and two workers
    driver.send_signal(how)
    said = driver.communicate(timeout=30)[1]
    while session(driver.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert session(driver.pid) == []
    assert said.count("Traceback") == (how == signal.SIGINT), said  # the driver's own


def test_a_shard_of_another_key_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    """A worker that outlived its driver writes into a folder that has changed hands."""
    left = work(tmp_path)
    mine = Stage(tmp_path / "stage", "x", "l" * 64)
    unit = next(iter(UNITS))
    list(executors.run(recipe(1), left, {unit: 1.0}, lambda *_: None))
    assert left.stage.done(unit) == {"number": 0} and mine.done(unit) is None


def test_where_a_stage_runs_is_in_no_key(tmp_path: Path, small: dict[str, Any]) -> None:
    from latent_thoughts.em import Run

    small["em"] = {"iterations": 1, "baselines": []}
    small["train"] |= {"steps": 5}
    runs = [Run(resolve(small), tmp_path), Run(resolve(small, ["executor.workers=7", "executor.cpus=2"]), tmp_path)]
    keys = []
    for run in runs:
        prepared = run.prepare()
        folders = [run.synthesize(), run.train_warm_start(), run.evaluate(run.warm_start)]
        keys.append([prepared.key, *(m.key for m in folders)])
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [(None, 2, {"0", "1"}), ("3, 5", 2, {"3", "5"}), ("GPU-a,GPU-b,GPU-c", 3, {"GPU-a", "GPU-b,GPU-c"}),
     (None, 4, {"0,1", "2,3"}), ("2", 1, {"2"}), (None, 0, {"none"})],
)  # fmt: skip
def test_workers_share_the_gpus_that_their_driver_may_use(
    visible: str | None, count: int, names: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forkserver._forkserver._stop()  # pyright: ignore  # it has the environment in which it was started
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    list(executors.run(recipe(2), work(tmp_path), UNITS, lambda *_: None))
    assert {gpu for gpu, _ in notes(tmp_path / "log.open")} == names


@pytest.mark.parametrize(("workers", "shared"), [(2, False), (3, True)])
def test_a_worker_knows_whether_its_gpu_is_its_own(workers: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(machine, "gpu_shared", False)
    take_gpus(multiprocessing.Value("i", 0), workers, ["0", "1"])
    assert machine.gpu_shared == shared
