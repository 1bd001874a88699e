"""Any endpoint that speaks OpenAI's chat completions, through the `openai` client and its own retries.

A success that holds no completion (half a JSON, nothing at all, an error in its body) is raised inside the HTTP client,
where those retries see it like a broken connection. So there is one loop of retries, with pauses that grow, jitter, and
Retry-After honoured.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections import deque
from collections.abc import Iterable
from typing import Any

from latent_thoughts.config.synthesize import Teacher as Config
from latent_thoughts.teachers.base import Answer, Answers, Failure, Request
from latent_thoughts.teachers.chat import completion_of, filtered, problem_of
from latent_thoughts.teachers.openai_client import failure_of, hidden, imported, settings

_tokens: contextvars.ContextVar[int] = contextvars.ContextVar("tokens")  # of the request that a task is about


class OpenAITeacher:
    """Keeps `concurrency` requests under way, retried ones among them, within the limits a minute."""

    def __init__(self, config: Config):
        openai = imported()
        from aiolimiter import AsyncLimiter

        self.config, self.loop = config, asyncio.new_event_loop()
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
        """A request is under way until its answer is stored: the next one goes out after that, so that a process that
        is killed has no more replies to lose than those it was waiting for. It is made before, while all are waited
        for, so that it goes out at once."""
        source, ready, under_way = iter(requests), deque[Request](), set[asyncio.Task[tuple[str, Answer]]]()
        answered: asyncio.Queue[asyncio.Task[tuple[str, Answer]]] = asyncio.Queue()
        try:
            while True:
                while ready and len(under_way) < self.config.concurrency:
                    task = self.loop.create_task(self._one(ready.popleft()))
                    under_way.add(task)
                    task.add_done_callback(answered.put_nowait)
                room = answered.empty() and len(ready) < self.config.concurrency
                if room and (request := next(source, None)) is not None:
                    ready.append(request)
                    self.loop.run_until_complete(asyncio.sleep(0))  # in which what was asked is sent
                elif under_way:
                    task = self.loop.run_until_complete(answered.get())
                    yield (answer := task.result())
                    under_way.remove(task)
                    if isinstance(answer[1], Failure) and answer[1].fatal:
                        ready.clear()
                else:
                    return
        finally:  # whoever asked has stopped listening
            for task in under_way:
                task.cancel()
            if under_way:
                self.loop.run_until_complete(asyncio.wait(under_way))

    async def _one(self, request: Request) -> tuple[str, Answer]:
        import httpx2

        _tokens.set(request.prompt_tokens + request.max_tokens)
        try:
            # Through `post`: the typed `create` spends as much time again on validating what it sends and gets. As the
            # response itself: what is JSON is JSON, whatever its header calls it.
            response = await self.client.post("/chat/completions", body=request.payload, cast_to=httpx2.Response)
        except imported().OpenAIError as error:
            declined = filtered(getattr(error, "status_code", 0), getattr(error, "body", None))
            return request.key, declined or failure_of(error, self.config)
        return request.key, hidden(completion_of(json.loads(response.content)), self.config)

    async def _pace(self, _: Any) -> None:
        for limiter, counts_tokens in self.limits:
            await limiter.acquire(min(_tokens.get(), limiter.max_rate) if counts_tokens else 1)

    def close(self) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.close()


async def _insist_on_a_completion(response: Any) -> None:
    import httpx2

    if not response.is_success:
        return
    content = await response.aread()
    try:
        problem = problem_of(json.loads(content))
    except (ValueError, RecursionError):
        problem = f"not JSON: {content!r}"
    if problem:
        raise httpx2.RemoteProtocolError(problem, request=response.request)
