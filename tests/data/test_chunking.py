"""Cutting is lossless, and depends on content and seed alone."""

from __future__ import annotations

import re
import time
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_thoughts.config import Chunking, World
from latent_thoughts.data import chunking, worlds
from latent_thoughts.data.chunking import chunked, content_seed, cut, fit, sentences
from latent_thoughts.data.tokenizer import Codec, word_tokenizer
from latent_thoughts.types import Document, UserError

# Sentence marks, quotes, white space and newlines more often than chance would bring them.
TEXT = st.text(st.one_of(st.sampled_from(list(".!?…。！？\"'”’)] \n\r\t\u2028aB1")), st.characters()), max_size=120)
CONFIGS = st.builds(
    Chunking,
    mode=st.sampled_from(["poisson", "fixed", "document"]),
    mean=st.floats(1, 12),
    max=st.integers(1, 20),
    seed=st.integers(0, 9),
)


def numbered(count: int) -> str:
    return "".join(f"Sentence {n} is here. " for n in range(count))


def lengths(text: str, config: Chunking) -> list[int]:
    return [len(sentences(chunk)) for chunk in cut(Document("d", text), config)]


@settings(max_examples=100, deadline=None)
@given(TEXT, CONFIGS)
def test_chunks_join_to_the_text_and_none_is_empty(text: str, config: Chunking) -> None:
    chunks = cut(Document("d", text), config)
    assert "".join(chunks) == text
    assert all(chunks)


@settings(max_examples=100, deadline=None)
@given(TEXT)
def test_sentences_join_to_the_text(text: str) -> None:
    assert "".join(sentences(text)) == text


PLAIN = re.compile(r".*?(?:(?<![.!?…])[.!?…]+[\"'”’)\]]*\s+|[。！？]+[”)\]]*\s*|\n+\s*|\Z)", re.DOTALL)


@given(st.lists(st.sampled_from(["ab", "word", *".!?…。！？\n \t\"')]”"]), max_size=30).map("".join))
def test_sentences_are_those_of_the_plain_pattern(text: str) -> None:
    """As one would write it down, and several times as slow."""
    begins = len(text) - len(text.lstrip())
    found = [match for match in PLAIN.findall(text[begins:]) if match] or [""]
    assert sentences(text) == ([text[:begins] + found[0], *found[1:]] if text else [])


@pytest.mark.parametrize(
    "parts",
    [
        ["\n\n  First. ", "Second."],
        [" \n "],
        ["هل هذا صحيح؟ ", "نعم."],
        ["یہ ایک جملہ ہے۔ ", "یہ دوسرا ہے۔"],
        ["यह एक वाक्य है। ", "यह दूसरा है।"],
        ["彼は「行く。」", "と言った。"],
        ["『はい！』", "（そう。）", "次"],
        ["Il dit : « Oui. » ", "Puis il part."],
        ["»Ja.« ", "Er ging."],
        ["Steps:\n", "1. First this. ", "Then that.\n  ", "2. Second.\n", "10. Tenth."],
        [" 1. First. ", "Then."],
        ["The answer is 5. ", "Then 12. ", "Next."],
        ["It was written by J. R. R. Tolkien in 1937. ", "He taught."],
        ["Join A and B. ", "The line meets C. ", "Then stop."],
        ["Brown v. Board and Smith vs. Jones, cf. Fig. 3 and Eq. (2), i.e. both. ", "See Sec. 4 and Art. 5."],
        ["Dr. Ada, Mr. Bo, Mrs. Cy, Ms. Di and Prof. Ed live in St. Ives. ", "They met."],
        ["By 42 U.S.C. § 1983 he may, e.g. tomorrow. ", "No. 7 is next. ", "No. ", "He may not."],
        ["Take it p.o. b.i.d. with food, approx. 5 mg at 8 a.m. and 9 p.m. ", "Then rest."],
        ["Acme Inc. sued Bolt Ltd. and Coil Co. over Dan Jr. there. ", "It won."],
    ],
)
def test_sentences_end_where_a_reader_ends_them(parts: list[str]) -> None:
    assert sentences("".join(parts)) == parts


