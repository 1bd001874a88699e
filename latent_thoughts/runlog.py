"""What a run leaves behind and what it shows: provenance, metrics, progress with rate and ETA."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from latent_thoughts import __version__, places, transfer
from latent_thoughts.config import Dumper, Model, Recipe, Train, load_recipe
from latent_thoughts.files import Damaged
from latent_thoughts.places import relative
from latent_thoughts.store import atomic, held_run
from latent_thoughts.types import UserError

console = Console(stderr=True)
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 and C1, but for tab and newline


def printable(text: str) -> str:
    """What a model or a corpus said, for a terminal, which would obey the control characters in it."""
    return CONTROLS.sub("", text)


def provenance(recipe: Recipe) -> dict[str, Any]:
    """Versions, machine and seed of a run."""
    packages = ("torch", "transformers", "tokenizers", "numpy", "pyarrow")
    return {
        "latent_thoughts": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "seed": recipe.seed,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def save_recipe(recipe: Recipe, folder: Path, name: str = "recipe.yaml") -> None:
    """Writes the resolved recipe with versions and seed as comments, so that it can be run again.

    Raises UserError where that would overwrite a recipe that a person wrote.
    """
    import yaml

    path = folder / name
    if path.exists() and not path.read_text(encoding="utf-8").startswith("# latent_thoughts:"):
        raise UserError(f"{path} is not a run's: keep your own recipe outside the run folder, where it is written")
    head = "".join(f"# {name}: {value}\n" for name, value in provenance(recipe).items())
    body = yaml.dump(recipe.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)
    with atomic(path) as temporary:
        temporary.write_text(head + body, encoding="utf-8")


# Sections of the recipe that a finished stage was made with, besides those of the stages before it.
MADE_WITH = {
    "prepare": ("seed", "data", "chunking", "model", "contamination"),
    "synthesize": ("synthesize",),
    "train": ("train", "em"),
    "sample": ("sample", "em"),
    "evaluate": ("sample", "evaluate"),
}


def record_recipe(recipe: Recipe, folder: Path, made: Path) -> str:
    """Writes the recipe of a command that makes a single stage, `made`.

    RUN/recipe.yaml stays what it is where other stages were finished with settings that are different now; the recipe
    is then written beside it, under the stage's name. Returns the line that tells so; else an empty one.
    """
    own = folder / f"recipe.{relative(made, folder).replace('/', '.')}.yaml"
    finished = {path.parent for pattern in ("prepare", "iter_*/*") for path in folder.glob(f"{pattern}/manifest.json")}
    settled = {section for stage in finished - {made} for section in MADE_WITH.get(stage.name, ())}
    differing = [name for name in _differing(folder / "recipe.yaml", recipe) if name.partition(".")[0] in settled]
    if not differing:
        save_recipe(recipe, folder)
        own.unlink(missing_ok=True)
        return ""
    save_recipe(recipe, folder, own.name)
    return (
        f"what is finished in {folder} was made with other settings ({', '.join(differing)}): its recipe.yaml stays, "
        f"and this command's is {own.name}; to go on with the run's own, give {folder / 'recipe.yaml'}"
    )


def _differing(path: Path, recipe: Recipe) -> list[str]:
    """Settings that a recipe in a file has different, as in `train.lr`: all sections, where it cannot be read."""
    if not path.exists():
        return []
    try:
        known = load_recipe(path).model_dump()
    except UserError:
        known = {}
    found = []
    for section, value in recipe.model_dump().items():
        before = known.get(section)
        if isinstance(value, dict) and isinstance(before, dict):
            found += [f"{section}.{name}" for name in value if before.get(name) != value[name]]
        elif before != value:
            found.append(section)
    return found


def model_card(train: Train, model: Model, counts: dict[str, Any], seed: int) -> str:
    """A Hugging Face model card: what the model was made from, and how."""
    import yaml

    settings = {"train": train.model_dump(mode="json", exclude_none=True), "seed": seed, "counts": counts}
    recipe = yaml.dump(settings, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    base = model.base if isinstance(model.base, str) else f"{model.base.get('model_type', 'llama')} from scratch"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [latent-thoughts]
---

Continued pretraining of `{base}` on documents with their thoughts, by latent-thoughts {__version__}
(the method: *Reasoning to Learn from Latent Thoughts*, arXiv 2503.18866).

The model writes a thought between `<|latent_start|><|latent_prior|>` and `<|latent_end|>`, and then the text;
after `<|latent_start|><|latent_posterior|>` it says the thought behind the text before it.

```yaml
{recipe}```
"""


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


