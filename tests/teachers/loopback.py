"""An endpoint on loopback that speaks OpenAI's chat completions and Batch API, over real sockets, with real faults.

python tests/teachers/loopback.py PORT_FILE LATENCY AT_ONCE      (what the throughput benchmark runs)
"""

from __future__ import annotations

import asyncio
import email.parser
import email.policy
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

Body = dict[str, Any]
FAULTS = ("429", "500", "reset", "hang", "half", "error_in_200")
RECENT = 0.1  # seconds in which a client may have read a reply, and not stored it yet
ENDING = ("reset", "hang", "half", "dropped")  # faults that the connection does not outlive


def completion(text: str, finish: str = "stop", prompt_tokens: int = 100) -> Body:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(text.split())}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def error(message: str, code: str | None = None, kind: str = "invalid_request_error") -> Body:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def plain_reply(body: Body) -> Body:
    """A thought that depends on the question, and is good."""
    question = body["messages"][-1]["content"]
    return completion("It follows, step by step: " + " ".join(reversed(question.split()[:30])))


class Loopback:
    """A server in a thread: `with Loopback(...) as server: server.url`."""

    def __init__(
        self,
        reply: Callable[[Body], Body] = plain_reply,
        faults: float = 0.0,
        seed: int = 0,
        latency: float = 0.0,
        at_once: int = 10**9,
        key: str | None = None,
        model: str | None = None,
        window: int = 10**9,
    ):
        self.reply, self.share, self.random, self.latency, self.at_once = (
            reply,
            faults,
            random.Random(seed),
            latency,
            at_once,
        )
        self.key, self.model, self.window = key, model, window
        self.paths: list[str] = []  # of every chat completion that was asked for, with what stands behind it
        self.asked: list[str] = []  # the last message of every request that came
        self.when: list[float] = []
        self.faults: Counter[str] = Counter()  # "dropped": the client was gone before it got its reply
        self.connections = 0  # open ones
        self.unconfirmed = 0  # good replies that the client may not have kept: its connection ended right behind them
        self.now = self.most_at_once = 0
        self.pages: dict[str, Callable[[str, str, bytes, dict[str, str]], tuple[int, bytes]]] = {}  # further paths
        self.url = ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        sent: float | None = None  # when the last reply was, if it was a good one and no request has come since
        unread = False
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                sent = None
                method, path, _ = head[0].split(" ")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not path.startswith("/v1/chat/completions"):
                    prefix = next((p for p in self.pages if path.startswith(p)), None)
                    status, answer = self.pages[prefix](method, path, body, headers) if prefix else (404, b"{}")
                    _answer(writer, status, answer)
                else:
                    self.paths.append(path)
                    fault = await self._chat(reader, writer, json.loads(body), headers)
                    sent = time.monotonic() if fault is None else None
                    if fault in ENDING:
                        break
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        except ConnectionError:  # a reset tells that something was not read
            unread = True
        finally:
            self.connections -= 1
            self.unconfirmed += sent is not None and (unread or time.monotonic() < sent + RECENT)
            writer.close()

    async def _chat(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: Body, headers: dict[str, str]
    ) -> str | None:
        """Answers one question; the fault that it was answered with."""
        self.asked.append(body["messages"][-1]["content"])
        self.when.append(time.monotonic())
        if (refusal := self._refused(body, headers)) is not None:
            _answer(writer, refusal[0], json.dumps(refusal[1]).encode())
            return "refused"
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        try:
            return await self._faulty(reader, writer, body)
        finally:
            self.now -= 1

    def _refused(self, body: Body, headers: dict[str, str]) -> tuple[int, Body] | None:
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            given = headers.get("authorization", "").removeprefix("Bearer ")
            return 401, error(f"Incorrect API key provided: {given}.", "invalid_api_key")
        if self.model is not None and body["model"] != self.model:
            return 404, error(f"The model `{body['model']}` does not exist", "model_not_found")
        if len(self.asked[-1]) > self.window:
            return 400, error(
                f"This model's maximum context length is {self.window} tokens.", "context_length_exceeded"
            )
        return None

    async def _faulty(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: Body) -> str | None:
        fault = self.random.choice(FAULTS) if self.random.random() < self.share else None
        if self.now > self.at_once:
            fault = "429"
        answer = json.dumps(self.reply(body)).encode()
        await asyncio.sleep(self.latency)
        if fault is None and (reader.at_eof() or writer.is_closing()):
            fault = "dropped"
        if fault is not None:
            self.faults[fault] += 1
        if fault == "429":
            _answer(writer, 429, json.dumps(error("slow down", "rate_limit")).encode(), {"Retry-After": "0.05"})
        elif fault == "500":
            _answer(writer, 500, json.dumps(error("oops", kind="server_error")).encode())
        elif fault == "reset":
            writer.transport.abort()
        elif fault == "hang":
            await reader.read()  # until the client goes
        elif fault == "half" and self.random.random() < 0.5:  # whole by its length, half by its content
            _answer(writer, 200, answer[: len(answer) // 2])
        elif fault == "half":
            _answer(writer, 200, answer[: len(answer) // 2], length=len(answer))
        elif fault == "error_in_200":
            _answer(writer, 200, json.dumps(error("overloaded", kind="server_error")).encode())
        elif fault is None:
            _answer(writer, 200, answer)
        return fault

    def __enter__(self) -> Loopback:
        self.loop, ready = asyncio.new_event_loop(), threading.Event()

        async def main() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            ready.set()
            self.stop = asyncio.Event()
            await self.stop.wait()
            server.close()
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.thread = threading.Thread(target=lambda: self.loop.run_until_complete(main()), daemon=True)
        self.thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()
        self.loop.close()


_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}


def _answer(
    writer: asyncio.StreamWriter,
    status: int,
    body: bytes,
    headers: dict[str, str] | None = None,
    length: int | None = None,
) -> None:
    fields = {"Content-Type": "application/json", "Content-Length": str(length or len(body)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    writer.write(f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}\r\n{head}\r\n".encode() + body)


def uploaded(body: bytes, headers: dict[str, str]) -> dict[str, bytes]:
    """The parts of a multipart form."""
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(
        f"Content-Type: {headers['content-type']}\r\n\r\n".encode() + body
    )
    return {p.get_param("name", header="content-disposition"): p.get_payload(decode=True) for p in message.iter_parts()}


if __name__ == "__main__":
    with Loopback(latency=float(sys.argv[2]), at_once=int(sys.argv[3])) as server:
        Path(sys.argv[1]).write_text(server.url)
        server.thread.join()
