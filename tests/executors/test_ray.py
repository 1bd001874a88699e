"""A Ray cluster of three nodes on this machine: the same results as without, whatever dies on the way."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from latent_thoughts import executors
from latent_thoughts.config import resolve
from latent_thoughts.em import Run, em
from latent_thoughts.stages import sample as sampling
from latent_thoughts.store import Stage, read_manifest
from latent_thoughts.types import UserError
from tests.conftest import SMALL
from tests.executors.faulty import Simple, Watched, doubled, notes

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # has Ray know this machine by its loopback address alone
ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

pytestmark = pytest.mark.ray
NODE = {"num_cpus": 4, "include_dashboard": False}  # CPUs are only counted
UNITS = {f"part-{n:05}.parquet": 1.0 for n in range(12)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    found = Cluster(initialize_head=True, head_node_args=NODE, shutdown_at_exit=True)
    for _ in range(2):
        found.add_node(**NODE)
    yield found
    ray.shutdown()
    found.shutdown()


def settings(cluster: Any, **more: Any) -> dict[str, Any]:
    found = copy.deepcopy(SMALL)
    # one actor a node, so that every node has work and losing one loses one
    found["executor"] = {"kind": "ray", "address": cluster.address, "workers": 3, "cpus": 3, **more}
    return found


def rows(folder: Path) -> dict[str, list[Any]]:
    """All rows of a stage's shards, and of their schemas what is not the clock's."""
    return {name: pq.read_table(folder / name).to_pylist() for name in sorted(read_manifest(folder).shards)}


def counts(folder: Path) -> dict[str, Any]:
    found = read_manifest(folder).counts
    return {name: value for name, value in found.items() if name != "seconds"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EM iteration of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    em(resolve(small()), out)
    return out


def small() -> dict[str, Any]:
    found = copy.deepcopy(SMALL)
    found["em"] = {"iterations": 1, "baselines": []}
    found["train"] |= {"steps": 15}
    return found


def equal(cluster: Any, out: Path, alone: Path, stages: list[str]) -> None:
    """Goes on in `out` on three nodes; shards, choices, figures and keys are those of one process."""
    with contextlib.ExitStack() as stack:  # training in this process: that Ray's equals it is another test
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(executors, "together", lambda recipe, function, *arguments: function(*arguments))
        em(resolve(settings(cluster) | small()), out)
    for stage in stages:
        assert read_manifest(out / stage).key == read_manifest(alone / stage).key
        assert counts(out / stage) == counts(alone / stage)
        assert rows(out / stage) == rows(alone / stage)
    results = [json.loads((folder / "results.json").read_text())["rows"] for folder in (out, alone)]
    assert [{**row, "seconds": 0} for row in results[0]] == [{**row, "seconds": 0} for row in results[1]]


def test_an_e_step_and_its_evaluation_are_the_same_byte_for_byte(cluster: Any, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    shutil.rmtree(out / "iter_01")
    equal(cluster, out, alone, ["iter_01/sample", "iter_01/evaluate"])


@pytest.mark.slow
def test_every_stage_is_the_same_byte_for_byte(cluster: Any, alone: Path, tmp_path: Path) -> None:
    stages = ["prepare", "iter_00/synthesize", "iter_00/evaluate", "iter_01/sample", "iter_01/evaluate"]
    equal(cluster, tmp_path / "run", alone, stages)


@pytest.mark.slow
def test_mistakes_and_losses_and_what_is_there_already(cluster: Any, tmp_path: Path) -> None:
    recipe = resolve(settings(cluster, retries=1))
    first, second, *_ = UNITS
    simple = Simple(Stage(tmp_path / "s", "x", "k" * 64), tmp_path / "log", ((first, "dies once"), (second, "mistake")))
    with pytest.raises(UserError, match=f"^{second} is a mistake of the user's$"):
        list(executors.run(recipe, simple, UNITS, lambda *_: None))
    done = {name for name in UNITS if simple.stage.done(name) is not None}
    begun = len(notes(tmp_path / "log"))
    fatal = Simple(simple.stage, simple.log, ((second, "dies"),))
    with pytest.raises(UserError, match=r"a worker was lost more often than executor\.retries = 1 allows"):
        list(executors.run(recipe, fatal, UNITS, lambda *_: None))
    whole = Simple(simple.stage, simple.log)
    results = list(executors.run(recipe, whole, UNITS, lambda *_: None))
    assert [r.counts["number"] for r in results] == list(range(12))
    later = [unit for unit, _ in notes(tmp_path / "log")[begun:]]
    assert not done & set(later) and second in later


@pytest.mark.slow
def test_a_group_that_cannot_be_set_up_says_why(cluster: Any) -> None:
    """Here by nodes that claim GPUs and have none."""
    node = cluster.add_node(**NODE, num_gpus=2)
    recipe = resolve(settings(cluster, gpus=1, train_workers=2, cpus=1))
    try:
        with pytest.raises(UserError, match="^Ray could not set up training: .*NCCL"):
            executors.together(recipe, doubled, 1)
    finally:
        cluster.remove_node(node)


@pytest.mark.slow
def test_calls_are_made_by_workers_and_come_back_in_order(cluster: Any) -> None:
    """What evaluation asks of a model's tasks."""
    recipe = resolve(settings(cluster))
    found = executors.calls(recipe, doubled, [(n,) for n in range(5)])
    assert [value for value, _ in found] == [0, 2, 4, 6, 8] and os.getpid() not in {process for _, process in found}
    with pytest.raises(UserError, match="^13 is a mistake of the user's$"):
        executors.calls(recipe, doubled, [(1,), (13,)])


