"""Every kind of source, and every way a row can be bad."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_thoughts.config import Data, World
from latent_thoughts.data import readers
from latent_thoughts.places import place
from latent_thoughts.types import Document, UserError

ROWS = [{"text": "One.\nTwo."}, {"text": "ä 𝄞\t\r\nend"}, {"text": "last"}]
TEXTS = [row["text"] for row in ROWS]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(source: Path | str, skipped: list[str] | None = None, **settings: Any) -> list[Document]:
    note = skipped.append if skipped is not None else (lambda _: None)
    return list(readers.read(Data(source=str(source), **settings), 0, note))


def texts(source: Path | str, **settings: Any) -> list[str]:
    return [document.text for document in read(source, **settings)]


# --- kinds of source


def test_jsonl(tmp_path: Path) -> None:
    assert texts(jsonl(tmp_path / "a.jsonl", ROWS)) == TEXTS
    assert texts(jsonl(tmp_path / "a.data", ROWS), format="jsonl") == TEXTS


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{**row, "n": 1} for row in ROWS]), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == TEXTS


@pytest.mark.parametrize(
    "other",
    [pa.array([1, 2**62], pa.timestamp("us")), pa.array([1, 2], pa.timestamp("us", tz="Foo/Bar"))],
    ids=["far", "nowhere"],
)
def test_columns_that_are_not_needed_are_not_read(tmp_path: Path, other: Any) -> None:
    """A time that Python has no value for cost the rows behind it."""
    pq.write_table(pa.table({"t": other, "text": ["one", "two"], "z": ["a", "b"]}), tmp_path / "a.parquet")
    pattern = {"z": "(?P<found>.)"}
    assert texts(tmp_path / "a.parquet") == ["one", "two"]
    assert texts(tmp_path / "a.parquet", text="{text}{found}", extract=pattern, id="z") == ["onea", "twob"]
    with pytest.raises(UserError, match=r"a\.parquet.*not a readable Parquet file"):
        list(readers.rows(Data(source=str(tmp_path / "a.parquet"))))
    pq.write_table(pa.table({"body": ["one"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column text \(there are: body, n\)"):
        read(tmp_path / "a.parquet")


def test_a_text_file_is_one_document_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert texts(tmp_path / "a.txt") == ["one\r\ntwo\rthree\n"]


def test_a_folder_is_read_in_order_of_names_whatever_its_files_are(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    jsonl(tmp_path / "sub" / "b.jsonl", ROWS[:2])
    pq.write_table(pa.Table.from_pylist(ROWS[2:]), tmp_path / "a.parquet")
    assert texts(tmp_path) == ["last", *TEXTS[:2]]


def test_the_name_of_a_text_file_is_a_column(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "in/b.txt"):
        (tmp_path / name).write_text(f"Text {name[-5]}.")
    assert [d.id for d in read(tmp_path, id="path")] == ["a.txt", "in/b.txt"]
    assert texts(tmp_path, text="{path}: {text}") == ["a.txt: Text a.", "in/b.txt: Text b."]
    assert texts(tmp_path / "in" / "*.txt", text="{path}: {text}") == ["b.txt: Text b."]


@pytest.mark.parametrize("name", ["part-00000", "rows.jl"])
def test_rows_in_a_file_whose_name_does_not_tell_so_are_no_text(tmp_path: Path, name: str) -> None:
    path = jsonl(tmp_path / name, ROWS)
    with pytest.raises(UserError, match=rf"{name}: its first line is a JSON object, .*set data\.format, to jsonl or"):
        read(path, malformed="skip")
    assert texts(path, format="jsonl") == TEXTS
    assert texts(path, format="text") == [path.read_text(encoding="utf-8")]
    for text in ("{x} is a set.\n", "{}\nis an object.\n"):
        path.write_text(text)
        assert texts(path) == [text]


def test_a_folder_of_many_files_is_listed(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"{number}.jsonl").touch()
    assert len(readers.files(Data(source=str(tmp_path)))) == 3000


def test_what_else_lies_in_a_folder_is_not_read(tmp_path: Path) -> None:
    """As a clone of a repository of data has it, or what Spark wrote."""
    for name in (".git/HEAD", ".cache/huggingface/a.jsonl.metadata", ".hidden.jsonl", "sub/.cache/b.jsonl"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("no")
    for name in ("README.md", "_SUCCESS", "sub/notes.txt"):
        (tmp_path / "data" / name).write_text("text")
    source = Data(source=str(tmp_path / "data"))
    assert texts(tmp_path / "data") == ["text"] * 3 and readers.left_out(source) == []
    jsonl(tmp_path / "data" / "sub" / "a.jsonl", ROWS)
    assert texts(tmp_path / "data") == TEXTS
    assert readers.left_out(source) == ["README.md", "_SUCCESS", "sub/notes.txt"]
    assert len(texts(tmp_path / "data", format="text")) == 4
    assert texts(tmp_path / "data" / ".hidden.jsonl", format="text") == ["no"]  # whom one names is meant
    assert readers.left_out(Data(source="world:castle")) == readers.left_out(Data(source=str(tmp_path / "*"))) == []


def test_a_glob_takes_files_alone(tmp_path: Path) -> None:
    for name in ("b", "a"):
        jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    (tmp_path / "c.jsonl").mkdir()
    jsonl(tmp_path / "c.jsonl" / "d.jsonl", [{"text": "deep"}])
    assert texts(tmp_path / "*.jsonl") == ["a", "b"]
    assert texts(tmp_path / "**" / "*.jsonl") == ["a", "b", "deep"]


def test_a_dataset_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(tmp_path / "two")
    assert texts(f"disk:{tmp_path}/one") == TEXTS
    assert texts(f"disk:{tmp_path}/two", split="test") == ["last"]
    with pytest.raises(UserError, match="split nope"):
        texts(f"disk:{tmp_path}/two", split="nope")
    with pytest.raises(UserError, match="cannot load dataset"):
        texts(f"disk:{tmp_path}/three")


PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}


def pack(path: Path, content: bytes) -> Path:
    with pa.CompressedOutputStream(str(path), PACKED[path.suffix]) as file:
        file.write(content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst", "a.jsonl.bz2"])
def test_a_packed_file_of_no_bytes_was_cut(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name}: cannot be read \(it is empty"):
        read(tmp_path / name)


def test_what_a_url_asks_for_is_no_part_of_a_name() -> None:
    path = place("https://host/a.jsonl.gz?download=true")
    assert readers._ends(path) == (".jsonl", ".gz") and readers.kind_of(Data(source="x"), path) == "jsonl"


@pytest.mark.parametrize("suffix", PACKED)
def test_packed_files(tmp_path: Path, suffix: str) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    assert texts(pack(tmp_path / f"a.jsonl{suffix}", lines)) == TEXTS
    assert texts(pack(tmp_path / f"a.txt{suffix}", b"\xef\xbb\xbfone\r\ntwo")) == ["one\r\ntwo"]


def test_a_gzip_file_of_several_parts(tmp_path: Path) -> None:
    parts = [gzip.compress(json.dumps(row).encode() + b"\n") for row in ROWS]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(parts))
    assert texts(tmp_path / "a.jsonl.gz") == TEXTS


@pytest.mark.parametrize("suffix", PACKED)
def test_a_packed_file_that_was_cut_is_named_with_the_line_and_what_is_before_it_is_kept(
    tmp_path: Path, suffix: str
) -> None:
    many = [{"text": f"{n} {random.Random(n).getrandbits(4000)}"} for n in range(400)]
    path = pack(tmp_path / f"a.jsonl{suffix}", "".join(json.dumps(row) + "\n" for row in many).encode())
    whole = path.read_bytes()
    for share in (0.0, 0.01, 0.5, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)] or whole[:3])
        with pytest.raises(UserError, match=rf"a\.jsonl\{suffix}:\d+: (cannot be read on|not valid JSON)"):
            read(path)
        skipped: list[str] = []
        found = [d.text for d in read(path, skipped, malformed="skip")]
        kept = found == [row["text"] for row in many[: len(found)]]  # no diff of so much text
        assert kept and (suffix == ".bz2" or len(found) >= 400 * share - 250)  # which packs the file as one block
        assert 1 <= len(skipped) <= 2
    path.write_bytes(b"this is not packed at all")
    with pytest.raises(UserError, match="cannot be read on"):
        read(path)


def test_a_world() -> None:
    config = {"world": World(documents=3, teacher_documents=2, seed=1)}
    assert len(texts("world:castle", **config)) > 5
    assert len(texts("world:castle", limit=4, **config)) == 4
    with pytest.raises(UserError, match=r"no built-in world 'moat' \(known: castle, hindsight, stories\)"):
        texts("world:moat")


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    for name in ("none.jsonl", "*.none", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r"does not exist"):
            read(tmp_path / name)


# --- rows into documents


def test_ids_are_the_texts_hash_or_a_column(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "one", "my id": 7}, {"text": "two", "my id": 8}])
    assert [d.id for d in read(path)] == [hashlib.sha256(t.encode()).hexdigest()[:16] for t in ("one", "two")]
    assert [d.id for d in read(path, id="my id")] == ["7", "8"]


WORD_PROBLEM = {"question": "2 and 3?", "answer": "Add {them}: 2+3=5\n#### 5", "n": 3}


def test_templates_extraction_pieces_and_thought(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [WORD_PROBLEM])
    [document] = read(
        path,
        extract={"answer": r"(?s)^(?P<solution>.*)\n#### (?P<final>.*)$"},
        pieces=["{question} ({n})\n", "The answer is {final}."],
        thought="{solution}",
    )
    assert document.pieces == ("2 and 3? (3)\n", "The answer is 5.")
    assert document.text == "2 and 3? (3)\nThe answer is 5."
    assert document.thoughts == {1: "Add {them}: 2+3=5"}


def test_columns_of_any_name(tmp_path: Path) -> None:
    row = {"my-text": "one", "a b": "two", "q.t": 3, "é": "four"}
    path = jsonl(tmp_path / "a.jsonl", [row])
    assert texts(path, text="{my-text} {a b} {q.t} {é} {{é}}") == ["one two 3 four {four}"]
    for name in ("my_text", "q.u", " é"):
        with pytest.raises(UserError, match=rf"no column {name} \(there are: my-text, a b, q.t, é\)"):
            read(path, text=f"a {{{name}}}")


@pytest.mark.parametrize("settings", [{"text": "text"}, {"pieces": ["a", "b"]}, {"pieces": ["{a}"], "thought": "a"}])
def test_a_template_without_a_column_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{list(settings)[-1]} names no column"):
        Data(**settings)


def test_a_row_whose_thought_is_null_has_none(tmp_path: Path) -> None:
    """Null, or what stands for it where a table was written without: NaN, or nothing but spaces."""
    rows = [{"a": "x", "z": None}, {"a": "y", "z": "so"}, {"a": "y", "z": " "}]
    found = read(jsonl(tmp_path / "a.jsonl", rows), pieces=["{a}"], thought="{z}")
    assert [d.thoughts for d in found] == [{}, {0: "so"}, {}]


def test_a_template_is_filled_once() -> None:
    """Braces in the data are data."""
    row = {"a": "{b}", "b": "no"}
    assert readers._fill("{a}!", row, "here") == "{b}!"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=5))
def test_any_text_comes_through_jsonl(tmp_path_factory: pytest.TempPathFactory, values: list[str]) -> None:
    path = jsonl(tmp_path_factory.mktemp("r") / "a.jsonl", [{"text": value} for value in values])
    assert texts(path) == values


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "\\ufefftwo"}\n')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert texts(tmp_path / "a.jsonl") == ["one", "\ufefftwo"]
    assert texts(tmp_path / "a.txt") == ["one"]


def test_limit(tmp_path: Path) -> None:
    assert texts(jsonl(tmp_path / "a.jsonl", ROWS), limit=2) == TEXTS[:2]


# --- bad rows

BAD_LINES = {
    "not JSON": (b"{", "not valid JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "not valid JSON"),
    "not an object": (b"[1, 2]", "not a JSON object"),
    "no such column": (b'{"body": "x", "title": "y"}', r"no column text \(there are: body, title\)"),
    "no columns": (b"{}", r"there are: none"),
    "not text": (b'{"text": ["x"]}', "column text is list, not text"),
    "null": (b'{"text": null}', "column text is empty \\(null or NaN\\)"),
    "a lone surrogate": (b'{"text": "a\\ud800b"}', "lone surrogate"),
    "a number too long": (b'{"text": ' + b"1" * 5000 + b"}", "not valid JSON"),
    "nested too deep": (b"[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_malformed_line_is_named_or_skipped(tmp_path: Path, name: str) -> None:
    line, reason = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{reason}"):
        read(path)
    skipped: list[str] = []
    assert [d.text for d in read(path, skipped, malformed="skip")] == ["one", "two"]
    assert len(skipped) == 1 and "a.jsonl:3" in skipped[0]


def test_limit_counts_good_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{\n{"text": "two"}\n{\n')
    skipped: list[str] = []
    assert [d.text for d in read(path, skipped, malformed="skip", limit=2)] == ["one", "two"]
    assert len(skipped) == 1


def test_a_surrogate_in_an_id_or_a_thought_is_found_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x", "bad": "\\udc00"}\n')
    for columns in (Data(id="bad"), Data(pieces=["{text}"], thought="{bad}")):
        with pytest.raises(UserError, match=r"a\.jsonl:1: .*surrogate"):
            list(readers.read(columns.model_copy(update={"source": str(path)}), 0))


def test_a_column_that_does_not_match_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x", "answer": "no mark"}])
    with pytest.raises(UserError, match=r"a\.jsonl:1: column answer does not match data\.extract\.answer"):
        read(path, extract={"answer": "#### (?P<final>.*)"})


def test_a_missing_id_column_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no column key \(there are: text\)"):
        read(jsonl(tmp_path / "a.jsonl", ROWS), id="key")


def test_files_that_are_not_what_they_are_called_are_named_or_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is how it starts")
    (tmp_path / "b.txt").write_bytes(b"\xff\xff")
    pq.write_table(pa.Table.from_pylist([{"text": "x" * 1000 + str(n)} for n in range(2000)]), tmp_path / "c.parquet")
    torn = bytearray((tmp_path / "c.parquet").read_bytes())
    torn[100:400] = bytes(300)
    (tmp_path / "c.parquet").write_bytes(torn)
    jsonl(tmp_path / "d.jsonl", [{"text": "good"}])
    for name, reason in (
        ("a.parquet", "not a readable Parquet"),
        ("b.txt", "not UTF-8"),
        ("c.parquet", "not a readable"),
    ):
        with pytest.raises(UserError, match=rf"{name}: {reason}"):
            read(tmp_path / name)
    skipped: list[str] = []
    assert [d.text for d in read(tmp_path, skipped, malformed="skip")][-1] == "good"
    assert len(skipped) == 2


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.csv.gz", "rows.jsonl.xz"])
def test_files_that_are_not_plain_text_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="convert them to JSONL, or set data.format"):
        list(readers.read(Data(source=str(tmp_path / name)), 0))
