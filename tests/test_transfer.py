"""Copies into a store and back, and moves where there is no rename."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latent_thoughts import places, transfer
from latent_thoughts.store import atomic
from latent_thoughts.types import UserError
from tests.s3 import Store


def folder(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def held(path: Path) -> dict[str, bytes]:
    return {places.relative(p, path): places.content(p) for p in places.below(path)}


def test_a_folder_comes_back_as_it_was_put(tmp_path: Path, bucket: Path) -> None:
    made = folder(tmp_path / "made", weights="w", deep__config="c")
    assert not transfer.complete(bucket / "model")
    transfer.put(made, bucket / "model")
    assert transfer.complete(bucket / "model")
    copy = transfer.local(bucket / "model")
    assert held(copy) == held(made) and not places.remote(copy)
    assert transfer.local(made) == made


def test_a_folder_that_is_put_anew_has_nothing_left_of_the_old(tmp_path: Path, bucket: Path) -> None:
    transfer.put(folder(tmp_path / "one", a="1", b="2"), bucket / "model")
    first = transfer.local(bucket / "model")
    transfer.put(folder(tmp_path / "two", b="3"), bucket / "model")
    second = transfer.local(bucket / "model")
    assert held(second) == {"b": b"3"} and first != second and not first.exists()
    assert held(bucket / "model").keys() == {"b", "listing.json"}


def test_what_was_not_put_whole_is_not_read(tmp_path: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(transfer, "put_files", lambda source, target: places.write(target / "a", b"1"))
        broken.setattr(transfer, "sha256", _die)
        with pytest.raises(KeyboardInterrupt):
            transfer.put(folder(tmp_path / "one", a="1", b="2"), bucket / "model")
    assert (bucket / "model" / "a").exists() and not transfer.complete(bucket / "model")
    with pytest.raises(UserError, match="is not complete"):
        transfer.local(bucket / "model")
    transfer.put(tmp_path / "one", bucket / "model")
    assert held(transfer.local(bucket / "model")) == {"a": b"1", "b": b"2"}


def _die(path: Path) -> str:
    raise KeyboardInterrupt


def test_a_file_that_is_missing_or_is_not_what_was_put_is_named(tmp_path: Path, bucket: Path) -> None:
    transfer.put(folder(tmp_path / "one", a="1", b="2"), bucket / "model")
    places.write(bucket / "model" / "a", b"!")
    with pytest.raises(UserError, match=r"model/a is damaged"):
        transfer.local(bucket / "model")
    (bucket / "model" / "a").unlink()
    with pytest.raises(UserError, match="lacks a"):
        transfer.local(bucket / "model")


def test_only_what_is_wanted_is_copied_and_only_once(tmp_path: Path, bucket: Path) -> None:
    transfer.put(folder(tmp_path / "one", config="c", weights="w"), bucket / "model")
    copy = transfer.local(bucket / "model", lambda name: name == "config")
    assert held(copy) == {"config": b"c"}
    (copy / "config").write_text("still this one")
    assert transfer.local(bucket / "model") == copy
    assert held(copy) == {"config": b"still this one", "weights": b"w"}
    transfer.forget(bucket / "model")
    assert held(transfer.local(bucket / "model")) == {"config": b"c", "weights": b"w"}


def test_a_folder_or_file_that_others_put_there_is_copied_too(bucket: Path) -> None:
    folder(bucket / "theirs", config="c", deep__weights="w")
    assert held(transfer.local(bucket / "theirs")) == {"config": b"c", "deep/weights": b"w"}
    one = transfer.local(bucket / "theirs" / "config")
    assert one.name == "config" and one.read_text() == "c"
    places.write(bucket / "theirs" / "config", b"new")
    assert transfer.local(bucket / "theirs" / "config").read_text() == "new"


def test_an_exception_leaves_the_old_object_and_no_litter(tmp_path: Path, bucket: Path) -> None:
    (bucket / "f").write_text("old")
    with pytest.raises(RuntimeError), atomic(bucket / "f") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with atomic(bucket / "g") as temporary:
        temporary.write_text("new")
    assert held(bucket) == {"f": b"old", "g": b"new"}
    assert places.below(tmp_path / "cache") == []


class Died(Exception):
    pass


def changes(store: type, allowed: int) -> Iterator[Any]:
    """S3FileSystem._call_s3, which after so many changes of the store fails."""
    call, left = store._call_s3, [allowed]

    async def counted(self: Any, method: str, *rest: Any, **request: Any) -> Any:
        if method in ("put_object", "copy_object", "delete_object", "delete_objects"):
            left[0] -= 1
            if left[0] < 0:
                raise Died
        return await call(self, method, *rest, **request)

    yield counted


def test_a_move_that_ends_anywhere_is_finished_by_whoever_comes_next(
    s3: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost on the way, and what makes a folder complete is never there without the rest."""
    from s3fs import S3FileSystem

    files = {"b/c": b"2", "manifest.json": b"m"}
    ended = steps = 0
    while ended == steps:
        root = s3.bucket()
        for name, data in files.items():
            places.write(root / "s" / name, data)
        with monkeypatch.context() as dying:
            dying.setattr(S3FileSystem, "_call_s3", next(changes(S3FileSystem, steps)))
            try:
                transfer.move(root / "s", root / "s.key", root / ".s.moving.json", "manifest.json")
            except Died:
                ended += 1
        source, target = held(root / "s"), held(root / "s.key")
        assert {**source, **target} == files
        for part in (source, target):
            assert part == files or "manifest.json" not in part
        transfer.settle(root / ".s.moving.json", "manifest.json")
        if steps:  # else it had not begun
            assert held(root) == {f"s.key/{name}": data for name, data in files.items()}
        steps += 1
    assert steps >= 6


def test_faults_of_the_store_change_nothing(s3: Store, bucket: Path, tmp_path: Path) -> None:
    made = folder(tmp_path / "made", **{f"f{n}": "x" * 1000 * n for n in range(8)})
    with s3.faults(0.2) as met:
        transfer.put(made, bucket / "one")
        transfer.move(bucket / "one", bucket / "two", bucket / "note", "listing.json")
        copy = transfer.local(bucket / "two")
    assert held(copy) == held(made)
    assert met.total() >= 5, met
