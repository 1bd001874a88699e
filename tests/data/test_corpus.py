"""Training documents in a mapped file: the same documents, checked once, of any size."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_thoughts.data import corpus, records
from latent_thoughts.data.corpus import Corpus, Source
from latent_thoughts.data.records import DOCUMENTS
from latent_thoughts.store import Stage
from latent_thoughts.types import Chunk, ThoughtDocument, UserError

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(tuple)
CHUNKS = st.lists(st.tuples(IDS, st.lists(IDS, max_size=3).map(tuple), st.booleans()), max_size=4)


def document(name: str, chunks: list[Any]) -> ThoughtDocument:
    texts, thoughts, target = zip(*chunks, strict=True) if chunks else ((), (), ())
    made = tuple(Chunk(name, n, 0, "", ids) for n, ids in enumerate(texts))
    return ThoughtDocument(name, made, tuple(thoughts), tuple(target), "")


def stage(folder: Path, documents: list[ThoughtDocument], split: str = "corpus", size: int = 2) -> Source:
    made = Stage(folder, "sample", "key")
    names = [f"{split}-{n:05}.parquet" for n in range(-(-len(documents) // size))]
    for n, name in enumerate(names):
        made.write(name, [records.document_row(d) for d in documents[n * size : (n + 1) * size]], DOCUMENTS, {})
    made.close(names, {})
    return Source(folder, split)


@settings(max_examples=100, deadline=None)
@given(st.lists(CHUNKS, max_size=6))
def test_documents_come_back(made: list[list[Any]]) -> None:
    documents = [document(str(n), chunks) for n, chunks in enumerate(made)]
    found = Corpus.of(documents)
    assert [found[n] for n in range(len(found))] == documents
    for n, d in enumerate(documents):
        assert found.name(n) == d.id
        lengths = found.lengths(n)
        assert lengths.text == [len(c.ids) for c in d.chunks]
        assert lengths.thoughts == [[len(z) for z in kept] for kept in d.thoughts]


def test_a_file_of_several_sources_is_mapped_and_travels_to_workers_as_a_path(tmp_path: Path) -> None:
    one = [document(str(n), [((n, n + 1), ((7,),), True)]) for n in range(5)]
    two = [document(f"raw {n}", [((n,), (), False), ((), (), False)]) for n in range(3)]
    sources = [stage(tmp_path / "one", one), stage(tmp_path / "two", two)._replace(weight=0.5)]
    corpus.write(sources, tmp_path / "documents.arrow")
    found = Corpus.open(tmp_path / "documents.arrow")
    assert [found[n] for n in range(8)] == one + two
    assert found.weights.tolist() == [1.0] * 5 + [0.5] * 3
    travelled = pickle.dumps(found)
    assert len(travelled) < 1000
    assert [pickle.loads(travelled)[n] for n in range(8)] == one + two


@settings(max_examples=40, deadline=None)
@given(st.lists(CHUNKS, max_size=6))
def test_what_is_packed_column_by_column_is_what_stands_in_the_shards(
    tmp_path_factory: pytest.TempPathFactory, made: list[list[Any]]
) -> None:
    documents, folder = [document(str(n), chunks) for n, chunks in enumerate(made)], tmp_path_factory.mktemp("corpus")
    corpus.write([stage(folder / "one", documents)._replace(weight=0.3)], folder / "documents.arrow")
    packed = [shard.batch for shard in Corpus.open(folder / "documents.arrow").shards]
    expected = [Corpus.of(documents[n : n + 2], 0.3).shards[0].batch for n in range(0, len(documents), 2)]
    assert packed == expected


@pytest.mark.parametrize(("damage", "reason"), [("missing", "missing"), ("damaged", "checksum differs")])
def test_a_shard_that_is_missing_or_damaged_is_named(tmp_path: Path, damage: str, reason: str) -> None:
    source = stage(tmp_path / "one", [document(str(n), [((n,), (), True)]) for n in range(5)])
    path = source.folder / "corpus-00001.parquet"
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-9] + b"otherwise")
    with pytest.raises(UserError, match=f"corpus-00001.parquet is damaged .*{reason}"):
        corpus.write([source], tmp_path / "documents.arrow")
    assert not (tmp_path / "documents.arrow").exists()
