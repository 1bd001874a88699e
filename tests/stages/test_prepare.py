"""From a source to tokenised shards: splits, counts, refusals, and doing nothing twice."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from latent_thoughts.config import Recipe, resolve
from latent_thoughts.data import chunking, records
from latent_thoughts.data.tokenizer import CONTROL_TOKENS, Codec
from latent_thoughts.em.run import Run
from latent_thoughts.model import load_tokenizer
from latent_thoughts.stages.prepare import SPLITS, initialise, prepare, split_of
from latent_thoughts.store import read_manifest, same_base
from latent_thoughts.types import Document, Manifest, UserError

TINY = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
TEXTS = [f"Document {n} begins. It goes on!\nIt has {n} parts, and ends" for n in range(120)]


def byte_tokenizer(folder: Path, lower: bool = False) -> Path:
    """One token a byte; with `lower` it loses capitals, as normalising tokenizers do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(["<eos>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if lower:
        core.normalizer = normalizers.Lowercase()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
    return folder


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return {
        "data": {
            "source": str(jsonl(tmp_path / "a.jsonl", TEXTS)),
            "held_out": 0.2,
            "warm_start": 0.5,
            "shard_documents": 25,
        },
        "chunking": {"mean": 2, "max_tokens": 64},
        "model": {"base": TINY, "tokenizer": str(byte_tokenizer(tmp_path / "tokenizer"))},
    }


def run(recipe: Recipe, folder: Path) -> Manifest:
    return prepare(recipe, folder / "base", initialise(recipe, folder / "base"), folder / "prepare")


def prepared(recipe: Recipe, folder: Path) -> dict[str, list[Any]]:
    run(recipe, folder)
    return {split: [d for _, part in records.shards(folder / "prepare", split) for d in part] for split in SPLITS}


def texts_of(documents: dict[str, list[Any]]) -> dict[str, set[str]]:
    return {split: {"".join(c.text for c in d.chunks) for d in found} for split, found in documents.items()}


def test_chunks_give_text_and_ids_of_every_document(values: dict[str, Any], tmp_path: Path) -> None:
    recipe = resolve(values)
    documents = prepared(recipe, tmp_path / "run")
    codec = Codec(load_tokenizer(tmp_path / "run" / "base" / "model")[0])
    seen = []
    for document in (d for found in documents.values() for d in found):
        text = "".join(chunk.text for chunk in document.chunks)
        assert codec.decode([i for chunk in document.chunks for i in chunk.ids]) == text
        for n, chunk in enumerate(document.chunks):
            assert (chunk.doc_id, chunk.index) == (document.id, n)
            assert text[chunk.start : chunk.start + len(chunk.text)] == chunk.text
            assert list(chunk.ids) == codec.encode(chunk.text)
            assert len(chunk.ids) <= 64
        assert document.thoughts == ((),) * len(document.chunks)
        assert document.target == (True,) * len(document.chunks)
        seen.append(text)
    assert sorted(seen) == sorted(TEXTS)


def test_splits_have_their_shares_and_do_not_depend_on_order(values: dict[str, Any], tmp_path: Path) -> None:
    found = texts_of(prepared(resolve(values), tmp_path / "run"))
    assert 10 < len(found["held_out"]) < 40
    assert abs(len(found["warm_start"]) - len(found["corpus"])) < 35
    shuffled = [*TEXTS, "One more."]
    random.Random(0).shuffle(shuffled)
    jsonl(tmp_path / "a.jsonl", shuffled)
    again = texts_of(prepared(resolve(values, ["seed=5", "data.shard_documents=7"]), tmp_path / "other"))
    assert all(found[split] == again[split] - {"One more."} for split in SPLITS)


def test_a_larger_held_out_share_keeps_what_was_held_out() -> None:
    few, many = (resolve({"data": {"held_out": share, "warm_start": 0.5}}) for share in (0.1, 0.3))
    documents = [Document(str(n), text) for n, text in enumerate(TEXTS)]
    splits = [(split_of(d, few.data), split_of(d, many.data)) for d in documents]
    assert all(b == "held_out" for a, b in splits if a == "held_out")
    assert all(a == b for a, b in splits if b != "held_out")


def test_a_worlds_own_split_is_kept() -> None:
    assert split_of(Document("d", "x", {"split": "held_out"}), resolve({"data": {"held_out": 0}}).data) == "held_out"


def test_held_out_documents_may_come_from_a_source_of_their_own(values: dict[str, Any], tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", TEXTS)
    apart = [*TEXTS[:3], "Not one of them. It is asked alone."]
    jsonl(tmp_path / "b.jsonl", apart)
    values["data"] |= {"held_out_source": str(tmp_path / "b.jsonl"), "limit": len(TEXTS) - 1}
    run(resolve(values), tmp_path / "run")
    found = texts_of(prepared(resolve(values), tmp_path / "run"))
    assert found["held_out"] == set(apart)
    # the limit is theirs, and what is held out is left out
    assert found["warm_start"] | found["corpus"] == set(TEXTS[3:-1])
    jsonl(tmp_path / "b.jsonl", apart[:2])
    run(resolve(values), tmp_path / "run")  # a changed file is prepared anew
    assert len(prepared(resolve(values), tmp_path / "run")["held_out"]) == 2


def test_what_repeats_is_told_by_its_text_and_nothing_is_lost_to_its_name(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """Files that all count from 0, and texts that come again under another name, held-out ones among them."""
    for name, texts in {"a": TEXTS, "b": [f"Another {text}" for text in TEXTS[:9]], "c": TEXTS[5:8]}.items():
        rows = [{"id": n, "text": text} for n, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["data"] |= {"source": str(tmp_path / "[ab].jsonl"), "held_out_source": str(tmp_path / "c.jsonl"), "id": "id"}
    manifest, documents = run(resolve(values), tmp_path / "run"), prepared(resolve(values), tmp_path / "run")
    found = texts_of(documents)
    assert found["held_out"] == set(TEXTS[5:8])
    assert found["warm_start"] | found["corpus"] == {*TEXTS[:5], *TEXTS[8:], *(f"Another {text}" for text in TEXTS[:9])}
    assert (manifest.counts["duplicates"], manifest.counts["renamed"]) == (3, 9)
    names = [d.id for part in documents.values() for d in part]
    assert len(set(names)) == len(names) == 129 and {"0", "1", "2", "119"} <= set(names)
    again = prepared(resolve(values), tmp_path / "again")
    assert {s: [d.id for d in part] for s, part in documents.items()} == {
        s: [d.id for d in part] for s, part in again.items()
    }


@pytest.mark.parametrize("name", [None, "name"])
def test_a_text_may_come_again_with_other_thoughts_in_the_warm_start(
    name: str | None, values: dict[str, Any], tmp_path: Path
) -> None:
    """As in data that have several solutions of a question; elsewhere thoughts are not used, and texts come once."""
    rows = [
        {"name": n % 7, "text": text, "why": why} for n, text in enumerate(TEXTS) for why in ("This.", "That.", "This.")
    ]
    rows += [{"name": 0, "text": text, "why": None} for text in TEXTS]
    for file, there in {"a": rows, "b": rows[:27:3]}.items():
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in there))
    apart = {"held_out_source": str(tmp_path / "b.jsonl"), "warm_start": 0.5}
    values["data"] |= {"pieces": ["{text}"], "thought": "{why}", "id": name} | apart
    values["chunking"] = {"mode": "pieces"}
    manifest, documents = run(resolve(values), tmp_path / "run"), prepared(resolve(values), tmp_path / "run")
    taught = [(d.chunks[0].text, thought) for d in documents["warm_start"] for thought in records.oracle(d).values()]
    texts = {text for text, _ in taught}
    assert sorted(taught) == sorted((text, why) for text in texts for why in ("This.", "That."))
    assert len(documents["corpus"]) + len(texts) == len(TEXTS) - 9 and texts.isdisjoint(TEXTS[:9]) and len(texts) > 9
    assert manifest.counts["duplicates"] == len(rows) - len(documents["corpus"]) - len(taught)
    names = [d.id for part in documents.values() for d in part]
    assert len(set(names)) == len(names)


def test_a_world_may_repeat_itself(values: dict[str, Any], tmp_path: Path) -> None:
    values["data"] = {"source": "world:castle", "world": {"documents": 400, "teacher_documents": 0}}
    values["model"]["tokenizer"] = "world"
    counts = run(resolve(values), tmp_path / "run").counts
    assert counts["corpus_documents"] == 400 and not {"duplicates", "renamed"} & counts.keys()


def test_a_world_holds_out_its_own(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="a world holds out problems of its own"):
        resolve({"data": {"source": "world:castle", "held_out_source": "b.jsonl"}})


def test_counts_add_up(values: dict[str, Any], tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [*TEXTS, "", TEXTS[3], TEXTS[4], ""])
    manifest = run(resolve(values), tmp_path / "run")
    counts, found = manifest.counts, prepared(resolve(values), tmp_path / "run")
    assert (counts["duplicates"], counts["empty"]) == (2, 2)
    for split, documents in found.items():
        chunks = [chunk for d in documents for chunk in d.chunks]
        assert counts[f"{split}_documents"] == len(documents) > 0
        assert counts[f"{split}_chunks"] == len(chunks)
        assert counts[f"{split}_tokens"] == sum(len(chunk.ids) for chunk in chunks)
        rows = [shard["rows"] for name, shard in manifest.shards.items() if name.startswith(f"{split}-")]
        assert sum(rows) == len(documents) and all(n == 25 for n in rows[:-1])


def test_white_space_alone_is_no_document(values: dict[str, Any], tmp_path: Path) -> None:
    values["data"]["source"] = str(tmp_path / "blank.jsonl")
    jsonl(tmp_path / "blank.jsonl", ["", " \n", "\t", "One. Two."])
    counts = run(resolve(values), tmp_path / "run").counts
    assert counts["empty"] == 3 and sum(counts.get(f"{split}_documents", 0) for split in SPLITS) == 1


def test_other_ends_of_sentences_make_a_new_stage(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(resolve(values), tmp_path / "run").key
    monkeypatch.setattr(chunking, "SENTENCES", chunking.SENTENCES + 1)
    assert run(resolve(values), tmp_path / "run").key != first


def test_malformed_rows_are_counted_and_the_first_of_them_named(values: dict[str, Any], tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{\n" * 50)
    with pytest.raises(UserError, match=r"a\.jsonl:121"):
        run(resolve(values), tmp_path / "run")
    counts = run(resolve(values, ["data.malformed=skip"]), tmp_path / "run").counts
    assert counts["malformed"] == 50
    named = [name for name in counts if name.startswith("malformed: ")]
    assert len(named) == 20 and "a.jsonl:121" in named[0]


def test_a_chunk_that_is_too_long_is_split_or_refused(values: dict[str, Any], tmp_path: Path) -> None:
    values["chunking"] = {"mode": "document", "max_tokens": 20}
    documents = prepared(resolve(values), tmp_path / "run")
    assert {len(d.chunks) > 1 for found in documents.values() for d in found} == {True}
    assert set.union(*texts_of(documents).values()) == set(TEXTS)
    with pytest.raises(UserError, match=r"document \w+: a chunk of \d+ tokens is longer than chunking\.max_tokens=20"):
        run(resolve(values, ["chunking.oversize=refuse"]), tmp_path / "other")


def test_a_tokenizer_that_changes_the_text_is_refused_or_its_documents_skipped(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["model"]["tokenizer"] = str(byte_tokenizer(tmp_path / "lower", lower=True))
    jsonl(tmp_path / "a.jsonl", ["small letters.", "Capitals."])
    with pytest.raises(UserError, match=r"document \w+: the tokenizer does not give its text back"):
        run(resolve(values), tmp_path / "run")
    manifest = run(resolve(values, ["data.malformed=skip"]), tmp_path / "run")
    assert manifest.counts["malformed"] == 1
    assert sum(manifest.counts.get(f"{split}_documents", 0) for split in SPLITS) == 1


def test_what_is_left_of_a_folder_is_said(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set" / "a.jsonl", TEXTS)
    for name in ("README.md", "_SUCCESS", "b.txt", "c.txt"):
        (tmp_path / "set" / name).write_text("x")
    values["data"]["source"] = str(tmp_path / "set")
    assert len(set.union(*texts_of(prepared(resolve(values), tmp_path / "run")).values())) == len(TEXTS)
    assert "set: README.md, _SUCCESS, b.txt and 1 more left out" in capsys.readouterr().err


def test_a_source_without_documents_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(UserError, match="holds no documents"):
        run(resolve(values), tmp_path / "run")


def test_oracle_thoughts_stand_aside_at_their_chunk(values: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"title": "", "question": "What is it?\n", "answer": "It is a rather long answer. Yes.", "why": "because"},
        {"title": "T. ", "question": "And this?\n", "answer": "Short.", "why": "so"},
        {"title": "T. ", "question": "And nothing?\n", "answer": "", "why": "lost"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["data"] |= {"pieces": ["{title}", "{question}", "{answer}"], "thought": "{why}"}
    values["chunking"] = {"mode": "pieces", "thoughts": "last", "max_tokens": 20}
    found = {d.chunks[-1].text: d for found in prepared(resolve(values), tmp_path / "run").values() for d in found}
    by_question = {"".join(c.text for c in d.chunks).split("?")[0]: d for d in found.values()}
    first, second, third = by_question["What is it"], by_question["T. And this"], by_question["T. And nothing"]
    assert all(chunk.text for d in found.values() for chunk in d.chunks)
    assert len(first.chunks) == 3 and records.oracle(first) == {1: "because"}  # before all of a piece that is split
    assert first.target == (False, True, False)
    assert len(second.chunks) == 3 and records.oracle(second) == {2: "so"}
    assert records.oracle(third) == {}


def test_a_second_call_does_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    recipe = resolve(values)
    first = run(recipe, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert run(recipe, tmp_path / "run") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_what_a_kill_right_after_the_manifest_left_goes(values: dict[str, Any], tmp_path: Path) -> None:
    first = run(resolve(values), tmp_path / "run")
    left = next((tmp_path / "run").rglob("prepare/manifest.json")).with_name("read.json")
    left.write_text("{}")
    assert run(resolve(values), tmp_path / "run") == first and not left.exists()


@pytest.mark.parametrize("override", ["chunking.seed=3", "data.held_out=0.3", "model.dtype=bfloat16"])
def test_another_setting_makes_a_new_stage(values: dict[str, Any], tmp_path: Path, override: str) -> None:
    first = run(resolve(values), tmp_path / "run")
    second = run(resolve(values, [override]), tmp_path / "run")
    assert first.key != second.key
    assert run(resolve(values), tmp_path / "run") == first


def test_documents_of_another_base_model_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    """Where a stage is forgotten, its ids would mean other words to the model."""
    values["data"] = {"source": "world:castle", "world": {"documents": 40, "teacher_documents": 20}}
    values["model"]["tokenizer"] = "world"
    values["chunking"] = {"mode": "pieces", "thoughts": "last"}
    first, other = resolve(values), resolve(values, ["model.dtype=bfloat16"])
    made = Run(first, tmp_path / "run")
    assert made.prepare().base == made.synthesize().base == read_manifest(made.base).key
    initialise(other, made.base)
    with pytest.raises(UserError, match="documents of prepare are of another base model: run prepare again"):
        Run(other, made.folder).synthesize()
    with pytest.raises(UserError, match="documents of synthesize are of another base model: run synthesize again"):
        same_base(read_manifest(made.base), read_manifest(made.synthesized("oracle")))
    Run(other, made.folder).prepare()
    Run(other, made.folder).synthesize()


@pytest.mark.parametrize("override", ["data.source=none.jsonl", "contamination.sets={a: none.jsonl}"])
def test_a_base_model_is_not_made_anew_where_its_documents_cannot_be(
    values: dict[str, Any], tmp_path: Path, override: str
) -> None:
    first = run(resolve(values), tmp_path / "run")
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        run(resolve(values, ["model.dtype=bfloat16", override]), tmp_path / "run")
    assert read_manifest(tmp_path / "run" / "base").key == first.base


def test_a_changed_source_file_makes_a_new_stage(values: dict[str, Any], tmp_path: Path) -> None:
    recipe = resolve(values)
    first = run(recipe, tmp_path / "run")
    source = Path(values["data"]["source"])
    content = source.read_text()
    source.write_text(content.replace("Document 7 begins", "Document 7 starts"))
    second = run(recipe, tmp_path / "run")
    assert first.key != second.key
    assert any(
        "Document 7 starts" in text for found in texts_of(prepared(recipe, tmp_path / "run")).values() for text in found
    )
    source.write_text(content)
    assert run(recipe, tmp_path / "run") == first


def test_a_changed_data_set_on_disk_makes_a_new_stage(values: dict[str, Any], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    values["data"]["source"] = f"disk:{tmp_path}/set"
    keys = []
    for texts in (TEXTS, TEXTS[:-1]):
        datasets.Dataset.from_list([{"text": text} for text in texts]).save_to_disk(tmp_path / "set")
        keys.append(run(resolve(values), tmp_path / "run").key)
    assert keys[0] != keys[1]
    shutil.rmtree(tmp_path / "set")  # or not mounted: what was made of it stays where it is
    with pytest.raises(UserError, match=r"^disk:.*set does not exist: correct data\.source"):
        run(resolve(values), tmp_path / "run")
    assert (tmp_path / "run" / "prepare" / "manifest.json").exists()


def test_a_changed_tokenizer_folder_makes_a_new_start(values: dict[str, Any], tmp_path: Path) -> None:
    first = initialise(resolve(values), tmp_path / "base")
    assert initialise(resolve(values), tmp_path / "base") == first
    byte_tokenizer(tmp_path / "tokenizer", lower=True)
    assert initialise(resolve(values), tmp_path / "base").key != first.key


def test_an_interrupted_stage_is_finished_by_the_next_call(values: dict[str, Any], tmp_path: Path) -> None:
    recipe = resolve(values)
    whole = run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "run")
    (tmp_path / "run" / "prepare" / "manifest.json").unlink()
    (tmp_path / "run" / "prepare" / "corpus-00001.parquet").unlink()
    assert run(recipe, tmp_path / "run") == whole


def test_a_world_is_prepared_with_its_words(small: dict[str, Any], tmp_path: Path) -> None:
    documents = prepared(resolve(small), tmp_path / "run")
    assert len(documents["warm_start"]) == 20 and len(documents["corpus"]) == 40
    for document in documents["corpus"]:
        assert len(document.chunks) == 2 and document.target == (False, True)
        assert set(records.oracle(document)) == {1}


ODD = [
    *[*CONTROL_TOKENS, "<eos>", "<s>", "\x00", "\r\n", "\r", "\n", "\u2028", "\ufeff", "\ufffd", "e\u0301", ". ", "! "],
    *[
        "。",
        " ",
        "\t",
        "{text}",
        "\\ud800",
        '"',
        "word",
        "Zwölf",
        "𝄞",
        "\u202e",
        "\x1b[31m",
        "\U0001f468\u200d\U0001f469",
    ],
]


def odd_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)

    def part() -> str:
        if rng.random() < 0.7:
            return rng.choice(ODD)
        point = rng.randrange(0x110000)
        return "?" if 0xD800 <= point < 0xE000 else chr(point)

    return [f"{n}" + "".join(part() for _ in range(rng.randrange(40))) for n in range(count)]


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_odd_documents_come_out_as_they_went_in(values: dict[str, Any], tmp_path: Path, count: int) -> None:
    """From JSONL to shards of chunks and ids, and back."""
    texts = odd_texts(count, 0)
    jsonl(tmp_path / "a.jsonl", texts)
    recipe = resolve(values, ["data.shard_documents=200", "chunking.max_tokens=32"])
    run(recipe, tmp_path / "run")
    codec = Codec(load_tokenizer(tmp_path / "run" / "base" / "model")[0])
    controls = {codec.tokenizer.get_vocab()[token] for token in (*CONTROL_TOKENS, "<eos>")}
    seen = []
    for split in SPLITS:
        for document in records.documents(tmp_path / "run" / "prepare", split):
            text = "".join(chunk.text for chunk in document.chunks)
            ids = [i for chunk in document.chunks for i in chunk.ids]
            assert codec.decode(ids) == text and controls.isdisjoint(ids)
            seen.append(text)
    assert sorted(seen) == sorted(texts)


@pytest.mark.slow
def test_a_document_of_100_000_sentences(values: dict[str, Any], tmp_path: Path) -> None:
    text = "".join(f"Sentence {n}. " for n in range(100_000))
    jsonl(tmp_path / "a.jsonl", [text])
    found = texts_of(prepared(resolve(values), tmp_path / "run"))
    assert set.union(*found.values()) == {text}


@pytest.mark.slow
@pytest.mark.parametrize("text", ["word " * 10_000_000, "a" * 50_000_000], ids=["words", "one word"])
def test_a_document_of_one_line_of_50_mb(values: dict[str, Any], tmp_path: Path, text: str) -> None:
    jsonl(tmp_path / "a.jsonl", [text])
    run(resolve(values, ["chunking.max_tokens=2048"]), tmp_path / "run")
    [document] = [d for split in SPLITS for d in records.documents(tmp_path / "run" / "prepare", split)]
    assert "".join(chunk.text for chunk in document.chunks) == text
    assert max(len(chunk.ids) for chunk in document.chunks) <= 2048


def test_a_malformed_row_in_a_file_of_odd_name_is_named_and_counted(values: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / os.fsdecode(b"\xff\xfe.jsonl")).write_bytes(
        b'{"text": "one"}\r\n{"text": 1.5}\r\n{"txt"\r\n{"text": null}'
    )
    values["data"]["source"] = str(folder)
    with pytest.raises(UserError, match=r"\.jsonl:3: not valid JSON"):
        run(resolve(values), tmp_path / "run")
    counts = run(resolve(values, ["data.malformed=skip"]), tmp_path / "run").counts
    assert counts["malformed"] == 2
    assert sorted(name.rpartition(".jsonl:")[2][0] for name in counts if name.startswith("malformed:")) == ["3", "4"]
