"""The Batch API on loopback, after its documentation: files, batches, output and error files."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from loopback import Body, Loopback, error, plain_reply, uploaded

Fate = Callable[[str, Body], str]  # (batch id, request body) to "answered", "expired", "refused" or "broken"


class Batches(Loopback):
    """A batch is over after `looks` retrievals. `fate` decides what becomes of each request."""

    def __init__(
        self, fate: Fate = lambda batch, body: "answered", looks: int = 1, valid: bool = True, **settings: Any
    ):
        super().__init__(**settings)
        self.fate, self.looks, self.valid = fate, looks, valid
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.seen: dict[str, int] = {}
        self.pages = {"/v1/files": self._files, "/v1/batches": self._batches}

    def lines(self, batch: str) -> list[Body]:
        """The requests in a batch."""
        return [json.loads(line) for line in self.files[self.batches[batch]["input_file_id"]].splitlines()]

    def _files(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        if method == "POST":
            form = uploaded(body, headers)
            assert form["purpose"] == b"batch"
            return 200, json.dumps(self._file(form["file"])).encode()
        return 200, self.files[path.split("/")[3]]

    def _file(self, content: bytes) -> Body:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return {"id": name, "object": "file", "bytes": len(content), "created_at": 1, "filename": "x.jsonl",
                "purpose": "batch", "status": "processed"}  # fmt: skip

    def _batches(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        if method == "POST":
            asked = json.loads(body)
            assert asked["endpoint"] == "/v1/chat/completions" and asked["completion_window"] == "24h"
            name = f"batch_{len(self.batches)}"
            self.batches[name] = {**asked, "id": name, "object": "batch", "created_at": 1, "status": "validating"}
            return 200, json.dumps(self.batches[name]).encode()
        name = path.split("?")[0].removeprefix("/v1/batches").strip("/")
        if not name:
            listed = {"object": "list", "data": list(self.batches.values()), "has_more": False}
            return 200, json.dumps(listed).encode()
        self.seen[name] = self.seen.get(name, 0) + 1
        if self.seen[name] == self.looks:
            self.batches[name] |= self._over(name)
        elif self.seen[name] < self.looks:
            self.batches[name]["status"] = "in_progress"
        return 200, json.dumps(self.batches[name]).encode()

    def _over(self, name: str) -> Body:
        if not self.valid:
            problem = {"code": "invalid_json_line", "message": "This line is not parseable as valid JSON.", "line": 1}
            return {"status": "failed", "errors": {"object": "list", "data": [problem]}}
        good: list[Body] = []
        bad: list[Body] = []
        for line in self.lines(name):
            fate, row = self.fate(name, line["body"]), {"id": "batch_req_1", "custom_id": line["custom_id"]}
            if fate == "answered":
                self.asked.append(line["body"]["messages"][-1]["content"])
                response = {"status_code": 200, "request_id": "r", "body": self.reply(line["body"])}
                good.append({**row, "response": response, "error": None})
            elif fate == "expired":
                problem = {"code": "batch_expired", "message": "This request could not be executed in time."}
                bad.append({**row, "response": None, "error": problem})
            elif fate == "refused":
                response = {"status_code": 400, "request_id": "r", "body": error("This prompt is not allowed.")}
                bad.append({**row, "response": response, "error": None})
            else:
                bad.append({**row, "response": None, "error": {"code": "server_error", "message": "It broke."}})
        over: Body = {"status": "expired" if any("expired" in str(b["error"]) for b in bad) else "completed"}
        for field, rows in (("output_file_id", good), ("error_file_id", bad)):
            if rows:
                over[field] = self._file("".join(json.dumps(row) + "\n" for row in rows).encode())["id"]
        return over


__all__ = ["Batches", "plain_reply"]
