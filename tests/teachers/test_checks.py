"""What is wrong with a reply, and what good replies are not accused of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_thoughts.data.contamination import words
from latent_thoughts.teachers.base import Completion
from latent_thoughts.teachers.checks import NAMES, fault, loops

CHUNK = "The area of a circle of radius three is nine pi, which is about twenty-eight and a quarter square units."


def named(text: str, finish: str = "stop", original: str = CHUNK) -> str | None:
    return fault(Completion(text, finish, 1, 1), original)


@pytest.mark.parametrize(
    ("name", "text", "finish"),
    [
        ("refusal", "I'm sorry, but I can't help with that.", "stop"),
        ("refusal", "Sorry, I cannot continue with this request.", "stop"),
        ("refusal", "As an AI language model, I am unable to have opinions.", "stop"),
        ("refusal", "Unfortunately, I cannot provide that.", "stop"),
        ("refusal", "I apologize, but I am not able to do this.", "stop"),
        ("refusal", "I can't assist with this.", "stop"),
        ("refusal", "", "content_filter"),
        ("refusal", "No.", "refusal"),
        ("empty", "", "stop"),
        ("empty", " \n ", "stop"),
        ("cut", "", "length"),
        ("cut", "The area of a circle is pi times", "length"),
        ("loop", "We have that " + "x is one and " * 12, "stop"),
        ("loop", "six " * 30, "length"),
        ("loop", "First. " + "so it is clear that the sum is even and the claim follows. " * 5 + "Done.", "stop"),
        ("copied", CHUNK, "stop"),
        ("copied", CHUNK.upper().replace(",", " -"), "stop"),
        ("copied", "The passage says: " + CHUNK + " That is all.", "stop"),
        ("control", "It follows.<|im_end|>", "stop"),
        ("control", "<|latent_start|>It follows.", "stop"),
        ("control", "It follows.</s>", "stop"),
        ("control", "[INST] say it [/INST]", "stop"),
    ],
)  # fmt: skip
def test_faults(name: str, text: str, finish: str) -> None:
    assert name in NAMES and named(text, finish) == name


@pytest.mark.parametrize(
    "text",
    [
        "The area of a circle is pi times the square of its radius. With radius three that is nine pi.",
        "I cannot be smaller than one, since i counts from one.",
        "Sorry is what she said to her brother, and he could not answer.",
        "No natural number can satisfy both; unfortunately for the conjecture, seven is a counterexample.",
        "If x < 3 and |y| > 2 then <x, y> is in the set.",
        "2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30 are even.",
        "very very very very good",
    ],
)
def test_good_replies_pass(text: str) -> None:
    assert named(text) is None


def test_short_texts_are_copied_only_word_for_word() -> None:
    assert named("The answer is 72.", original="The answer is 72.") == "copied"
    assert named("48 and 24 make 72, so the answer is 72.", original="The answer is 72.") is None


def test_human_solutions_pass() -> None:
    """GSM8K's own solutions are thoughts as good ones look; none is accused of anything."""
    path = Path("../shared/data/gsm8k/test.jsonl")
    if not path.exists():
        pytest.skip("no GSM8K beside this folder")
    rows = [json.loads(line) for line in path.open()]
    accused = [r["answer"] for r in rows if named(r["answer"].split("\n####")[0], original="The answer is 1.")]
    assert not accused


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.integers(0, 30), st.integers(0, 30))
def test_four_copies_are_a_loop_wherever_they_stand(unit: list[str], before: int, after: int) -> None:
    copies = max(4, -(-20 // len(unit)) + 1)
    assert loops([f"b{n}" for n in range(before)] + unit * copies + [f"a{n}" for n in range(after)])


@given(st.lists(st.integers(), unique=True, max_size=80))
def test_words_that_all_differ_are_no_loop(numbers: list[int]) -> None:
    assert not loops(words(" ".join(f"w{n}" for n in numbers)))
