"""What a response of OpenAI's chat completions means, whoever speaks it: endpoints, the Batch API, llama.cpp."""

from __future__ import annotations

import re
from typing import Any

from latent_thoughts.teachers.base import TOO_LONG, Answer, Completion, Failure

_TOO_LONG = re.compile(r"context[ _](length|window|size)|(maximum|max) (context|model) ?len|too long|longer than", re.I)


def answer_of(status: int, body: Any) -> Answer:
    """The completion in a response, or the failure that it tells of."""
    if status != 200:
        error = body.get("error") if isinstance(body, dict) else None
        text = str((error or {}).get("message") or body)[:300]
        return Failure(kind_of_status(status, text), text)
    problem = problem_of(body)
    return Failure("broken_reply", problem) if problem else completion_of(body)


def problem_of(body: Any) -> str | None:
    """Why a body is no chat completion; None where it is one."""
    if not isinstance(body, dict):
        return "not a JSON object"
    if error := body.get("error"):
        return f"an error in its body: {error.get('message', error) if isinstance(error, dict) else error}"
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return "no choices"
    return None if isinstance(choices[0].get("message"), dict) else "no message"


def completion_of(body: Any) -> Completion:
    choice, usage = body["choices"][0], body.get("usage") or {}
    text = choice["message"].get("content") or choice["message"].get("refusal") or ""
    counts = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
    refused = not choice["message"].get("content") and choice["message"].get("refusal")
    return Completion(text, "refusal" if refused else str(choice.get("finish_reason") or "stop"), *counts)


def kind_of_status(status: int, text: str) -> str:
    if status >= 500:
        return "server_error"
    return TOO_LONG if _TOO_LONG.search(text) else "bad_request"
