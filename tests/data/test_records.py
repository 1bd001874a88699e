"""Documents and posteriors survive being stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_thoughts.data import records
from latent_thoughts.store import Stage
from latent_thoughts.types import Chunk, Draw, Posterior, ScoredDraw, ThoughtDocument, UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(tuple)


@st.composite
def thought_documents(draw: st.DrawFn) -> ThoughtDocument:
    name, count, chunks, start = draw(TEXT), draw(st.integers(0, 4)), [], 0
    for index in range(count):
        text = draw(TEXT)
        chunks.append(Chunk(name, index, start, text, draw(IDS)))
        start += len(text)
    thoughts = tuple(tuple(draw(st.lists(IDS, max_size=3))) for _ in range(count))
    target = tuple(draw(st.booleans()) for _ in range(count))
    meta = draw(st.dictionaries(TEXT, st.none() | st.booleans() | st.integers(-9, 9) | TEXT, max_size=3))
    return ThoughtDocument(name, tuple(chunks), thoughts, target, draw(TEXT), meta)


def stored(rows: list[dict[str, Any]], schema: pa.Schema) -> list[dict[str, Any]]:
    sink = pa.BufferOutputStream()
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    return pq.read_table(pa.BufferReader(sink.getvalue())).to_pylist()


@settings(max_examples=60, deadline=None)
@given(st.lists(thought_documents(), min_size=1, max_size=3))
def test_documents_come_back_as_they_were(documents: list[ThoughtDocument]) -> None:
    """An empty thought and none at all are told apart."""
    rows = stored([records.document_row(document) for document in documents], records.DOCUMENTS)
    assert [records.document_of(row) for row in rows] == documents


def test_oracle_thoughts_keep_their_chunks() -> None:
    document = ThoughtDocument("d", (), (), (), "raw", {"oracle": {0: "a", 12: "b"}})
    [row] = stored([records.document_row(document)], records.DOCUMENTS)
    assert records.oracle(records.document_of(row)) == {0: "a", 12: "b"}
    assert records.oracle(ThoughtDocument("d", (), (), (), "raw")) == {}


def scored(ids: tuple[int, ...], finish: str, score: float) -> ScoredDraw:
    return ScoredDraw(Draw(ids, (score,) * len(ids), finish), "prior", score, score - 1, score - 2, score - 3)


def test_a_posterior_keeps_its_draws_weights_and_choice() -> None:
    draws = (scored((5, 6), "end", -1.5), scored((7,), "length", -math.inf), scored((5, 6), "end", -1.5))
    posterior = Posterior(
        chunk=Chunk("d", 3, 17, "text", (8, 9)),
        context_ids=(1, 2),
        draws=draws,
        log_weights=np.array([-0.25, -math.inf, -0.25]),
        gains=np.array([0.5, math.nan, 0.5]),
        kept=(2, 0),
        raw_logprob=-4.0,
        gap=0.0,
    )
    [row] = stored([records.posterior_row(posterior, lambda ids: "-".join(map(str, ids)))], records.POSTERIORS)
    assert (row["doc_id"], row["chunk_index"], row["chunk_ids"], row["context_ids"]) == ("d", 3, [8, 9], [1, 2])
    assert [d["ids"] for d in row["draws"]] == [[5, 6], [7], [5, 6]]
    assert [d["text"] for d in row["draws"]] == ["5-6", "7", "5-6"]
    assert [d["finished"] for d in row["draws"]] == [True, False, True]
    assert [row["draws"][0][name] for name in ("log_posterior", "log_prior", "log_x", "log_q")] == [
        -1.5,
        -2.5,
        -3.5,
        -4.5,
    ]
    assert row["log_weights"] == [-0.25, -math.inf, -0.25]
    assert row["gains"][0] == 0.5 and math.isnan(row["gains"][1])
    assert (row["chosen"], row["raw_logprob"], row["distinct"]) == (2, -4.0, 1)
    assert row["ess"] == pytest.approx(2.0)


def test_splits_are_read_shard_by_shard(tmp_path: Path) -> None:
    def document(name: str) -> ThoughtDocument:
        return ThoughtDocument(name, (Chunk(name, 0, 0, "t", (4,)),), ((),), (True,), "raw")

    stage = Stage(tmp_path / "s", "prepare", "k")
    shards = {"corpus-00000.parquet": "ab", "corpus-00001.parquet": "c", "held_out-00000.parquet": "d"}
    for shard, ids in shards.items():
        stage.write(shard, [records.document_row(document(i)) for i in ids], records.DOCUMENTS, {})
    with pytest.raises(UserError, match="not complete"):
        records.documents(tmp_path / "s", "corpus")
    stage.close(list(shards), {})
    assert [d.id for d in records.documents(tmp_path / "s", "corpus")] == ["a", "b", "c"]
    assert [name for name, _ in records.shards(tmp_path / "s", "held_out")] == ["held_out-00000.parquet"]
    assert records.documents(tmp_path / "s", "warm_start") == []
