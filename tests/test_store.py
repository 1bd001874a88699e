"""Shards, manifests, folders and locks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_thoughts import store
from latent_thoughts.store import Stage, atomic, fingerprint, read_manifest, read_rows, run_lock, stage_key
from latent_thoughts.types import Manifest, UserError

SCHEMA = pa.schema([("n", pa.int64())])


@pytest.fixture(params=["here", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of this machine, and one of a store."""
    return tmp_path if request.param == "here" else request.getfixturevalue("bucket") / "run"


def manifest(key: str) -> Manifest:
    return Manifest("x", key, {}, {})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def complete(folder: Path, key: str, rows: int = 3) -> Manifest:
    stage = Stage(folder, "x", key)
    stage.write("a.parquet", [{"n": n} for n in range(rows)], SCHEMA, {"rows": rows})
    return stage.close(["a.parquet"], {"rows": rows})


# --- atomic writes


def test_an_exception_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "f").read_text() == "old"
    assert names(tmp_path) == {"f"}


def test_success_replaces_a_file_and_makes_its_folder(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic(tmp_path / "new" / "f") as temporary:
            temporary.write_text(text)
    assert (tmp_path / "new" / "f").read_text() == "two"
    assert names(tmp_path / "new") == {"f"}


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with atomic(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert names(tmp_path / "model") == {"two"}
    with pytest.raises(RuntimeError), atomic(tmp_path / "model") as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert names(tmp_path) == {"model"}
    assert names(tmp_path / "model") == {"two"}


def test_a_folder_that_is_replaced_is_there_until_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(text: str) -> None:
        with atomic(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / "f").write_text(text)

    def refusing(source: Path, target: Path) -> None:
        """The second of the two renames fails."""
        if target == tmp_path / "model" and not (source / "f").read_text() == "old":
            raise OSError("no")
        replace(source, target)

    write("old")
    replace = os.replace
    monkeypatch.setattr(os, "replace", refusing)
    with pytest.raises(OSError, match="no"):
        write("new")
    assert (tmp_path / "model" / "f").read_text() == "old"
    assert names(tmp_path) == {"model"}


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """As of a driver that was started again and a worker of the one before, on whatever machine."""
    with atomic(tmp_path / "model") as one:
        one.mkdir()
        (one / "of one").write_text("x")
        with atomic(tmp_path / "model") as other:
            other.mkdir()
            (other / "of the other").write_text("x")
        assert names(tmp_path / "model") == {"of the other"}
    assert names(tmp_path / "model") == {"of one"}
    assert names(tmp_path) == {"model"}


# --- keys


def test_the_key_depends_on_stage_config_inputs_and_format(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> list[str]:
        return [
            stage_key("train", {"lr": 1.0}, {"base": manifest("k")}),
            stage_key("sample", {"lr": 1.0}, {"base": manifest("k")}),
            stage_key("train", {"lr": 2.0}, {"base": manifest("k")}),
            stage_key("train", {"lr": 1.0}, {"base": manifest("l")}),
            stage_key("train", {"lr": 1.0}, {"other": manifest("k")}),
            stage_key("train", {"lr": 1.0}, {"base": replace(manifest("k"), counts={"skipped": [3]})}),
            stage_key("train", {"lr": 1.0}),
        ]

    before = keys()
    assert len(set(before)) == len(before)
    assert keys() == before
    monkeypatch.setattr(store, "FORMAT_VERSION", store.FORMAT_VERSION + 1)
    assert not set(keys()) & set(before)


def test_a_fingerprint_ignores_the_order_of_names_and_takes_any_string() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
    assert fingerprint("\ud800") != fingerprint("\ud801")


# --- a stage's folder


def test_a_shard_is_complete_or_absent(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "s", "x", "k")
    assert stage.done("a.parquet") is None
    with pytest.raises(pa.ArrowException):
        stage.write("a.parquet", [{"n": "not a number"}], SCHEMA, {})
    assert stage.done("a.parquet") is None
    assert names(tmp_path / "s") == {"stage.json"}
    stage.write("a.parquet", [{"n": 1}], SCHEMA, {"documents": 1})
    assert stage.done("a.parquet") == {"documents": 1}
    assert stage.manifest is None
    with pytest.raises(UserError, match="not complete"):
        read_manifest(tmp_path / "s")


def test_a_manifest_closes_the_stage_and_rows_come_back(anywhere: Path) -> None:
    written = complete(anywhere / "s", "k")
    assert read_manifest(anywhere / "s") == written
    assert Stage(anywhere / "s", "x", "k").manifest == written
    assert written.shards["a.parquet"]["rows"] == 3
    assert read_rows(anywhere / "s", written, "a.parquet") == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_another_keys_folder_is_set_aside_and_comes_back(anywhere: Path) -> None:
    first = complete(anywhere / "s", "k" * 64)
    assert Stage(anywhere / "s", "x", "l" * 64).manifest is None
    second = complete(anywhere / "s", "l" * 64, rows=5)
    assert Stage(anywhere / "s", "x", "k" * 64).manifest == first
    assert Stage(anywhere / "s", "x", "l" * 64).manifest == second
    assert names(anywhere) == {"s", "s." + "k" * 12}


def test_what_is_about_a_folder_goes_aside_and_comes_back_with_it(anywhere: Path) -> None:
    def claimed(key: str) -> set[str]:
        Stage(anywhere / "train", "train", key * 64, about=("evaluate", "tasks"))
        return names(anywhere)

    assert claimed("k") == {"train"}
    complete(anywhere / "train", "k" * 64)
    found = complete(anywhere / "evaluate", "e" * 64)
    assert claimed("k") == {"train", "evaluate"}
    assert claimed("l") == {"train", "train." + "k" * 12, "evaluate." + "k" * 12}
    complete(anywhere / "tasks" / "gsm8k", "t" * 64)
    assert claimed("k") == {"train", "train." + "l" * 12, "evaluate", "tasks." + "l" * 12}
    assert Stage(anywhere / "evaluate", "x", "e" * 64).manifest == found


def test_an_unfinished_folder_comes_back_with_its_shards(anywhere: Path) -> None:
    Stage(anywhere / "s", "x", "k").write("a.parquet", [{"n": 1}], SCHEMA, {"done": 1})
    Stage(anywhere / "s", "x", "l")
    assert Stage(anywhere / "s", "x", "k").done("a.parquet") == {"done": 1}


def test_a_claim_that_was_killed_does_not_bar_the_way_back(tmp_path: Path) -> None:
    """A is complete, B set it aside and was killed while it wrote its first file."""
    first = Stage(tmp_path / "train", "train", "aaaa")
    first.close([], {"n": 1})
    Stage(tmp_path / "train", "train", "bbbb")
    (tmp_path / "train" / "stage.json").rename(tmp_path / "train" / ".stage.json.123.tmp")
    back = Stage(tmp_path / "train", "train", "aaaa").manifest
    assert back is not None and back.counts == {"n": 1} and not list(tmp_path.glob("*/.*.tmp"))


def test_folders_of_unknown_origin_are_kept_every_time(tmp_path: Path) -> None:
    for text in ("one", "two"):
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "note").write_text(text)
        Stage(tmp_path / "s", "x", "k")
        assert names(tmp_path / "s") == {"stage.json"}
        (tmp_path / "s" / "stage.json").unlink()
        (tmp_path / "s").rmdir()
    assert {path.read_text() for path in tmp_path.glob("s.*/note")} == {"one", "two"}


def test_a_damaged_shard_and_a_missing_one_are_named(anywhere: Path) -> None:
    written = complete(anywhere / "s", "k")
    shard = anywhere / "s" / "a.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        read_rows(anywhere / "s", written, "a.parquet")
    shard.unlink()
    with pytest.raises(UserError, match=r"a\.parquet is damaged \(it is named by its manifest but missing"):
        read_rows(anywhere / "s", written, "a.parquet")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"", b"[]", b'{"stage": "x"}', b"null"])
