"""What is wrong with a reply, and what good replies are not accused of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_thoughts.data.contamination import words
from latent_thoughts.teachers.base import Completion
from latent_thoughts.teachers.checks import NAMES, fault, loops, spoken

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
        ("refusal", "I'm unable to assist with that request.", "stop"),
        ("refusal", "I’m unable to help with that.", "stop"),
        ("refusal", "I'm not able to help with that.", "stop"),
        ("refusal", "I can't give medical advice.", "stop"),
        ("refusal", "I cannot give you legal advice about this. Please consult an attorney.", "stop"),
        ("refusal", "I can’t discuss that.", "stop"),
        ("refusal", "I won't be able to help with that.", "stop"),
        ("refusal", "I'm sorry, I'm unable to do so.", "stop"),
        ("refusal", "I’m sorry, but as a language model I must decline to give medical advice.", "stop"),
        ("refusal", "I'm sorry, but this content is not something I can help with.", "stop"),
        ("refusal", "Sorry, I'm not comfortable doing that.", "stop"),
        ("refusal", "I must decline.", "stop"),
        ("refusal", "I cannot fulfill this request.", "stop"),
        ("refusal", "My apologies, but I cannot do this.", "stop"),
        ("refusal", "I must respectfully decline to answer.", "stop"),
        ("refusal", "Unfortunately, I'm unable to help.", "stop"),
        ("refusal", "I apologize, but I'm not able to help.", "stop"),
        ("refusal", "As a language model, I cannot help with this.", "stop"),
        ("refusal", "As an AI language model, I don't have opinions.", "stop"),
        ("refusal", "Sorry, this request violates our usage policy.", "stop"),
        ("refusal", "This request goes against our content guidelines.", "stop"),
        ("refusal", "This question about explosives goes against my safety guidelines.", "stop"),
        ("refusal", "I have to decline. I won't write about that.", "stop"),
        ("refusal", "I can't create content that is explicit.", "stop"),
        ("refusal", "I cannot provide information about that.", "stop"),
        ("refusal", "I cannot write this story.", "stop"),
        ("refusal", "I can't do that.", "stop"),
        ("refusal", "I cannot continue.", "stop"),
        ("refusal", "I can't help you with this.", "stop"),
        ("refusal", "Please provide the text, so that I can rephrase it.", "stop"),
        ("refusal", "Please provide the text.", "stop"),
        ("refusal", "It seems the passage is missing. Please provide the passage.", "stop"),
        ("refusal", "<think>They want advice.</think>\n\nI'm unable to help with that.", "stop"),
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
        ("cut", "<think>They want to know", "stop"),
        ("cut", "\n<thinking>They want " + "to know " * 40, "stop"),
        ("cut", "◁think▷They want to know", "stop"),
        ("cut", "[THINK]They want to know", "length"),
        ("empty", "<think>They want to know.</think>\n", "stop"),
        ("control", "[TOOL_CALLS]search", "stop"),
        ("control", "It follows. </think> It does. </think>", "stop"),
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
        "I can't be negative, so x > 0.",
        "I am not able to be zero, since i counts from one; unfortunately, I cannot be two either.",
        "Unfortunately, i cannot be zero here, and so the sum begins at one.",
        "I must decline as R grows, since the voltage is fixed.",
        "I won't be late, she told him, and so he set out at noon.",
        "I am unable to walk, the patient says. So a wheelchair is needed.",
        "I can not answer for the plaintiff, says the witness.",
        "I cannot give up the queen, so the rook has to move.",
        "The author is unable to give a proof, so the claim stays open.",
        "The request violates the terms of the treaty, so the court rejects it.",
        "As a language model predicts tokens one by one, it cannot look ahead.",
        "Please is a polite word. The text of the statute says so.",
        "Unable to pay, the firm asks the court for help.",
        "If a model thinks in steps, its thoughts are tokens too.",
        "Sorry is what she said to her brother, and he could not answer.",
        "No natural number can satisfy both; unfortunately for the conjecture, seven is a counterexample.",
        "If x < 3 and |y| > 2 then <x, y> is in the set.",
        "2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30 are even.",
        "very very very very good",
        "The text warns against the usage of technical terms without a definition.",
        "The request violated the company's content guidelines, so it was denied.",
        "This passage argues against safety guidelines that lack a basis.",
        "The question is whether acting against our climate policies costs votes.",
        "No. Please send me the document, said the clerk; the archive was open.",
        "I have to decline. The matrix is singular.",
        "I cannot do this with integers alone, so I take fractions.",
        "I could not provide a shorter proof, but a longer one shows more.",
        "I will not be able to complete this in time, she thought, and so she began at once.",
        "I cannot help but notice that the sum is even.",
        "I can't write √2 as a fraction, so it is irrational.",
    ],
)
def test_good_replies_pass(text: str) -> None:
    assert named(text) is None
    assert named(text.replace("'", "’")) is None
    assert named(f"<think>I can't help with that. So</think>\n\n{text}") is None


@pytest.mark.parametrize(
    "reply",
    [
        "<think>\nWhat do they want?\n</think>\n\nIt follows.",
        "What do they want?</think>It follows.",  # the prompt had the opening mark
        "<thinking>x</thinking> It follows.",
        "[THINK]x[/THINK]It follows.",
        "◁think▷x◁/think▷It follows.",
        " It follows.\n",
    ],
)
def test_reasoning_is_no_part_of_the_thought(reply: str) -> None:
    assert spoken(reply) == "It follows." and named(reply) is None


@pytest.mark.parametrize(
    ("reply", "rest"),
    [
        ("What do they want?\n</think>\nIt follows.", "It follows."),
        ("What do they want\n </think> It follows.", "It follows."),
        ("</think>It follows.", "It follows."),
        ("The tag </think> ends the thought. It follows.", None),
        ("Whatever stands before `</think>` is cut off.", None),
        ("It is put between <think>\nand\n</think>\nby the model.", None),
    ],
)
def test_a_text_that_mentions_a_mark_is_not_cut_there(reply: str, rest: str | None) -> None:
    assert spoken(reply) == (reply if rest is None else rest)


def test_a_reply_far_beyond_its_limit_is_one_that_nothing_ended() -> None:
    text = " ".join(f"w{n}" for n in range(1000))
    assert fault(Completion(text, "stop", 1, 1), CHUNK, max_tokens=100) == "cut"
    assert fault(Completion(text, "stop", 1, 1), CHUNK, max_tokens=1000) is None


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
