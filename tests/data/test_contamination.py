"""Which texts repeat an evaluation set: against a plain search, and at its edges."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from latent_thoughts.data.contamination import Overlap, words

WORDS = st.lists(st.sampled_from("a b c d".split()), max_size=12).map(" ".join)


def plainly(sets: dict[str, list[str]], text: str, n: int) -> dict[str, set[int]]:
    def grams(t: str) -> set[tuple[str, ...]]:
        found = words(t)
        return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}

    found = {name: {k for k, row in enumerate(rows) if grams(row) & grams(text)} for name, rows in sets.items()}
    return {name: rows for name, rows in found.items() if rows}


@given(st.dictionaries(st.sampled_from("xyz"), st.lists(WORDS, max_size=5)), WORDS, st.integers(1, 5))
def test_as_a_plain_search_finds_it(sets: dict[str, list[str]], text: str, n: int) -> None:
    overlap = Overlap(sets, n)
    assert overlap.matches(text) == plainly(sets, text, n)
    assert overlap.rows == {name: len(rows) for name, rows in sets.items()}
    assert overlap.too_short == {name: sum(len(r.split()) < n for r in rows) for name, rows in sets.items()}


def test_case_punctuation_and_width_do_not_hide_a_repetition() -> None:
    row = "If 3 cats catch 3 mice in 3 days, how long do 9 cats take?"
    overlap = Overlap({"set": ["something else entirely", row]})
    assert overlap.matches(f"So: {row.upper().replace(',', ' --')} Indeed.") == {"set": {1}}
    assert overlap.matches(row.replace("3 cats", "\uff13\n\u2003ca\ufb05s".replace("\ufb05", "t"))) == {"set": {1}}
    assert overlap.matches(row.replace("mice", "rats")) == {}  # no 13 words in a row are left


def test_nothing_to_find() -> None:
    assert Overlap({}).matches("a " * 20) == {}
    assert Overlap({"set": []}).matches("a " * 20) == {}
    assert Overlap({"set": ["too short"]}).matches("too short") == {}
