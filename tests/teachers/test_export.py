"""Thoughts as text: what is written is read back, by us and by `datasets`, and the card says where it came from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from loopback import Loopback, completion
from test_openai_api import thoughts

from latent_thoughts import cli
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
    from loopback import plain_reply

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
    return export(folder, run.folder, str(target), kind, "cc-by-4.0")


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


def test_the_card_names_the_stages_own_teacher(finished: Run, tmp_path: Path) -> None:
    """What `synthesize` was given by itself stands beside the run's recipe."""
    own = load_recipe(finished.folder / "recipe.yaml", ["synthesize.teacher.model=other"])
    save_recipe(own, finished.folder, "recipe.iter_00.synthesize.yaml")
    written(finished, tmp_path / "out", "dataset")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "the thoughts were written by `other` (openai)" in card and "`m`" not in card


def test_the_card_does_not_tell_where_things_lie(finished: Run, tmp_path: Path) -> None:
    placed = [
        "data.source=s3://secret-bucket/corpus/a.jsonl", "data.held_out_source=elsewhere/b.jsonl",
        "contamination.sets={exam: elsewhere/c.jsonl, answer: elsewhere/g.jsonl}",
        "synthesize.prompts=[elsewhere/d.yaml]", f"model.base={tmp_path}/e", "sample.raw_model=elsewhere/f",
        r"evaluate.answer='/ (\d+)/\d+'", r"data.extract={text: '~ (?P<rest>.*)/'}",
    ]  # fmt: skip
    recipe = load_recipe(finished.folder / "recipe.yaml", placed)
    folder = finished.synthesized("latent_thoughts")
    manifest = read_manifest(folder)
    manifest.counts["malformed: /home/me/a.jsonl:3: not valid JSON (somebody's words)"] = 1
    card = card_of(folder, manifest, recipe, "mit")
    for secret in ("secret-bucket", "elsewhere", "/home/me", "words", str(tmp_path)):
        assert secret not in card
    for part in ("source: a.jsonl", "held_out_source: b.jsonl", "exam: c.jsonl", "answer: g.jsonl", "- d.yaml",
                 "base: e", "raw_model: f", r"answer: / (\d+)/\d+", "text: ~ (?P<rest>.*)/"):  # fmt: skip
        assert part in card
    hub = load_recipe(finished.folder / "recipe.yaml", ["model.base=HuggingFaceTB/SmolLM2-135M", "data.source=hub:a/b"])
    assert "base: HuggingFaceTB/SmolLM2-135M" in card_of(folder, manifest, hub, "mit")
    assert "source: hub:a/b" in card_of(folder, manifest, hub, "mit")


def test_documents_without_thoughts_are_not_said_to_have_them(values: dict[str, Any], tmp_path: Path) -> None:
    """Prepared documents, with those that are held out apart; and paraphrases."""
    values["data"] |= {"held_out": 0.3, "warm_start": 0.7}
    with Loopback(
        lambda body: completion("It is said in other words. " + body["messages"][-1]["content"][-9:])
    ) as server:
        run = Run(resolve(values, [f"synthesize.teacher.base_url={server.url}"]), tmp_path / "run")
        save_recipe(run.recipe, run.folder)
        counts = run.prepare().counts
        run.synthesize("wrap_cot")
    sizes = {
        held_out: counts["held_out_documents"] if held_out else 20 - counts["held_out_documents"] for held_out in (0, 1)
    }
    for held_out, size in sizes.items():
        assert size > 0
        target = str(tmp_path / "rows.jsonl")
        assert export(run.prepared, run.folder, target, "jsonl", "mit", held_out=bool(held_out)) == size
    assert export(run.prepared, run.folder, str(tmp_path / "raw"), "dataset", "mit") == sizes[0]
    card = (tmp_path / "raw" / "README.md").read_text(encoding="utf-8")
    assert "# Documents, by" in card and "`latent` (null)" in card
    assert "thought" not in card.replace("latent-thoughts", "").replace("thought: null", "").replace(
        "thoughts: all", ""
    )
    export(run.synthesized("wrap_cot"), run.folder, str(tmp_path / "wrap"), "dataset", "mit")
    card = (tmp_path / "wrap" / "README.md").read_text(encoding="utf-8")
    assert "the texts are paraphrases (wrap_cot) by `m` (openai)" in card and "the thoughts were" not in card


@pytest.mark.parametrize(("name", "kind"), [("a.parquet", "parquet"), ("A.PARQUET", "parquet"), ("a.jsonl", "jsonl")])
def test_a_name_tells_the_format(
    finished: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, kind: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["latent-thoughts", "export", str(finished.folder), str(tmp_path / name)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert ((tmp_path / name).read_bytes()[:4] == b"PAR1") == (kind == "parquet")


def test_what_cannot_be_exported(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not complete"):
        export(tmp_path, finished.folder, "x", "jsonl", "mit")
    with pytest.raises(UserError, match="holds no documents: name a stage that does"):
        export(finished.base, finished.folder, str(tmp_path / "x"), "jsonl", "mit")
    assert not (tmp_path / "x").exists()
    (tmp_path / "kept").write_text("mine")
    held_out = rf"no held-out documents \(they are prepare's: --stage {finished.prepared}\)"
    for kind in ("jsonl", "parquet"):
        with pytest.raises(UserError, match=held_out):
            export(finished.synthesized("latent_thoughts"), finished.folder, str(tmp_path / "kept"), kind, "mit",
                   held_out=True)  # fmt: skip
    with pytest.raises(UserError, match=r"no held-out documents \(data\.held_out\)"):
        export(finished.prepared, finished.folder, str(tmp_path / "kept"), "jsonl", "mit", held_out=True)
    assert (tmp_path / "kept").read_text() == "mine"
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
