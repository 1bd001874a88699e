"""One recipe for several seeds side by side, and one results.json over all of them.

OUT/recipe.yaml
OUT/seed_N/        a run (em.py) a seed
OUT/results.json   the rows of all seeds
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from latent_thoughts import runlog
from latent_thoughts.config import Recipe, parse
from latent_thoughts.machine import cores
from latent_thoughts.store import read_json, run_lock, write_json
from latent_thoughts.types import UserError


def recipe_path(name: str) -> Path:
    """A recipe that comes with the package, or with its source tree."""
    here = Path(__file__).parent
    for folder in (here / "recipes", here.parent / "recipes"):
        if (folder / name).exists():
            return folder / name
    raise UserError(f"recipe {name} did not come with this installation")


def run(recipe: Recipe, out: Path, seeds: list[int]) -> None:
    """A run for every seed, as many at a time as there are cores, and OUT/results.json. Resumes."""
    if not seeds:
        raise UserError("--seeds is empty: name at least one seed")
    runlog.save_recipe(recipe, out)
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    workers = min(len(seeds), cores())
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(events,)) as pool:
        values = recipe.model_dump()
        jobs = [pool.submit(_run_seed, values, out / f"seed_{seed}", seed) for seed in seeds]
        _show(jobs, events)
        for job in jobs:
            job.result()
    _merge(out, seeds)


def _show(jobs: list[Future[None]], events: Any) -> None:
    with runlog.Bars() as bars:
        pending = set(jobs)
        while pending:
            done, pending = wait(pending, timeout=0.2)
            while not events.empty():
                seed, event = events.get()
                bars.show(f"seed {seed}: ", event)
            if any(job.exception() for job in done):
                for job in pending:
                    job.cancel()
                return


def _run_seed(values: dict[str, Any], folder: Path, seed: int) -> None:
    from latent_thoughts.em import em
    from latent_thoughts.model import set_up_torch

    recipe = parse(Recipe, {**values, "seed": seed}, "recipe")
    set_up_torch(recipe.threads)
    with run_lock(folder), runlog.sent_to(lambda event: _events.put((seed, event))):
        em(recipe, folder)


_events: Any = None  # a worker's way to its parent


def _start(events: Any) -> None:
    """Sets a worker up. One whose parent was killed must not go on writing to the run folder."""
    global _events
    _events, parent = events, os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _merge(out: Path, seeds: list[int]) -> None:
    """One results.json over all seeds."""
    parts = [read_json(out / f"seed_{seed}" / "results.json") for seed in seeds]
    run = {**parts[0]["run"], "seeds": seeds}
    write_json(out / "results.json", {"run": run, "rows": [row for part in parts for row in part["rows"]]})