@pytest.fixture(scope="module")
def warm(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run with a warm start and 40 shards of the corpus; and its E-step as one process does it."""
    values = copy.deepcopy(SMALL)
    values["data"] |= {"shard_documents": 3}
    values["data"]["world"] |= {"documents": 120}
    values["sample"] |= {"k": 16}
    values["train"] |= {"steps": 15}
    folder = tmp_path_factory.mktemp("warm")
    run = Run(resolve(values), folder / "run")
    run.prepare()
    run.synthesize()
    run.train_warm_start()
    sampling.sample(run.recipe, run.recipe.sample, run.warm_start / "train", run.prepared, folder / "sample", 1)
    assert len(read_manifest(run.prepared).shards) > 40
    return Run(resolve({**values, "executor": settings(cluster)["executor"]}), run.folder), folder / "sample"


def strike_when(folder: Path, begun: int, strike: Callable[[], None]) -> threading.Thread:
    """Strikes once so many shards have been begun."""

    def watch() -> None:
        while len(notes(folder / "begun")) < begun:
            time.sleep(0.005)
        strike()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def whole(warm: tuple[Run, Path], folder: Path, in_flight: int) -> None:
    """No chunk is lost or doubled, all are what they are without faults, and little was begun twice."""
    found, expected = rows(folder), rows(warm[1])
    ids = [(r["doc_id"], r["chunk_index"]) for name in found if name.startswith("posterior-") for r in found[name]]
    assert len(ids) == len(set(ids)) == 120
    assert found == expected and counts(folder) == counts(warm[1])
    begun = [unit for unit, _ in notes(folder.parent / "begun")]
    assert len(set(begun)) == 40 and len(begun) - 40 <= in_flight
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def sampled(warm: tuple[Run, Path], folder: Path) -> None:
    run = warm[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "Shards", Watched)
        sampling.sample(run.recipe, run.recipe.sample, run.warm_start / "train", run.prepared, folder, 1)


@pytest.mark.slow
@pytest.mark.parametrize("time_of_death", range(5))
def test_an_actor_is_killed(warm: tuple[Run, Path], tmp_path: Path, time_of_death: int) -> None:
    def strike() -> None:
        os.kill(notes(tmp_path / "begun")[-1][1], signal.SIGKILL)

    thread = strike_when(tmp_path, random.Random(time_of_death).randrange(1, 36), strike)
    sampled(warm, tmp_path / "sample")
    thread.join()
    assert len({process for _, process in notes(tmp_path / "begun")}) > 3  # another took its place
    whole(warm, tmp_path / "sample", 1)


@pytest.mark.slow
@pytest.mark.parametrize("time_of_death", range(5))
def test_a_node_is_removed(warm: tuple[Run, Path], cluster: Any, tmp_path: Path, time_of_death: int) -> None:
    def strike() -> None:
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    thread = strike_when(tmp_path, random.Random(time_of_death).randrange(3, 36), strike)
    try:
        sampled(warm, tmp_path / "sample")
    finally:
        thread.join()
        cluster.add_node(**NODE)
    whole(warm, tmp_path / "sample", 3)


@pytest.mark.slow
@pytest.mark.parametrize("time_of_death", range(5))
def test_a_driver_is_killed_and_started_again(warm: tuple[Run, Path], tmp_path: Path, time_of_death: int) -> None:
    """Its actors live on for a moment, and the next driver begins while they do."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(warm[0].recipe.model_dump(mode="json")))
    script = [sys.executable, "-m", "tests.executors.sampling_driver"]
    command = [*script, str(recipe), str(warm[0].folder), str(tmp_path / "sample")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    thread = strike_when(tmp_path, random.Random(time_of_death).randrange(1, 36), process.kill)
    assert process.wait(120) == -signal.SIGKILL, process.communicate()[1]
    thread.join()
    sampled(warm, tmp_path / "sample")
    whole(warm, tmp_path / "sample", 3)


def curve(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "train" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [False, True], ids=["undisturbed", "a worker is killed"])
def test_two_workers_of_ray_train_equal_one_process(
    warm: tuple[Run, Path], cluster: Any, tmp_path: Path, fault: bool
) -> None:
    steps = 200 if fault else 50
    train = {"optimizer": "adamw", "dropout": 0.0, "steps": steps, "log_steps": 1, "checkpoint_steps": 20, "lr": 0.003}
    recipe = resolve({**settings(cluster, train_workers=2, cpus=1), "train": {**SMALL["train"], **train}})
    one, two = Run(resolve({**recipe.model_dump(), "executor": {}}), warm[0].folder), Run(recipe, warm[0].folder)
    one.train_warm_start(tmp_path / "one")
    killed: list[int] = []

    def strike() -> None:
        while not list((tmp_path / "two" / "train").glob("checkpoint_*")):
            time.sleep(0.01)
        killed.extend(training_processes()[:1])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=strike if fault else lambda: None)
    thread.start()
    two.train_warm_start(tmp_path / "two")
    thread.join()
    assert len(killed) == fault
    ours, theirs = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, steps + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4 if fault else 1e-5)
        assert (a["tokens"], a["epoch"]) == (b["tokens"], b["epoch"])
    assert read_manifest(tmp_path / "one/train").key == read_manifest(tmp_path / "two/train").key


