"""What endpoints call a completion."""

from __future__ import annotations

from typing import Any

import pytest

from latent_thoughts.teachers.base import Completion
from latent_thoughts.teachers.chat import answer_of, said


def completion(message: Any, usage: Any = None, finish: Any = "stop") -> Any:
    return answer_of(200, {"choices": [{"message": message, "finish_reason": finish}], "usage": usage})


@pytest.mark.parametrize(
    ("message", "text", "finish"),
    [
        ({"content": "yes"}, "yes", "stop"),
        ({"content": [{"type": "text", "text": "a"}, {"text": "b"}, {"image": 1}, "c", {"text": 3}]}, "ab", "stop"),
        ({"content": None}, "", "stop"),
        ({"content": None, "refusal": "no"}, "no", "refusal"),
        ({"content": "", "refusal": {"x": 1}}, "", "refusal"),
    ],
)
def test_messages(message: Any, text: str, finish: str) -> None:
    assert completion(message) == Completion(text, finish, None, None)


@pytest.mark.parametrize("message", [{"content": 5}, {"content": {"text": "x"}}, "text", None])
def test_what_is_no_message(message: Any) -> None:
    assert completion(message).kind == "broken_reply"


@pytest.mark.parametrize("count", [None, "abc", -1, float("nan"), float("inf"), 2**70, [1], "12"])
def test_tokens_that_are_no_number_are_not_told(count: Any) -> None:
    reply = completion({"content": "x"}, {"prompt_tokens": count, "completion_tokens": 7.0})
    assert (reply.prompt_tokens, reply.completion_tokens) == (None, 7)
    assert completion({"content": "x"}, count).prompt_tokens is None


@pytest.mark.parametrize("text", ["x", ""])
def test_no_text_is_made_of_no_tokens(text: str) -> None:
    reply = completion({"content": text}, {"prompt_tokens": 0, "completion_tokens": 0})
    assert (reply.prompt_tokens, reply.completion_tokens) == (None, None if text else 0)


@pytest.mark.parametrize("finish", ["length", "max_tokens", "MAX_TOKENS", "model_length"])
def test_a_limit_has_several_names(finish: str) -> None:
    assert completion({"content": "x"}, finish=finish).finish == "length"


def test_a_reply_that_ends_in_an_error_is_none() -> None:
    assert completion({"content": "It follows that half"}, finish="error").kind == "broken_reply"


@pytest.mark.parametrize(
    "error",
    [
        {"message": "filtered", "code": "content_filter"},
        {"message": "filtered", "code": "x", "innererror": {"code": "ResponsibleAIPolicyViolation"}},
    ],
)
def test_a_filter_declines_the_question(error: Any) -> None:
    assert answer_of(400, {"error": error}) == Completion("", "content_filter", None, 0)
    assert answer_of(500, {"error": error}).kind == "server_error"  # pyright: ignore[reportAttributeAccessIssue]
    assert answer_of(400, {"error": {"message": "content_filter"}}).kind == "bad_request"  # pyright: ignore


def test_an_ending_is_a_word() -> None:
    assert [completion({"content": "x"}, finish=f).finish for f in (None, "length", {"a": 1})] == [
        "stop",
        "length",
        "{'a': 1}",
    ]


@pytest.mark.parametrize(
    "body",
    ["no  such\nthing", {"error": "no such thing"}, {"error": {"message": "no such thing"}},
     {"message": "no such thing"}, {"detail": "no such thing"}, {"detail": {"message": "no such thing"}}],
)  # fmt: skip
def test_the_words_of_an_error(body: Any) -> None:
    assert said(body) == "no such thing"
