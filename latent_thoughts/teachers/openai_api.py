"""Any endpoint that speaks OpenAI's chat completions, through the `openai` client and its own retries.

A 200 that holds no completion (half a JSON, an error in its body) is raised inside the HTTP client, where those
retries see it like a broken connection. So there is one loop of retries, with pauses that grow, jitter, and
Retry-After honoured.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import re
from collections.abc import Iterable
from typing import Any

from latent_thoughts.config.synthesize import Teacher as Config
from latent_thoughts.teachers.base import TOO_LONG, Answer, Answers, Completion, Failure, Request
from latent_thoughts.types import UserError

# Requests beyond those under way that wait for a place: so that none stays empty while replies are stored.
READY = 16
_OWN = "https://api.openai.com/v1"
_TOO_LONG = re.compile(r"context[ _](length|window|size)|(maximum|max) (context|model) ?len|too long|longer than", re.I)
_tokens: contextvars.ContextVar[int] = contextvars.ContextVar("tokens")  # of the request that a task is about


class OpenAITeacher:
    """Keeps `concurrency` requests under way, retried ones among them, within the limits a minute."""

    def __init__(self, config: Config):
        openai = imported()
        from aiolimiter import AsyncLimiter

        self.config, self.loop = config, asyncio.new_event_loop()
        self.places = asyncio.Semaphore(config.concurrency)
        self.limits = [
            (AsyncLimiter(rate, 60), counts_tokens)
            for rate, counts_tokens in ((config.requests_per_minute, False), (config.tokens_per_minute, True))
            if rate
        ]
        http = openai.DefaultAioHttpClient(
            event_hooks={"request": [self._pace], "response": [_insist_on_a_completion]}, timeout=config.timeout
        )
        self.client = openai.AsyncOpenAI(http_client=http, **settings(config))

    def ask(self, requests: Iterable[Request]) -> Answers:
        source, under_way = iter(requests), set[asyncio.Task[tuple[str, Answer]]]()
        answered: asyncio.Queue[tuple[str, Answer]] = asyncio.Queue()

        def ended(task: asyncio.Task[tuple[str, Answer]]) -> None:
            under_way.discard(task)
            if not task.cancelled():
                answered.put_nowait(task.result())

        def room() -> bool:
            return len(under_way) + answered.qsize() < self.config.concurrency + READY

        try:
            while True:
                while room() and (request := next(source, None)) is not None:
                    task = self.loop.create_task(self._one(request))
                    under_way.add(task)
                    task.add_done_callback(ended)
                if not under_way and answered.empty():
                    return
                yield self.loop.run_until_complete(answered.get())
        finally:  # whoever asked has stopped listening
            for task in under_way:
                task.cancel()
            if under_way:
                self.loop.run_until_complete(asyncio.wait(under_way))

    async def _one(self, request: Request) -> tuple[str, Answer]:
        _tokens.set(request.prompt_tokens + request.max_tokens)
        try:
            async with self.places:
                # Through `post`: the typed `create` spends as much time again on validating what it sends and gets.
                body = await self.client.post("/chat/completions", body=request.payload, cast_to=object)
        except imported().OpenAIError as error:
            return request.key, failure_of(error, self.config)
        return request.key, completion_of(body)

    async def _pace(self, _: Any) -> None:
        for limiter, counts_tokens in self.limits:
            await limiter.acquire(min(_tokens.get(), limiter.max_rate) if counts_tokens else 1)

    def close(self) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.close()


def imported() -> Any:
    """The `openai` package. Raises UserError naming the extra where it is not installed."""
    try:
        import aiohttp  # noqa: F401
        import openai
    except ImportError:
        raise UserError("teachers behind an endpoint need an extra: pip install 'latent-thoughts[teachers]'") from None
    return openai


def settings(config: Config) -> dict[str, Any]:
    """The client's settings. Raises UserError where OpenAI's own endpoint is asked without a key."""
    key = os.environ.get(config.key_env)
    if not key and config.base_url is None:
        raise UserError(f"no key: set the environment variable {config.key_env} (synthesize.teacher.key_env)")
    return {
        "api_key": key or "none",
        "base_url": config.base_url or _OWN,
        "timeout": config.timeout,
        "max_retries": config.retries,
    }


async def _insist_on_a_completion(response: Any) -> None:
    import httpx2

    if response.status_code != 200:
        return
    content = await response.aread()
    try:
        problem = problem_of(json.loads(content))
    except ValueError:
        problem = f"not JSON: {content[:80]!r}"
    if problem:
        raise httpx2.RemoteProtocolError(problem, request=response.request)


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


def failure_of(error: Any, config: Config) -> Failure:
    """What an error of the client means, in one line without the key."""
    openai = imported()
    where = config.base_url or _OWN
    text = _without_key(_message(error), config)
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return Failure("refused_key", f"{where} refuses the key in {config.key_env}: {text}", fatal=True)
    if isinstance(error, openai.NotFoundError):
        return Failure("unknown_model", f"{where} does not know model {config.model}: {text}", fatal=True)
    if isinstance(error, openai.RateLimitError):
        no_money = getattr(error, "code", None) == "insufficient_quota"
        return Failure("no_quota" if no_money else "rate_limit", text, fatal=no_money)
    if isinstance(error, openai.APIStatusError):
        return Failure(kind_of_status(error.status_code, text), text)
    causes = _causes(error)
    if any(type(cause).__name__ in ("ConnectError", "ClientConnectorError") for cause in causes):
        reason = next((str(c) for c in causes if type(c).__name__ == "ClientConnectorError"), str(causes[-1]))
        return Failure("unreachable", f"{where} cannot be reached: {_without_key(reason, config)}", fatal=True)
    if any(type(cause).__name__ == "RemoteProtocolError" for cause in causes):
        return Failure("broken_reply", f"{where} answered with {_without_key(str(causes[1]), config)}")
    if isinstance(error, openai.APITimeoutError) and not any(isinstance(c, ConnectionError) for c in causes):
        return Failure("timeout", f"{where} was silent for {config.timeout:g} seconds")
    return Failure("connection", f"{where} broke the connection: {_without_key(str(causes[-1]), config)}")


def kind_of_status(status: int, text: str) -> str:
    if status >= 500:
        return "server_error"
    return TOO_LONG if _TOO_LONG.search(text) else "bad_request"


def _causes(error: BaseException) -> list[BaseException]:
    found = [error]
    while (cause := found[-1].__cause__) is not None:
        found.append(cause)
    return found


def _message(error: Exception) -> str:
    body = getattr(error, "body", None)
    inner = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(inner or error).split())[:300]


def _without_key(text: str, config: Config) -> str:
    key = os.environ.get(config.key_env)
    return text.replace(key, f"(the key in {config.key_env})") if key else text