@pytest.mark.parametrize("name", ["stage.json", "manifest.json"])
def test_garbage_in_a_marker_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    complete(tmp_path / "s", "k")
    (tmp_path / "s" / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        _ = Stage(tmp_path / "s", "x", "k").manifest


def test_json_round_trip(anywhere: Path) -> None:
    value = {"text": "ä 𝄞\n", "list": [1, None, 2.5]}
    store.write_json(anywhere / "v.json", value)
    assert store.read_json(anywhere / "v.json") == value
    assert json.loads((anywhere / "v.json").read_bytes()) == value


def test_names_that_are_no_unicode_come_back(tmp_path: Path) -> None:
    store.write_json(tmp_path / "v.json", {"malformed: /corpus/\udcff.jsonl:3": 1})
    assert store.read_json(tmp_path / "v.json") == {"malformed: /corpus/\udcff.jsonl:3": 1}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5), st.dictionaries(st.text(), JSON))
def test_any_rows_and_counts_come_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], counts: dict[str, object]
) -> None:
    schema = pa.schema([("text", pa.string())])
    stage = Stage(tmp_path_factory.mktemp("any") / "s", "x", "k")
    stage.write("a.parquet", [{"text": text} for text in texts], schema, counts)
    as_json = json.loads(json.dumps(counts))
    assert stage.done("a.parquet") == as_json
    written = stage.close(["a.parquet"], counts)
    assert read_manifest(stage.folder).counts == as_json
    assert [row["text"] for row in read_rows(stage.folder, written, "a.parquet")] == texts


