"""Which texts repeat an evaluation set: against a plain search, and at its edges."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_thoughts.config import Contamination
from latent_thoughts.data import contamination
from latent_thoughts.data.contamination import Overlap, Tally, words
from latent_thoughts.types import UserError

WORDS = st.lists(st.sampled_from("a b".split()), max_size=16).map(" ".join)


def plainly(sets: dict[str, list[str]], text: str, n: int) -> dict[str, set[int]]:
    def grams(t: str, size: int) -> set[tuple[str, ...]]:
        found = words(t)
        return {tuple(found[i : i + size]) for i in range(len(found) - size + 1)}

    def repeats(row: str) -> bool:
        size = min(n, len(row.split()))
        if size < min(n, 8) and size != len(text.split()):
            return False
        return size > 0 and not grams(row, size).isdisjoint(grams(text, size))

    found = {name: {k for k, row in enumerate(rows) if repeats(row)} for name, rows in sets.items()}
    return {name: rows for name, rows in found.items() if rows}


@given(st.dictionaries(st.sampled_from("xyz"), st.lists(WORDS, max_size=5)), WORDS, st.integers(1, 14))
def test_as_a_plain_search_finds_it(sets: dict[str, list[str]], text: str, n: int) -> None:
    overlap = Overlap(sets, n)
    assert overlap.matches(text) == plainly(sets, text, n)
    assert overlap.rows == {name: len(rows) for name, rows in sets.items()}
    assert overlap.too_short == {name: sum(not r for r in rows) for name, rows in sets.items()}


def test_case_punctuation_and_width_do_not_hide_a_repetition() -> None:
    row = "If 3 cats catch 3 mice in 3 days, how long do 9 cats take?"
    overlap = Overlap({"set": ["something else entirely", row]})
    assert overlap.matches(f"So: {row.upper().replace(',', ' --')} Indeed.") == {"set": {1}}
    assert overlap.matches(row.replace("3 cats", "\uff13\n\u2003ca\ufb05s".replace("\ufb05", "t"))) == {"set": {1}}
    assert overlap.matches(row.replace("mice", "rats")) == {}  # no 13 words in a row are left


def test_nothing_to_find() -> None:
    assert Overlap({}).matches("a " * 20) == {}
    assert Overlap({"set": []}).matches("a " * 20) == {}
    assert Overlap({"set": ["", "?!"]}).matches("?!") == {}


def test_short_rows_are_found_whole() -> None:
    overlap = Overlap({"set": ["What is two plus two?", "How many legs have two cats and three birds?"]})
    assert overlap.matches("what is TWO plus two") == {"set": {0}}
    assert overlap.matches("What is two plus two? Four.") == {}  # five words that anybody might write
    assert overlap.matches("So how many legs have two cats and three birds? 14") == {"set": {1}}


@pytest.mark.parametrize(
    "row",
    [
        "小明有七个苹果，他又找到了两个，然后丢了一个，现在他还剩几个？",
        "りんごを三つとみかんをふたつ買うといくらになりますか。",
    ],
)
def test_scripts_without_spaces(row: str) -> None:
    overlap = Overlap({"set": [row]})
    assert overlap.matches(f"题目：{row} 答案是 8。") == {"set": {0}}
    assert overlap.matches(row[:8]) == {}
    assert words("買う2個ab、ア") == ["買", "う", "2", "個", "ab", "ア"]


def test_a_long_text_of_what_all_rows_begin_with() -> None:
    """Every row is looked at once, not once for every time that the text has what they begin with."""
    opening = "The following is a question about mathematics: please answer it step by step, and then give the answer. "
    overlap = Overlap({"set": [f"{opening}Number {n}." for n in range(10_000)]})
    assert overlap.matches(opening * 200) == {"set": set(range(10_000))}


def test_rows_without_words_are_counted() -> None:
    tally = Tally(Overlap({"a": ["?", "b"], "b": ["c"]}))
    assert tally.repeats("b")
    assert tally.counts("documents") == {
        "contaminated_documents_a": 1,
        "evaluation_rows_repeated_a": 1,
        "evaluation_rows_without_words_a": 1,
        "contaminated_documents_b": 0,
        "evaluation_rows_repeated_b": 0,
    }


def test_a_missing_set_is_named_by_its_setting_and_a_world_is_none() -> None:
    with pytest.raises(UserError, match=r"^none\.jsonl does not exist: correct contamination\.sets\.exam$"):
        contamination.key(Contamination(sets={"exam": "none.jsonl"}))
    with pytest.raises(UserError, match=r"^disk:none does not exist: correct contamination\.sets\.exam$"):
        contamination.look(Contamination(sets={"exam": "disk:none"}))
    with pytest.raises(ValueError, match=r"sets\.exam: a built-in world"):
        Contamination(sets={"exam": "world:castle"})


@pytest.mark.parametrize("content", ["", '{"n": 3}\n', '{"q": "?"}\n'])
def test_a_set_that_holds_nothing_to_repeat_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "set.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"set\.jsonl holds no text: correct contamination\.sets\.exam$"):
        contamination.load(Contamination(sets={"exam": str(tmp_path / "set.jsonl")}))


def test_a_set_of_another_format_is_not_told_of_a_setting_that_is_not_its(tmp_path: Path) -> None:
    sets = {"set.csv": "convert them to JSONL$", "part-00000": r"give it a name that ends in \.jsonl$"}
    for name, message in sets.items():
        (tmp_path / name).write_text('{"q": "foo"}\n')
        with pytest.raises(UserError, match=message):
            contamination.load(Contamination(sets={"exam": str(tmp_path / name)}))


def test_the_name_of_a_text_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three")
    overlap = contamination.load(Contamination(sets={"exam": str(tmp_path)}))
    assert overlap is not None and overlap.matches("one two three") == {"exam": {0}}


def test_a_changed_data_set_on_disk_changes_the_key(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    keys = []
    for text in ("one", "two"):
        datasets.Dataset.from_list([{"text": text}]).save_to_disk(tmp_path / "set")
        keys.append(contamination.key(Contamination(sets={"exam": f"disk:{tmp_path}/set"})))
    assert keys[0] != keys[1]
