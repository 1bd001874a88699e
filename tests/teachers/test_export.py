"""Thoughts as text: what is written is read back, by us and by `datasets`, and the card says where it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from loopback import Loopback
from test_openai_api import thoughts

from latent_thoughts.config import load_recipe, resolve
from latent_thoughts.data import interchange, records
from latent_thoughts.em import Run
from latent_thoughts.export import card as card_of
from latent_thoughts.export import export
from latent_thoughts.provenance import save_recipe
from latent_thoughts.store import read_manifest
from latent_thoughts.types import UserError

STRANGE = "It follows. # Not a heading\n\n---\n<script>alert(1)</script> `x` “ﬂ” \u2028 end"


@pytest.fixture
def finished(make: Any) -> Run:
    from loopback import completion, plain_reply

    def reply(body: Any) -> Any:
        question = body["messages"][-1]["content"]
        return completion(STRANGE) if "Sentence 0 of document 7 " in question else plain_reply(body)

    with Loopback(reply) as server:
        run = make(server.url, "synthesize.failed=raw", "synthesize.checks.copied=raw")
        save_recipe(run.recipe, run.folder)
        run.synthesize()
    return run


def written(run: Run, target: Path, kind: str) -> int:
    folder = run.synthesized("latent_thoughts")
    return export(folder, run.base, run.folder / "recipe.yaml", str(target), kind, "cc-by-4.0")


def test_jsonl_goes_out_and_comes_back(finished: Run, values: dict[str, Any], tmp_path: Path) -> None:
    assert written(finished, tmp_path / "out.jsonl", "jsonl") == 20
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").open(encoding="utf-8")]
    for row in rows:
        assert "".join(chunk["suffix"] for chunk in row["chunks"]) == row["text"]
        assert all(set(chunk) == {"suffix", "latent"} for chunk in row["chunks"])
    values["data"] |= {"source": str(tmp_path / "out.jsonl"), "chunks": True, "id": "id"}
    values["synthesize"] = {"method": "oracle"}
    again = Run(resolve(values), tmp_path / "again")
    again.prepare()
    again.synthesize()
    assert thoughts(again) == thoughts(finished)
    texts = [
        {d.id: [c.text for c in d.chunks] for d in records.documents(r.prepared, "warm_start")}
        for r in (again, finished)
    ]
    assert texts[0] == texts[1]


def test_parquet_and_datasets_hold_the_same_rows(finished: Run, tmp_path: Path) -> None:
    import datasets

    for kind in ("jsonl", "parquet", "dataset"):
        assert written(finished, tmp_path / kind, kind) == 20
    rows = [json.loads(line) for line in (tmp_path / "jsonl").open(encoding="utf-8")]
    table = pq.read_table(tmp_path / "parquet")
    assert table.schema == interchange.SCHEMA and table.to_pylist() == rows
    assert datasets.load_from_disk(str(tmp_path / "dataset")).to_list() == rows


def test_the_card_tells_teacher_prompt_counts_recipe_and_license(finished: Run, tmp_path: Path) -> None:
    written(finished, tmp_path / "out", "dataset")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "cc-by-4.0"
    for part in ("written by `m` (openai)", "## Prompt `latent_thoughts`, version 1", "    kept: 60", "mean: 1"):
        assert part in body
    assert "127.0.0.1" not in card and "TEST_KEY" not in card
    elsewhere = load_recipe(finished.folder / "recipe.yaml", ["executor.address=10.1.2.3:6379"])
    folder = finished.synthesized("latent_thoughts")
    assert "10.1.2.3" not in card_of(folder, read_manifest(folder), elsewhere, "mit")


def test_what_cannot_be_exported(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not complete"):
        export(tmp_path, finished.base, finished.folder / "recipe.yaml", "x", "jsonl", "mit")
    with pytest.raises(UserError, match="holds no documents: name a stage that does"):
        export(finished.base, finished.base, finished.folder / "recipe.yaml", str(tmp_path / "x"), "jsonl", "mit")
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="no format 'csv'"):
        written(finished, tmp_path / "x", "csv")


def test_no_folder_is_lost_to_a_dataset(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(finished, tmp_path / "out", "dataset")
    written(finished, tmp_path / "out", "dataset")  # an earlier one is replaced
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "free").mkdir()
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "README.md").write_text("mine")
    monkeypatch.chdir(finished.folder)
    for target, why in (("../out", "holds notes.txt"), (".", "holds base"), ("../papers", "is no dataset")):
        with pytest.raises(UserError, match=f"^{target} {why}, and would be lost: name a folder"):
            written(finished, Path(target), "dataset")
        with pytest.raises(UserError, match="is a folder: name a file"):
            written(finished, Path(target), "jsonl")
    with pytest.raises(UserError, match="is a file: name a folder"):
        written(finished, Path("recipe.yaml"), "dataset")
    assert (finished.prepared / "manifest.json").exists()
    assert written(finished, tmp_path / "free", "dataset") == 20


@given(st.lists(st.tuples(st.text(), st.sampled_from(["", " ", "\n\n"]), st.none() | st.text()), max_size=6))
def test_chunks_find_their_places_in_the_text(parts: list[tuple[str, str, str | None]]) -> None:
    """White space that the chunks leave out is not lost, and thoughts stay with their chunks."""
    text = "".join(chunk + gap for chunk, gap, _ in parts)
    chunks = [{"suffix": chunk, "latent": latent} for chunk, _, latent in parts]
    if not parts and text:
        return
    pieces, found = interchange.pieces_of({"text": text, "chunks": chunks}, "row")
    assert "".join(pieces) == text
    assert [p.strip() for p in pieces] == [chunk.strip() for chunk, _, _ in parts]
    assert found == {n: latent for n, (_, _, latent) in enumerate(parts) if latent}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a b", "chunks": [{"suffix": "b"}]}, "chunk 0 does not follow in the text"),
        ({"text": "a b", "chunks": [{"suffix": "a"}]}, "goes on behind its last chunk"),
        ({"text": "a", "chunks": "a"}, "must be a list"),
        ({"text": "a"}, "must be a list"),
        ({"text": "a", "chunks": [{"suffix": "a", "latent": 3}]}, "must be text or null"),
    ],
)
def test_rows_of_another_layout_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"there:1: .*{message}"):
        interchange.pieces_of(row, "there:1")