@dataclass(frozen=True, slots=True)
class Event:
    """How far a piece of work is. `figures` are shown behind the bar."""

    work: str
    done: float
    total: float
    unit: str
    figures: str = ""


Sink = Callable[[Event], None]
Advance = Callable[..., None]
_sink: Sink | None = None


@contextlib.contextmanager
def sent_to(sink: Sink) -> Iterator[None]:
    """Progress goes to `sink` instead of the terminal (from a worker process to its parent)."""
    global _sink
    previous, _sink = _sink, sink
    try:
        yield
    finally:
        _sink = previous


class Bars:
    """A terminal display of events: one bar a name, with rate and ETA; plain lines without a terminal."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, tuple[Any, str]] = {}

    def show(self, name: str, event: Event) -> None:
        label = f"{name}{event.work}"
        known = self.tasks.get(name)
        if known is None or known[1] != label:
            if known is not None:
                self.progress.remove_task(known[0])
            # the terminal display knows an open end as None
            total = event.total if math.isfinite(event.total) else None
            task = self.progress.add_task(label, total=total, rate="", figures="")
            self.tasks[name] = known = (task, label)
        task = self.progress.tasks[self.progress.task_ids.index(known[0])]
        rate = f"{task.speed:,.1f} {event.unit}/s" if task.speed else ""
        self.progress.update(known[0], completed=event.done, rate=rate, figures=event.figures)
        if event.done >= event.total and not console.is_terminal:
            print(f"{label}: {event.done:,.0f} {event.unit} {event.figures}".rstrip(), file=sys.stderr, flush=True)

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


class ProgressFile:
    """progress.json in the run folder that this process holds: how far it is, for `latent-thoughts watch`."""

    EVERY, STORED = 1.0, 20.0  # seconds between two writes, here and in a store
    RECENT = 60.0  # seconds over which the rate is taken

    def __init__(self, work: str, total: float, unit: str):
        self.head = {"work": work, "total": total if math.isfinite(total) else None, "unit": unit, "pid": os.getpid()}
        self.folder, self.began = held_run(), time.time()
        self.recent: deque[tuple[float, float]] = deque()

    def write(self, done: float, figures: Mapping[str, float], last: bool) -> None:
        now = time.monotonic()  # clocks may jump
        if self.folder is None:
            return
        every = self.STORED if places.remote(self.folder) else self.EVERY
        if self.recent and now - self.recent[-1][0] < every and not last:
            return
        self.recent.append((now, done))
        while len(self.recent) > 2 and now - self.recent[0][0] > self.RECENT:
            self.recent.popleft()
        then, before = self.recent[0]
        passed = now - then
        rate = (done - before) / passed if passed > 0 else None
        shown = {name: value for name, value in figures.items() if math.isfinite(value)}
        value = {**self.head, "done": done, "rate": rate, "began": self.began, "time": time.time(), "figures": shown}
        if places.remote(self.folder):
            places.write(self.folder / "progress.json", json.dumps(value).encode())
            return
        # Replaced as a whole, so that no reader sees half of it; not synced, since it is written anew in a second.
        temporary = self.folder / f".progress.json.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.replace(self.folder / "progress.json")


@contextlib.contextmanager
def sent_here() -> Iterator[Sink]:
    """Where this process shows progress: what it tells of itself, or another told it."""
    if _sink is not None:
        yield _sink
        return
    with Bars() as bars:
        yield lambda event: bars.show("", event)


@contextlib.contextmanager
def track(work: str, total: float, unit: str) -> Iterator[Advance]:
    """Progress of one piece of work: call the yielded function with the amount done, and figures."""
    done = 0.0
    last = 0.0

    with sent_here() as sink:
        kept = ProgressFile(work, total, unit)

        def advance(amount: float, **figures: float) -> None:
            nonlocal done, last
            done += amount
            kept.write(min(done, total), figures, done >= total)
            now = time.monotonic()
            if now - last > 0.2 or done >= total:
                last = now
                text = " ".join(f"{name} {value:,.3g}" for name, value in figures.items())
                sink(Event(work, min(done, total), total, unit, text))

        yield advance
