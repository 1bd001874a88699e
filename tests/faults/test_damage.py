"""Files that were cut, emptied, changed by a bit or brought from elsewhere: named, never used, and made again."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latent_thoughts import cli, transfer
from latent_thoughts.config import Recipe, resolve
from latent_thoughts.data import records
from latent_thoughts.doctor import doctor, examine
from latent_thoughts.doctor.stages import StageFolder
from latent_thoughts.em import Run, em
from latent_thoughts.journal import Journal
from latent_thoughts.stages import prepare as preparing
from latent_thoughts.store import Stage, read_manifest, read_rows, run_lock
from latent_thoughts.types import UserError
from tests.conftest import SMALL
from tests.faults.conftest import miniature, outcome


def cut(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def emptied(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path, _: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(path.name).randrange(len(content))] ^= 1 << 4
    path.write_bytes(content)


def foreign(path: Path, other: Path) -> None:
    """Whole and sound, but of the same place in a run with another seed."""
    shutil.copy(other, path)


DAMAGES: list[Callable[[Path, Path], None]] = [cut, emptied, flipped, foreign]
SETTINGS = miniature(json.loads(json.dumps(SMALL)))


def recipe(seed: int = 0) -> Recipe:
    return resolve(SETTINGS, [f"seed={seed}", f"data.world.seed={seed}"])


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run, one with another seed, and one of each that was killed at the end of E-step and training."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("finished", 0), ("other", 1)):
        em(recipe(seed), folder / name)
        for stage in ("iter_01/sample", "iter_01/train"):
            shutil.copytree(folder / name / stage, folder / f"{name} half" / stage)
            (folder / f"{name} half" / stage / "manifest.json").unlink()
    return {path.name: path for path in folder.iterdir()}


def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def wrong(run: Path) -> list[Path]:
    return [finding.path for finding in examine(run, False) if finding.wrong]


def held_files(run: Path) -> Iterator[Path]:
    """What stages hold and go on from."""
    for path in sorted(run.rglob("*")):
        stage = next((parent for parent in path.parents if (parent / "stage.json").exists()), None)
        if stage is None or path.suffix not in (".parquet", ".json", ".safetensors"):
            continue
        if path.parent == stage or (stage / "manifest.json").exists():  # a model counts when its stage is complete
            yield path


def test_a_sound_run_has_nothing_wrong(runs: dict[str, Path]) -> None:
    assert wrong(runs["finished"]) == wrong(runs["finished half"]) == []


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("which", ["finished", "finished half"])
def test_every_damaged_file_is_named(
    runs: dict[str, Path], tmp_path: Path, which: str, damage: Callable[[Path, Path], None]
) -> None:
    """By doctor, whatever was done to whichever file."""
    run, other, tried = copied(runs[which], tmp_path), runs[which.replace("finished", "other")], 0
    for path in held_files(run):
        twin, before = other / path.relative_to(run), path.read_bytes()
        if damage is foreign and (not twin.exists() or twin.read_bytes() == before):
            continue
        if damage is foreign and path.name == "stage.json" and "half" in which and path.parent.name == "train":
            continue  # nothing else tells whose a training is that is not finished: it is set aside, and begun anew
        damage(path, twin)
        found, tried = wrong(run), tried + 1
        assert path in found or unharmed(path, before), f"{path} {damage.__name__}"
        path.write_bytes(before)
    assert tried >= 5


def unharmed(path: Path, before: bytes) -> bool:
    """Whether an unfinished shard says what it said: a bit may be one that nobody reads."""
    if path.suffix != ".parquet" or (path.parent / "manifest.json").exists():
        return False
    return pq.read_table(path) == pq.read_table(pa.BufferReader(before))


def read_all(run: Path) -> list[Any]:
    """As the stages read."""
    found: list[Any] = []
    for path in run.rglob("manifest.json"):
        manifest = read_manifest(path.parent)
        for name in manifest.shards:
            found.append(read_rows(path.parent, manifest, name))
    for path in run.rglob("stage.json"):
        if not (path.parent / "manifest.json").exists():
            value = json.loads(path.read_text())
            stage = Stage(path.parent, value["stage"], value["key"])
            for shard in path.parent.glob("*.parquet"):
                if stage.done(shard.name) is None:
                    raise UserError(f"{shard} is not done")
                found.append(stage.rows(shard.name))
    return found


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("which", ["finished", "finished half"])
def test_no_damaged_shard_or_manifest_is_used(
    runs: dict[str, Path], tmp_path: Path, which: str, damage: Callable[[Path, Path], None]
) -> None:
    run, other = copied(runs[which], tmp_path), runs[which.replace("finished", "other")]
    sound = read_all(run)
    for path in held_files(run):
        if path.suffix == ".parquet" or path.name == "manifest.json":
            before = path.read_bytes()
            damage(path, other / path.relative_to(run))
            if path.read_bytes() != before:
                try:
                    assert read_all(run) == sound and damage is flipped and "half" in which
                except UserError as error:
                    assert path.name in str(error)
            path.write_bytes(before)


def test_any_bit_of_an_unfinished_shard(tmp_path: Path) -> None:
    """The shard is refused, or not taken for done, or says what it said."""
    schema = pa.schema([("n", pa.int64()), ("text", pa.string()), ("ids", pa.list_(pa.list_(pa.int32())))])
    rows = [{"n": n, "text": "x" * n, "ids": [[n], [], [n, n]]} for n in range(20)]
    stage = Stage(tmp_path, "x", "k" * 64)
    stage.write("a.parquet", rows, schema, {"documents": 20})
    content, refused = (tmp_path / "a.parquet").read_bytes(), 0
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        (tmp_path / "a.parquet").write_bytes(changed)
        try:
            counts = stage.done("a.parquet")
            if counts is None:
                refused += 1
                continue
            assert (counts, stage.rows("a.parquet")) == ({"documents": 20}, rows), place
            stage.describe("a.parquet")
        except UserError:
            refused += 1
    assert refused > len(content) / 3 / 2


def test_a_shard_that_gives_fewer_rows_than_it_has_is_refused(tmp_path: Path) -> None:
    """A bit of its footer, in the number of rows of the row group, is all it takes."""
    stage = Stage(tmp_path, "x", "k" * 64)
    chunk = {"start": 0, "text": "x", "ids": [1, 2], "target": True, "thoughts": [[1, 2], [3]]}
    rows = [{"id": str(n), "source": "raw", "meta": "{}", "chunks": [chunk]} for n in range(20)]
    stage.write("a.parquet", rows, records.DOCUMENTS, {})
    content, why = (tmp_path / "a.parquet").read_bytes(), Counter[str]()
    for place in range(len(content) // 2, len(content) * 2 // 3):
        changed = bytearray(content)
        changed[place] ^= 8
        (tmp_path / "a.parquet").write_bytes(changed)
        try:
            assert stage.rows("a.parquet") == rows, place
        except UserError as error:
            why["rows" if "of 20 rows)" in str(error) else "other"] += 1
    assert why["rows"] and why["other"]


REPAIRED: list[tuple[str, str, Callable[[Path, Path], None]]] = [
    ("finished", "prepare/corpus-00000.parquet", flipped),
    ("finished", "iter_01/sample/posterior-00000.parquet", emptied),
    ("finished", "iter_01/train/manifest.json", foreign),
    ("finished", "iter_00/train/model/model.safetensors", cut),
]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["latent-thoughts", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_what_is_damaged_is_named_then_repaired_and_made_again(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(runs["finished"], tmp_path)
    for _, name, damage in REPAIRED:
        damage(run / name, runs["other"] / name)
    with pytest.raises(UserError, match=r"damaged .*latent-thoughts doctor"):
        em(recipe(), run)
    assert call(monkeypatch, "doctor", run) == 1
    said = "".join(capsys.readouterr().out.split())
    assert all(Path(name).name[:12] in said for _, name, _ in REPAIRED)
    assert call(monkeypatch, "doctor", run, "--repair") == 0
    assert call(monkeypatch, "doctor", run) == 0
    kept = {path: path.stat().st_mtime_ns for path in run.glob("iter_00/synthesize/*.parquet")}
    em(recipe(), run)
    assert outcome(run) == outcome(runs["finished"])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (run / "damaged" / REPAIRED[0][1]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_made_again(
    runs: dict[str, Path], tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    """One after the other, each by a repair and the same command."""
    from latent_thoughts.doctor import doctor

    run = copied(runs["finished"], tmp_path)
    for name in [path.relative_to(run) for path in held_files(run)]:
        if damage is foreign and not (runs["other"] / name).exists():
            continue
        damage(run / name, runs["other"] / name)
        assert doctor(run, repair=True)
        em(recipe(), run)
        assert outcome(run) == outcome(runs["finished"]), name
        assert wrong(run) == [], name


def test_a_stage_takes_no_manifest_and_no_shard_of_another(tmp_path: Path) -> None:
    schema = pa.schema([("n", pa.int64())])
    for name, key in (("one", "k" * 64), ("two", "l" * 64)):
        stage = Stage(tmp_path / name, "sample", key)
        for number in range(2):
            stage.write(f"corpus-0000{number}.parquet", [{"n": number}], schema, {})
        if name == "two":
            stage.close(["corpus-00000.parquet"], {})
    one = Stage(tmp_path / "one", "sample", "k" * 64)
    shutil.copy(tmp_path / "two" / "manifest.json", tmp_path / "one")
    with pytest.raises(UserError, match=r"manifest\.json is damaged \(it is of another stage"):
        _ = one.manifest
    (tmp_path / "one" / "manifest.json").unlink()
    shutil.copy(tmp_path / "one" / "corpus-00000.parquet", tmp_path / "one" / "corpus-00001.parquet")
    with pytest.raises(UserError, match=r"corpus-00001\.parquet is damaged .*of another shard"):
        one.done("corpus-00001.parquet")
    shutil.copy(tmp_path / "two" / "corpus-00001.parquet", tmp_path / "one")
    assert one.done("corpus-00001.parquet") is None


def test_a_marker_is_written_anew_from_what_lies_there(runs: dict[str, Path], tmp_path: Path) -> None:
    """So that what an E-step took days for is not set aside for the sake of a file of two lines."""
    for which in ("finished", "finished half"):
        run = Path(shutil.copytree(runs[which], tmp_path / which))
        marker = run / "iter_01/sample/stage.json"
        before = json.loads(marker.read_text())
        marker.write_bytes(b"{")
        for finding in examine(run, False):
            assert finding.mend is not None
            finding.mend()
        assert json.loads(marker.read_text()) == before and wrong(run) == []


def test_damaged_lines_and_replies_are_left_out(tmp_path: Path) -> None:
    from latent_thoughts.teachers.base import Completion
    from latent_thoughts.teachers.replies import opened

    stage = Stage(tmp_path / "tasks" / "t", "task", "k" * 64)
    journal = Journal(stage.shard("answered.jsonl"))
    for number in range(3):
        journal.add(f"q{number}", {"text": f"answer {number}"})
    path = stage.shard("answered.jsonl")
    path.write_text(path.read_text().replace("answer 1", "answer 7"))
    with pytest.raises(UserError, match=r"answered\.jsonl:2 is damaged"):
        Journal(path)
    with opened(tmp_path / "replies.sqlite", "s") as replies:
        for number in range(3):
            replies.put(f"{number:032x}", Completion(f"reply {number}", "stop", 1, 1))
    with sqlite3.connect(tmp_path / "replies.sqlite") as connection:
        key, text = connection.execute("SELECT key, text FROM replies").fetchall()[1]
        connection.execute("UPDATE replies SET text = ? WHERE key = ?", (text[:-1] + b"?", key))
    with (
        opened(tmp_path / "replies.sqlite", "s") as replies,
        pytest.raises(UserError, match=r"replies\.sqlite is damaged"),
    ):
        replies.get(key.hex())
    assert not doctor(tmp_path, repair=False)
    assert doctor(tmp_path, repair=True)
    assert Journal(path).known == {"q0": {"text": "answer 0"}, "q2": {"text": "answer 2"}}
    with opened(tmp_path / "replies.sqlite", "s") as replies:
        assert replies.get(key.hex()) is None and (replies.kept, replies.spent()) == (2, (3, 3, 3))  # paid it was
    (tmp_path / "replies.sqlite").write_bytes(b"no database at all, of some length" * 200)
    assert doctor(tmp_path, repair=True)
    assert (tmp_path / "damaged" / "replies.sqlite").exists() and not (tmp_path / "replies.sqlite").exists()


def test_a_folder_of_several_runs_is_looked_at_run_by_run(runs: dict[str, Path], tmp_path: Path) -> None:
    for seed in (0, 1):
        shutil.copytree(runs["finished"], tmp_path / f"seed_{seed}")
    (tmp_path / "recipe.yaml").write_bytes((tmp_path / "seed_0" / "recipe.yaml").read_bytes())
    assert doctor(tmp_path, repair=False)
    work = tmp_path / "seed_0" / "prepare" / ".corpus-00009.parquet.abc.tmp"
    work.write_text("being written")
    (tmp_path / "seed_1" / "replies.sqlite").write_bytes(b"no database at all" * 500)
    (tmp_path / "seed_1" / "results.json").write_text("{")
    holder = "import sys, time, pathlib as p; from latent_thoughts.store import run_lock\n"
    holder += "with run_lock(p.Path(sys.argv[1])):\n print('held', flush=True)\n time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder, tmp_path / "seed_0"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        with pytest.raises(UserError, match="seed_0 is in use by process"):
            doctor(tmp_path, repair=True)
        assert not doctor(tmp_path, repair=False)
        child.kill()
    assert work.exists() and (tmp_path / "seed_1" / "replies.sqlite").exists()
    assert doctor(tmp_path, repair=True) and not work.exists()
    aside = {path.name for path in (tmp_path / "seed_1" / "damaged").iterdir()}
    assert aside == {"replies.sqlite", "results.json"} and not (tmp_path / "damaged").exists()


def test_a_part_of_a_run_is_not_repaired_behind_its_lock(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["finished"], run)
    part = next(path for path in sorted(run.glob("iter_*")))
    work = part / "train" / ".model.abc.tmp"
    work.mkdir()
    with run_lock(run), pytest.raises(UserError, match=f"{part.name} is a part of the run {run}: name that folder"):
        doctor(part, repair=True)
    assert work.exists() and not (part / ".lock").exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_run_that_cannot_be_written_to_is_looked_at(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def run_lock(folder: Path) -> None:
        raise OSError(code, "no writing here", str(folder))

    monkeypatch.setattr("latent_thoughts.doctor.run_lock", run_lock)
    assert doctor(runs["finished"], repair=False)
    with pytest.raises(OSError, match="no writing here"):
        doctor(runs["finished"], repair=True)


def test_what_lies_beside_runs_is_not_touched(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["finished"], tmp_path / "runs" / "mine")
    other = tmp_path / "other" / ".settings.tmp"
    other.parent.mkdir()
    other.touch()
    assert doctor(tmp_path, repair=True) and other.exists()


def test_a_damaged_source_of_an_unfinished_stage_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(recipe(), tmp_path)
    whole, write = run.prepare(), preparing.Shards._write
    shutil.rmtree(run.prepared)

    def write_but(self: Any, unit: str, *more: Any) -> None:
        if unit.startswith("corpus"):
            raise KeyboardInterrupt
        write(self, unit, *more)

    with monkeypatch.context() as patch:
        patch.setattr(preparing.Shards, "_write", write_but)
        with pytest.raises(KeyboardInterrupt):
            run.prepare()
    source = next(run.prepared.glob("source-corpus-*"))
    cut(source, source)
    with pytest.raises(UserError, match="source-corpus-.* is damaged"):
        run.prepare()
    assert doctor(tmp_path, repair=True)
    assert run.prepare() == whole and not list(run.prepared.glob("source-*"))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "doctor", tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


# --- clocks and times of files


def contents(run: Path) -> dict[str, bytes]:
    """All files but those that tell of versions, progress and whoever looked last."""
    unlike = {"recipe.yaml", "progress.json", ".lock", "results.json"}
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in unlike}


@pytest.mark.parametrize("moment", [0, 4_000_000_000])
def test_times_of_files_change_nothing(
    runs: dict[str, Path], tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(runs["finished"], tmp_path)
    for path in [run, *run.rglob("*")]:
        os.utime(path, (moment, moment))
    before = contents(run)
    monkeypatch.setattr(Stage, "write", lambda *_: pytest.fail("work was done again"))
    monkeypatch.setattr(preparing, "_read", lambda *_: pytest.fail("the source was read again"))
    em(recipe(), run)
    assert contents(run) == before
    assert outcome(run) == outcome(runs["finished"])


def test_a_clock_that_jumps_changes_nothing(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Years to and fro at every look, in a run that is stopped in its E-step and goes on with other times of files."""
    rng, clock = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: clock() + rng.uniform(-1e8, 1e8))
    written: Any = Stage.write

    def stop(stage: Stage, name: str, *rest: Any) -> None:
        if name == "corpus-00001.parquet" and stage.name == "sample":
            raise Stopped
        written(stage, name, *rest)

    with monkeypatch.context() as stopped:
        stopped.setattr(Stage, "write", stop)
        with pytest.raises(Stopped):
            em(recipe(), tmp_path / "run")
    for path in (tmp_path / "run").rglob("*"):
        moment = rng.uniform(0, 4e9)
        os.utime(path, (moment, moment))
    em(recipe(), tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(runs["finished"])


def test_a_model_in_a_store_that_is_not_what_was_put_is_named(bucket: Path, tmp_path: Path) -> None:
    run, made = bucket / "run", tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"weights")
    stage = Stage(run / "iter_00/train", "train", "key")
    transfer.put(made, stage.folder / "model")
    stage.close([], {}, model="model")
    found = StageFolder(run, stage.folder)
    assert list(found.findings()) == []
    (stage.folder / "model/model.safetensors").write_bytes(b"wEights")
    (stage.folder / "model/config.json").unlink()
    named = {finding.path.name for finding in found.findings()}
    assert named == {"model.safetensors", "config.json"}
