"""Names of places: here, behind URLs, and those that are refused."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from latent_thoughts import places
from latent_thoughts.config import resolve
from latent_thoughts.places import below, place
from latent_thoughts.types import UserError
from tests.s3 import Store


def test_a_name_without_a_protocol_is_a_path_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    assert place("runs/demo") == Path("runs/demo") and place("~/run") == Path("/home/x/run")
    assert place("file:///tmp/x") == Path("/tmp/x") and place("world:castle") == Path("world:castle")
    assert not places.remote(place("runs/demo"))


@pytest.mark.parametrize("name", ["s3://bucket/run/iter_01", "hf://datasets/me/set@main/run", "memory://run/x"])
def test_a_url_is_a_path_of_its_store(name: str) -> None:
    path = place(name)
    assert places.remote(path) and places.remote(path / "more") and str(path / "more") == f"{name}/more"
    assert path.name == name.rpartition("/")[2] and str(path.with_name("other")) == f"{name.rpartition('/')[0]}/other"


KEYED = [
    "s3://AKIAKEY:hidden@bucket/run",
    "s3://hidden@bucket/run",
    "gs://user:hidden@bucket",
    "hf://me:hidden@datasets/me/set",
    "s3://bucket/run?AWSAccessKeyId=hidden&Signature=hidden",
    "https://host/file.jsonl?X-Amz-Security-Token=hidden",
    "S3://AKIAKEY:hidden@bucket/run",
    "disk:s3://AKIAKEY:hidden@bucket/run",
    "simplecache::s3://AKIAKEY:hidden@bucket/run",
]


@pytest.mark.parametrize("url", KEYED)
def test_a_url_with_keys_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="holds keys") as error:
        place(url)
    assert "hidden" not in str(error.value)
    for recipe in ({"data": {"source": url}}, {"evaluate": {"tasks": [{"name": "gsm8k", "data": url}]}}):
        with pytest.raises(UserError, match="holds keys") as error:
            resolve(recipe)
        assert "hidden" not in str(error.value)
    with pytest.raises(UserError, match=r"sample\.raw_model is a URL that holds keys"):
        resolve({}, [f"sample.raw_model={url}"])


@pytest.mark.parametrize("url", ["hf://name@main/x", "s3://bucket/a@b", "https://host/x?split=train", "world:castle"])
def test_other_urls_are_not(url: str) -> None:
    assert not places.holds_keys(url)


@pytest.mark.parametrize(
    ("name", "told"), [("s3://bucket//run", "between two slashes is empty"), ("xx\udcff", "has to be UTF-8")]
)
def test_a_name_that_libraries_take_for_another_is_refused(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        place(name)


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.md").write_text("b")
    assert [path.name for path in below(tmp_path)] == ["a.md", "b.md"] and below(tmp_path / "nothing") == []
    scan = os.scandir

    def kept(path: Path) -> Any:
        if Path(path).name == "more":  # root may read everything
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", kept)
    with pytest.raises(PermissionError):
        below(tmp_path)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    assert fsspec.get_filesystem_class("memory")
    monkeypatch.setattr(sys.modules["fsspec.registry"], "registry", {})
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs:// needs an extra: pip install 'latent-thoughts\[gs\]'"):
        place("gs://bucket/run")
    with pytest.raises(UserError, match="no kind of storage is called gopher"):
        place("gopher://bucket/run")


def test_reading_is_the_same_here_and_in_a_store(tmp_path: Path, bucket: Path) -> None:
    for root in (tmp_path, bucket):
        for name in ("a.txt", "b/c.txt", "b/d.json"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"one\ntwo\n" + name.encode())
        assert [p.name for p in places.below(root)] == ["a.txt", "c.txt", "d.json"]
        assert [str(p) for p in places.below(root / "a.txt")] == [str(root / "a.txt")]
        assert places.below(root / "none") == []
        with places.opened(root / "b" / "c.txt") as file:
            assert list(file) == [b"one\n", b"two\n", b"b/c.txt"]
        assert places.content(root / "a.txt") == b"one\ntwo\na.txt"
        with pytest.raises(FileNotFoundError):
            places.content(root / "none")
        before = places.version(root / "a.txt")
        assert before == places.version(root / "a.txt") != places.version(root / "b" / "c.txt")
        (root / "a.txt").write_bytes(b"changed")
        assert places.version(root / "a.txt") != before
    assert [str(p) for p in places.matching(bucket / "b" / "*.txt")] == [f"{bucket}/b/c.txt"]


def test_a_store_that_cannot_be_reached_is_told_in_one_line(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place("s3://no-such-bucket-anywhere/x")
    with pytest.raises(UserError, match=r"s3://no-such-bucket-anywhere/x cannot be written"):
        places.write(path, b"x")
