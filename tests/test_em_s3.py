"""A run in an object store is the run here: the same figures and rows, through faults of the store and SIGKILL."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from latent_thoughts import cli, places, transfer
from latent_thoughts.config import resolve
from latent_thoughts.em import em
from latent_thoughts.places import below, content, place, relative
from latent_thoughts.stages.report import report
from latent_thoughts.store import read_json, read_table, run_lock
from tests.conftest import SMALL
from tests.s3 import Store

SETTINGS: dict[str, Any] = copy.deepcopy(SMALL)
SETTINGS["em"] = {"iterations": 1, "baselines": []}
SETTINGS["data"]["shard_documents"] = 24
SETTINGS["train"] |= {"steps": 8, "checkpoint_steps": 5}
# One commit of each kind; all of them are the slow test's.
SOME = "iter_00/train/checkpoint_000005/state|iter_01/sample/manifest"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here") / "run"
    run(folder)
    return folder


def run(folder: Path, settings: dict[str, Any] = SETTINGS) -> None:
    with run_lock(folder):
        em(resolve(copy.deepcopy(settings)), folder)
        report(folder)


def figures(folder: Path) -> list[dict[str, Any]]:
    """The results without the clock's."""
    rows = read_json(folder / "results.json")["rows"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def outcome(folder: Path) -> dict[str, Any]:
    """Key and rows of every stage, weights of every model, the logged losses; and the names of all that lies there."""
    found: dict[str, Any] = {"figures": figures(folder)}
    for path in below(folder):
        name = relative(path, folder)
        if path.name == "manifest.json":
            found[name] = read_json(path)["key"]
        elif path.suffix == ".parquet":
            found[name] = read_table(path).to_pylist()
        elif path.suffix == ".safetensors":
            found[name] = hashlib.sha256(content(path)).hexdigest()
        elif path.name == "metrics.jsonl":
            found[name] = [json.loads(line)["loss"] for line in content(path).splitlines()]
        elif not name.startswith(".lock") and path.name != transfer.LISTING:
            found[name] = None
    return found


def whole(folder: Path) -> None:
    """Whatever calls itself complete is."""
    for path in below(folder):
        if path.name in ("manifest.json", transfer.LISTING):
            said = read_json(path)
            shards = said["shards"] if path.name == "manifest.json" else said
            hashes = {name: known["sha256"] if isinstance(known, dict) else known for name, known in shards.items()}
            found = {name: hashlib.sha256(content(path.parent / name)).hexdigest() for name in hashes}
            assert found == hashes or read_json(path) != said, path  # unless it is being put anew just now
        elif path.suffix == ".parquet":
            with contextlib.suppress(FileNotFoundError):  # prepare removes its first shards when it has made others
                read_table(path)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Somebody else looks at the folder all the time."""
    over, found = threading.Event(), []

    def watch() -> None:
        while not over.wait(5):
            try:
                whole(folder)
            except Exception as error:
                found.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    whole(folder)
    assert not found


@pytest.mark.slow
def test_a_run_in_a_store_that_fails_at_times_is_the_run_here(
    here: Path, s3: Store, bucket: Path, tmp_path: Path
) -> None:
    out = bucket / "runs" / "castle"
    with s3.faults(0.1) as met, watched(out):
        run(out)
    assert len(met) == 5 and met.total() > 30, met
    assert outcome(out) == outcome(here)
    left = {path.suffix for path in below(tmp_path / "cache")}
    assert left.isdisjoint({".arrow", ".tmp", ".distcp", ".parquet", ".sqlite"})
    before = {str(path): places.version(path) for path in below(out) if path.name == "manifest.json"}
    run(out)  # computes nothing
    assert {name: places.version(place(name)) for name in before} == before


def killed(here: Path, s3: Store, out: Path, tmp_path: Path, at: str, share: float) -> list[str]:
    """Where a run was killed that came to the same results nevertheless."""
    recipe, deaths = tmp_path / "recipe.yaml", tmp_path / "deaths"
    recipe.write_text(yaml.safe_dump(SETTINGS))
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, str(script), str(deaths), "em", str(recipe), "--out", str(out)]
    environment = {**os.environ, "KILLED_AT": at or "."}
    with s3.faults(share) as met, watched(out):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert outcome(out) == outcome(here)
    assert bool(met) == bool(share)
    assert not any(b"-of-the-test" in content(path) for path in below(out))  # keys
    return deaths.read_text().splitlines()


@pytest.mark.slow
def test_a_run_in_a_store_that_fails_at_times_and_is_killed_equals_undisturbed(
    here: Path, s3: Store, bucket: Path, tmp_path: Path
) -> None:
    deaths = killed(here, s3, bucket / "run", tmp_path, SOME, 0.01)
    assert all(any(part in death for death in deaths) for part in SOME.split("|")), deaths


@pytest.mark.slow
def test_a_run_in_a_store_that_is_killed_at_every_change_equals_undisturbed(
    here: Path, s3: Store, bucket: Path, tmp_path: Path
) -> None:
    deaths = killed(here, s3, bucket / "run", tmp_path, "", 0.0)
    assert len(deaths) > 100


@pytest.mark.slow
def test_a_changed_setting_sets_aside_and_brings_back(s3: Store) -> None:
    bucket = s3.bucket()
    settings = copy.deepcopy(SETTINGS)
    settings["train"] |= {"steps": 4, "checkpoint_steps": 2}
    run(bucket, settings)
    first = outcome(bucket)
    settings["sample"]["k"] = 2
    run(bucket, settings)
    second = outcome(bucket)
    assert second["iter_01/sample/manifest.json"] != first["iter_01/sample/manifest.json"]
    aside = f"iter_01/sample.{first['iter_01/sample/manifest.json'][:12]}"
    for name, rows in first.items():
        if name.startswith("iter_01/sample/"):
            assert second[name.replace("iter_01/sample", aside)] == rows
    settings["sample"]["k"] = 4
    run(bucket, settings)
    third = outcome(bucket)
    assert {name: third[name] for name in first} == first


@pytest.mark.slow
@pytest.mark.ray
def test_workers_of_a_cluster_share_a_store_and_nothing_else(
    here: Path, s3: Store, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage in Ray's workers, training among them, which know the store by their environment."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    node = {"num_cpus": 4, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        # an actor a node
        executor = {"kind": "ray", "address": cluster.address, "workers": 2, "cpus": 3}
        with s3.faults(0.01) as met:
            run(bucket / "run", {**SETTINGS, "executor": executor})
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert met and outcome(bucket / "run") == outcome(here)


def test_every_command_takes_urls(
    here: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that was copied there by other means: no folder has a listing."""
    for path in below(here):
        if not path.name.startswith("."):
            places.write(bucket / "run" / relative(path, here), content(path))

    def command(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["latent-thoughts", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        assert end.value.code == code, said.err
        return said.err if code else said.out

    said = command("report", f"{bucket}/run")
    assert f"{bucket}/run/report.html" in said and "Warm start" in said
    for run, target in ((str(here), str(tmp_path)), (f"{bucket}/run", f"{bucket}/run")):
        command("export", run, f"{target}/thoughts.jsonl", "--iteration", "1")
    thoughts = content(tmp_path / "thoughts.jsonl")
    assert thoughts.count(b"\n") > 5 and content(bucket / "run" / "thoughts.jsonl") == thoughts
    question = ("dee starts in cellar . 1 east .", "--seed", "3")
    assert command("ask", f"{bucket}/run/iter_01/train", *question) == command(
        "ask", f"{here}/iter_01/train", *question
    )
    assert "finished" in command("watch", f"{bucket}/run", "--once")
    assert "Differences" in command("compare", f"{bucket}/run/iter_00", f"{bucket}/run/iter_01")
    settings = {
        "data": {"source": f"{bucket}/run/*.jsonl", "chunks": True},
        "model": {"base": f"{bucket}/run/base/model"},
    }
    places.write(bucket / "recipe.yaml", yaml.safe_dump({**settings, "chunking": SETTINGS["chunking"]}).encode())
    command("prepare", f"{bucket}/recipe.yaml", "--out", f"{bucket}/other")
    assert read_json(bucket / "other" / "prepare" / "manifest.json")["counts"]["corpus_documents"] > 5
    assert "nothing holds no results.json" in command("report", f"{bucket}/nothing", code=1)