def test_sentences_end_after_marks_quotes_and_lines() -> None:
    text = 'He said: "Go!" Then 3.14 came... Why?\n\nHeading\nEnd'
    assert sentences(text) == ['He said: "Go!" ', "Then 3.14 came... ", "Why?\n\n", "Heading\n", "End"]
    assert sentences("你好。再见！好") == ["你好。", "再见！", "好"]


def test_long_rows_of_marks_are_cut_in_linear_time() -> None:
    start = time.perf_counter()
    for text in ("." * 200_000, "?!" * 100_000 + "a", ".)" * 100_000, "\n" * 200_000, "a" * 200_000):
        assert "".join(sentences(text)) == text
    assert time.perf_counter() - start < 5


def test_poisson_lengths_have_the_mean_and_the_limits() -> None:
    found = lengths(numbered(20_000), Chunking(mean=8, max=20))[:-1]
    assert min(found) >= 1 and max(found) <= 20
    assert np.mean(found) == pytest.approx(8, abs=0.25)
    assert np.var(found) == pytest.approx(7, abs=1.2)  # of 1 + Poisson(7), which the limit hardly touches


def test_the_limit_holds_where_it_bites_and_mean_one_is_one() -> None:
    assert set(lengths(numbered(500), Chunking(mean=12, max=4))) <= {1, 2, 3, 4}
    assert set(lengths(numbered(50), Chunking(mean=1))) == {1}


def test_fixed_chunks_have_the_mean_as_length() -> None:
    assert lengths(numbered(20), Chunking(mode="fixed", mean=8)) == [8, 8, 4]
    assert lengths(numbered(20), Chunking(mode="fixed", mean=8, max=5)) == [5, 5, 5, 5]


def test_chunks_depend_on_content_and_seed_alone() -> None:
    text = numbered(300)
    one = cut(Document("a", text, {"row": 1}), Chunking(seed=1))
    cut(Document("between", numbered(77)), Chunking(seed=1))
    assert cut(Document("b", text), Chunking(seed=1)) == one
    assert cut(Document("a", text), Chunking(seed=2)) != one
    assert lengths(text + "More. ", Chunking(seed=1))[:5] != lengths(text, Chunking(seed=1))[:5]
    # Stored chunks rest on this value: another one needs another store.FORMAT_VERSION.
    assert content_seed("a", 0) == 9398663524571839764


def test_a_document_without_sentence_ends_is_one_chunk_and_an_empty_one_none() -> None:
    for mode in ("poisson", "fixed", "document"):
        assert cut(Document("d", "no end here"), Chunking(mode=mode)) == ["no end here"]
        assert cut(Document("d", ""), Chunking(mode=mode)) == []


def test_a_documents_own_pieces_are_kept() -> None:
    document = Document("d", "One. Two. Three.", pieces=("One. Two. ", "Three."))
    assert cut(document, Chunking(mode="pieces")) == ["One. Two. ", "Three."]
    with pytest.raises(UserError, match=r"document d has none: set data\.pieces"):
        cut(Document("d", "One."), Chunking(mode="pieces"))


def utf8(text: str) -> list[int]:
    return list(text.encode("utf-8"))


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200), st.integers(4, 40))
def test_fitting_is_lossless_and_keeps_the_limit(text: str, limit: int) -> None:
    parts = fit(text, utf8, limit)
    assert "".join(part for part, _ in parts) == text
    for part, ids in parts:
        assert part and ids == utf8(part)
        assert len(ids) <= limit


def test_fitting_splits_at_white_space_where_there_is_any() -> None:
    parts = [part for part, _ in fit("one two three four five six", utf8, 10)]
    assert all(part.endswith(" ") for part in parts[:-1])
    assert [part for part, _ in fit("fits", utf8, 4)] == ["fits"]


