"""What a response of OpenAI's chat completions means, whoever speaks it: endpoints, the Batch API, llama.cpp."""

from __future__ import annotations

import re
from typing import Any

from latent_thoughts.config.base import nested
from latent_thoughts.teachers.base import TOO_LONG, Answer, Completion, Failure

_CUT = ("length", "max_tokens", "model_length")  # what endpoints call it, in small letters
_FILTERED = ("content_filter", "ResponsibleAIPolicyViolation", "content_policy_violation")  # codes of errors
_TOO_LONG = re.compile(r"context[ _](length|window|size)|(maximum|max) (context|model) ?len|too long|longer than", re.I)


def answer_of(status: int, body: Any) -> Answer:
    """The completion in a response, or the failure that it tells of."""
    if not 200 <= status < 300:
        text = said(body)
        return filtered(status, body) or Failure(kind_of_status(status, text), text)
    problem = problem_of(body)
    return Failure("broken_reply", problem) if problem else completion_of(body)


def filtered(status: int, body: Any) -> Completion | None:
    """The refusal in an error by which a filter declines the question, which it would again; None for another error.
    What the prompt took is not told."""
    if status == 400 and any(name.endswith("code") and value in _FILTERED for name, value in nested(body)):
        return Completion("", "content_filter", None, 0)
    return None


def said(body: Any) -> str:
    """The words of an error's body, in whichever of the usual places they stand."""
    for name in ("error", "detail", "message"):
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    return " ".join(str(body).split())


def problem_of(body: Any) -> str | None:
    """Why a body is no chat completion; None where it is one."""
    if not isinstance(body, dict):
        return "not a JSON object"
    if body.get("error"):
        return f"an error in its body: {said(body)}"
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return "no choices"
    if choices[0].get("finish_reason") == "error":
        return "an error in the middle of its reply"
    message = choices[0].get("message")
    if not isinstance(message, dict):
        return "no message"
    return None if isinstance(message.get("content"), str | list | None) else "a message that is no text"


def completion_of(body: Any) -> Completion:
    choice, usage = body["choices"][0], body.get("usage")
    message, finish = choice["message"], str(choice.get("finish_reason") or "stop")[:100]
    text = _text(message.get("content"))
    if not text and message.get("refusal"):
        text, finish = _text(message["refusal"]), "refusal"
    finish = "length" if finish.lower() in _CUT else finish
    prompt, reply = (_count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
    return Completion(text, finish, prompt or None, reply or (None if text else reply))  # no text is made of nothing


def _text(content: Any) -> str:
    """Some endpoints give a text in parts."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    texts = (part.get("text") for part in content if isinstance(part, dict))
    return "".join(text for text in texts if isinstance(text, str))


def _count(usage: Any, name: str) -> int | None:
    """A number of tokens; None where it is not told, or nothing that it could be."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return int(value) if isinstance(value, int | float) and 0 <= value < 2**40 else None


def kind_of_status(status: int, text: str) -> str:
    if status >= 500:
        return "server_error"
    return TOO_LONG if _TOO_LONG.search(text) else "bad_request"
