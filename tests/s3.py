"""A real S3 server on loopback (moto's), behind a proxy that makes faults: 500, 503, slow and broken-off replies."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from latent_thoughts.places import place

# What a store may do to a request: refuse it, do it and say that it failed, be slow, break off in the middle of a body.
KINDS = ("refused 500", "refused 503", "done, but 500", "slow", "broken off")


class Store:
    """The server, its proxy, and what the proxy does: each request meets a fault with probability `share`, in turns."""

    def __init__(self, upstream: tuple[str, int]):
        self.upstream, self.share, self.slow = upstream, 0.0, 0.3
        self.random, self.met = random.Random(0), Counter[str]()
        self.lock = threading.Lock()
        self.proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.proxy.daemon_threads = True
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """How a process reaches it, and nothing else."""
        address = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.server_port}", "AWS_DEFAULT_REGION": "us-east-1"}
        keys = {"AWS_ACCESS_KEY_ID": "KEYID-of-the-test", "AWS_SECRET_ACCESS_KEY": "SECRET-of-the-test"}
        nowhere = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull}
        return {**address, **keys, **nowhere, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}

    def bucket(self) -> Path:
        """A new one."""
        name = f"b-{uuid.uuid4().hex[:12]}"
        connection = http.client.HTTPConnection(*self.upstream)
        connection.request("PUT", f"/{name}")
        assert connection.getresponse().status == 200
        return place(f"s3://{name}")

    @contextlib.contextmanager
    def faults(self, share: float, seed: int = 0) -> Iterator[Counter[str]]:
        """Counts those that were met."""
        self.share, self.random, self.met = share, random.Random(seed), Counter()
        try:
            yield self.met
        finally:
            self.share = 0.0

    def fault(self) -> str:
        with self.lock:
            if self.random.random() >= self.share:
                return ""
            kind = KINDS[self.met.total() % len(KINDS)]
            self.met[kind] += 1
            return kind


@contextlib.contextmanager
def served() -> Iterator[Store]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line a request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    store = Store(server.get_host_and_port())
    try:
        yield store
    finally:
        store.proxy.shutdown()
        store.proxy.server_close()
        server.stop()


def _error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected {code}</Message></Error>".encode()


REFUSALS = {"refused 500": (500, _error("InternalError")), "refused 503": (503, _error("SlowDown"))}


def _handler(store: Store) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body are written apart, which would take 40 ms a request

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = store.fault()
            if fault in REFUSALS:
                self.answer(*REFUSALS[fault], {"Content-Type": "application/xml"})
                return
            connection = http.client.HTTPConnection(*store.upstream)
            connection.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k != "Expect"})
            response = connection.getresponse()
            content = response.read()
            connection.close()
            if fault == "slow":
                time.sleep(store.slow)
            if fault == "done, but 500":
                self.answer(*REFUSALS["refused 500"], {"Content-Type": "application/xml"})
            else:
                kept = ("transfer-encoding", "connection", "content-length", "server", "date")
                headers = {k: v for k, v in response.getheaders() if k.lower() not in kept}
                size = response.getheader("Content-Length") if self.command == "HEAD" else None
                self.answer(response.status, content, headers, size, fault == "broken off")

        def answer(
            self, status: int, content: bytes, headers: dict[str, str], size: str | None = None, broken: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", size or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if broken else content)
            self.close_connection = broken

        def log_message(self, *_: Any) -> None:
            pass

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

    return Handler
