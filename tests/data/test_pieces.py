"""Pieces made ahead: what the shards would give, or not used."""

from __future__ import annotations

from pathlib import Path

import pytest

from latent_thoughts.data import pieces
from latent_thoughts.data.corpus import Corpus, write
from latent_thoughts.data.pieces import Ahead
from latent_thoughts.store import read_manifest
from latent_thoughts.types import UserError
from tests.data.test_corpus import document, stage

DOCUMENTS = [document(str(n), [((n, n + 1), ((7, n),), True), ((3,), (), False)]) for n in range(5)]


def packed(path: Path) -> list[object]:
    return [shard.batch for shard in Corpus.open(path).shards]


def test_a_corpus_of_pieces_is_that_of_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stage(tmp_path / "one", DOCUMENTS)._replace(weight=0.3)
    write([source], tmp_path / "documents.arrow")
    with Ahead(tmp_path / "ahead") as ahead:
        for name, told in read_manifest(source.folder).shards.items():
            ahead(source.folder, {name: told})
    monkeypatch.setattr(pieces, "checked_table", None)  # the shards are not read again
    write([source._replace(ahead=tmp_path / "ahead")], tmp_path / "again.arrow")
    assert packed(tmp_path / "again.arrow") == packed(tmp_path / "documents.arrow")
    pieces.forget(tmp_path / "ahead")
    assert not (tmp_path / "ahead").exists()


@pytest.mark.parametrize("at", [0, 40, -1])
def test_a_piece_that_is_damaged_or_of_another_shard_is_not_used(tmp_path: Path, at: int) -> None:
    source = stage(tmp_path / "one", DOCUMENTS)
    shards = read_manifest(source.folder).shards
    with Ahead(tmp_path / "ahead") as ahead:
        ahead(source.folder, shards)
    one, two, three = (tmp_path / "ahead" / told["sha256"] for told in shards.values())
    content = bytearray(one.read_bytes())
    content[at] ^= 4
    one.write_bytes(content)
    two.write_bytes(b"")
    three.unlink()
    write([source._replace(ahead=tmp_path / "ahead")], tmp_path / "documents.arrow")
    found = Corpus.open(tmp_path / "documents.arrow")
    assert [found[n] for n in range(5)] == DOCUMENTS


def test_a_shard_that_is_damaged_ends_the_stage_in_which_it_was_made(tmp_path: Path) -> None:
    source = stage(tmp_path / "one", DOCUMENTS)
    shards = read_manifest(source.folder).shards
    (source.folder / "corpus-00001.parquet").write_bytes(b"otherwise")
    with pytest.raises(UserError, match="corpus-00001.parquet is damaged"), Ahead(tmp_path / "ahead") as ahead:
        ahead(source.folder, shards)