def test_a_character_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_tokens=3"):
        fit("a𝄞b", utf8, 3)


@given(st.text(st.one_of(st.sampled_from(" \n\u2028\x00ab"), st.characters()), min_size=2, max_size=400))
def test_a_chunk_is_halved_at_the_white_space_nearest_to_its_middle(text: str) -> None:
    middle = len(text) // 2
    ends = [m.end() for m in re.finditer(r"\s+", text) if 0 < m.end() < len(text)]
    assert chunking._middle(text) == min(ends, key=lambda end: abs(end - middle), default=middle)


@given(st.text(min_size=1, max_size=300), st.integers(4, 40))
def test_a_text_that_cannot_fit_is_cut_as_if_it_had_been_tried(text: str, limit: int) -> None:
    def points(part: str) -> list[int]:
        assert len(part) <= limit * 2 or not bounded
        return [ord(character) for character in part]

    bounded = False
    plain = fit(text, points, limit)
    bounded = True
    assert fit(text, points, limit, longest=2) == plain


LONG = {
    "without a mark": lambda size: "a" * size,
    "of words": lambda size: "word " * (size // 5),
    "of white space": lambda size: " " * size,
    "of marks": lambda size: "?! " * (size // 3),
    "of quotes behind marks": lambda size: ("." + '"' * 50) * (size // 51),
}


def halved(kind: str, size: int) -> None:
    text = LONG[kind](size)
    parts = [part for chunk in cut(Document("d", text), Chunking()) for part in fit(chunk, utf8, 4096, 1)]
    assert "".join(part for part, _ in parts) == text
    assert all(len(ids) <= 4096 for _, ids in parts)


@pytest.mark.parametrize("kind", LONG)
def test_a_document_of_one_long_line(kind: str) -> None:
    halved(kind, 500_000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LONG)
def test_a_document_of_one_line_of_50_mb(kind: str) -> None:
    start = time.perf_counter()
    halved(kind, 50_000_000)
    print(f"{kind}: {time.perf_counter() - start:.0f} s")


def test_a_document_of_100_000_sentences() -> None:
    text = numbered(100_000)
    assert len(sentences(text)) == 100_000
    assert "".join(cut(Document("d", text), Chunking())) == text


@pytest.mark.parametrize(
    ("thoughts", "target"),
    [("given", (False, True, False, True)), ("last", (False,) * 3 + (True,)), ("all", (True,) * 4)],
)
def test_which_chunks_get_a_thought(thoughts: Literal["given", "last", "all"], target: tuple[bool, ...]) -> None:
    """Where the data has its own (`given`): the places are used, the thoughts stay aside."""
    config = World(documents=1, teacher_documents=0, chain=2)
    document = next(iter(worlds.documents("hindsight", config, 0)))
    codec = Codec(word_tokenizer(worlds.make("hindsight", 0).words()))
    found = chunked(document, Chunking(mode="pieces", thoughts=thoughts), codec)
    assert found.target == target
    assert found.thoughts == ((),) * 4
    assert found.meta["oracle"] == document.thoughts


@pytest.mark.parametrize("thoughts", ["given", "last"])
def test_the_thought_before_a_piece_that_is_split_stands_before_all_of_it(thoughts: Literal["given", "last"]) -> None:
    words = [f"{letter} " for letter in "abcdefghijkl"]
    document = Document("d", "".join(words), {}, ("".join(words[:2]), "".join(words[2:])), {1: "z"})
    codec = Codec(word_tokenizer(words))
    found = chunked(document, Chunking(mode="pieces", thoughts=thoughts, max_tokens=5), codec)
    assert [c.text for c in found.chunks][:2] == ["a b ", "".join(words[2:7])] and len(found.chunks) == 3
    assert found.meta["oracle"] == {1: "z"} and found.target == (False, True, False)