def training_processes() -> list[int]:
    """Ray gives its processes titles."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::RayTrainWorker"):
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_a_mistake_in_training_arrives_as_its_one_line(warm: tuple[Run, Path], cluster: Any, tmp_path: Path) -> None:
    recipe = resolve({**settings(cluster, train_workers=3), "train": {**SMALL["train"], "optimizer": "adamw"}})
    with pytest.raises(UserError, match=r"^train\.rows = 4 cannot be shared out among 3 processes$"):
        Run(recipe, warm[0].folder).train_warm_start(tmp_path)


@pytest.mark.slow
def test_a_cluster_of_our_own_starts_and_ends_with_the_command(warm: tuple[Run, Path], tmp_path: Path) -> None:
    recipe, folder = warm[0].recipe.model_dump(mode="json"), tmp_path / "sample"
    recipe["executor"] = {"kind": "ray", "workers": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "tests.executors.sampling_driver", str(tmp_path / "recipe.yaml")]
    before = raylets()
    subprocess.run([*command, str(warm[0].folder), str(folder)], check=True, capture_output=True)
    whole(warm, folder, 0)
    assert len({process for _, process in notes(tmp_path / "begun")}) == 2
    assert raylets() == before


def raylets() -> set[str]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text().strip() == "raylet":
                found.add(path.parent.name)
    return found


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "executor.address: no Ray cluster answers at 127.0.0.1:1"),
        ("ray://127.0.0.1:1", "executor.address: ray://127.0.0.1:1 is no place to run Ray Data from"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_named(address: str, message: str) -> None:
    script = "import sys; from latent_thoughts.executors.on_ray import session; from latent_thoughts.config import *\n"
    script += f"try: session(resolve({{'executor': {{'kind': 'ray', 'address': '{address}'}}}}))\n"
    script += "except Exception as error: print(type(error).__name__, error)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert f"UserError {message}" in found.stdout