@given(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_for_a_manifest_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../a.parquet", "/etc/passwd", "b/../../a.parquet"])
def test_no_name_in_a_manifest_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    value = {"stage": "x", "key": "k", "shards": {name: {"rows": 1, "sha256": ""}}, "counts": {}}
    store.write_sealed(tmp_path / "manifest.json", value)
    with pytest.raises(UserError, match="does not lie in it: do not use this folder"):
        read_manifest(tmp_path)


def test_a_manifest_of_an_earlier_version_has_no_seal(tmp_path: Path) -> None:
    value = {"stage": "x", "key": "k", "shards": {}, "counts": {}}
    store.write_json(tmp_path / "manifest.json", value)
    assert read_manifest(tmp_path) == Manifest("x", "k", {}, {})


# --- the run lock

HOLDER = """
import sys, time
from pathlib import Path
from latent_thoughts.store import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_folder_is_held_by_one_process_and_freed_when_it_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid}"), run_lock(tmp_path / "run"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with run_lock(tmp_path / "run"):
            assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
    finally:
        holder.kill()
        holder.wait()


def test_a_lock_is_let_go_of_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), run_lock(tmp_path):
        raise RuntimeError
    with run_lock(tmp_path), pytest.raises(UserError, match="in use"), run_lock(tmp_path):
        pass


# --- what a killed process left


def test_a_folder_that_a_killed_process_had_only_begun_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    folder.mkdir()
    (folder / ".stage.json.1.tmp").write_text("half")
    Stage(folder, "x", "k" * 64).close([], {})
    assert names(folder) == {"stage.json", "manifest.json"}
    assert names(tmp_path) == {"stage"}  # nothing set aside


def test_what_workers_are_writing_is_left_to_them_until_the_stage_closes(tmp_path: Path) -> None:
    folder, key = tmp_path / "stage", "k" * 64
    stage = Stage(folder, "x", key)
    stage.write("a.parquet", [{"n": 1}], SCHEMA, {})
    (folder / ".model.1.tmp").mkdir()
    (folder / ".model.1.tmp" / "weights").write_text("half")
    (folder / ".b.parquet.1.tmp").write_text("half")
    again = Stage(folder, "x", key)
    assert {".model.1.tmp", ".b.parquet.1.tmp"} < names(folder)
    again.close(["a.parquet"], {})
    assert names(folder) == {"a.parquet", "manifest.json", "stage.json"}
