"""metrics.jsonl of a training, and the same to an experiment tracker."""

from __future__ import annotations

import importlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latent_thoughts import places, transfer
from latent_thoughts.files import Damaged
from latent_thoughts.store import atomic
from latent_thoughts.types import UserError

Log = Callable[[dict[str, Any]], None]


def _tracker(kind: str, folder: Path, from_step: int) -> tuple[Log, Callable[[], None]]:
    """(log, close) of an experiment tracker. Raises UserError where it is not installed."""
    if kind == "none":
        return lambda values: None, lambda: None
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            # which then drops what an earlier process told of later steps
            writer = SummaryWriter(str(places.bench(folder) / "tensorboard"), purge_step=from_step + 1)

            def write(values: dict[str, Any]) -> None:
                for name, value in values.items():
                    writer.add_scalar(name, value, values["step"])

            return write, writer.close
        tracker = importlib.import_module(kind)
    except ImportError:
        raise UserError(f"train.tracker: {kind} is not installed: pip install {kind}") from None
    identity = folder / "tracker_run"  # so that a resumed stage goes on with its run, and another gets its own
    if not identity.exists():
        name = "-".join([*folder.resolve().parts[-3:], uuid.uuid4().hex[:8]])
        with atomic(identity) as temporary:
            temporary.write_text(name, encoding="utf-8")
    name = identity.read_text(encoding="utf-8")
    run = {"id": name} if kind == "wandb" else {}  # to trackio the name is the identity
    tracker.init(project="latent-thoughts", name=name, resume="allow", **run)

    def log(values: dict[str, Any]) -> None:
        tracker.log({name: value for name, value in values.items() if name != "step"}, step=values["step"])

    return log, tracker.finish


def logged(line: bytes, path: Path) -> dict[str, Any]:
    """A line of metrics.jsonl. Raises UserError where it is not what was written."""
    try:
        found = json.loads(line)
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            raise ValueError("a line without a step")
    except (ValueError, RecursionError) as error:
        raise Damaged(path, str(error)) from None
    return found


class Metrics:
    """metrics.jsonl: one line a logged step, and the same to a tracker. On resume, lines from after the checkpoint
    are dropped. Of several ranks the main one writes. In a store they appear at every checkpoint (`sync`)."""

    def __init__(self, folder: Path, from_step: int, tracker: str = "none", writes: bool = True):
        self._file, self.folder = None, folder
        if not writes:
            return
        path, kept = places.bench(folder) / "metrics.jsonl", []
        if (known := folder / "metrics.jsonl").exists():
            lines = known.read_bytes().split(b"\n")[:-1]  # what has no end was cut off
            kept = [f"{line.decode()}\n" for line in lines if logged(line, known)["step"] <= from_step]
        with atomic(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self._track, self._end = _tracker(tracker, folder, from_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
            self._track(values)

    def sync(self) -> None:
        """Puts what has grown on this machine into a store."""
        if self._file is None or not places.remote(self.folder):
            return
        bench = places.bench(self.folder)
        transfer.put(bench / "metrics.jsonl", self.folder / "metrics.jsonl")
        transfer.put_files(bench / "tensorboard", self.folder / "tensorboard")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._end()
            self.sync()
