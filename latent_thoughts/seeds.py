"""One recipe for several seeds side by side, and one results.json over all of them.

OUT/recipe.yaml
OUT/seed_N/        a run (em.py) a seed
OUT/results.json   the rows of all seeds
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any

from latent_thoughts import progress, provenance
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


def run(recipe: Recipe, out: Path, seeds: list[int], at_once: int | None = None) -> None:
    """A run for every seed, `at_once` at a time, by default as many as there are GPUs, or else cores, and
    OUT/results.json. Resumes.

    Raises UserError where one is killed.
    """
    from latent_thoughts.executors.local import end_now, gpus

    if not seeds:
        raise UserError("--seeds is empty: name at least one seed")
    if at_once is not None and at_once < 1:
        raise UserError(f"--at-once must be 1 or more, not {at_once}")
    provenance.save_recipe(recipe, out)
    context = multiprocessing.get_context("spawn")
    events, names = context.Queue(), [] if recipe.model.device == "cpu" else gpus()
    workers = min(len(seeds), at_once or min(cores(), len(names) or len(seeds)))
    start = (events, context.Value("i", 0), workers, names)
    with ProcessPoolExecutor(workers, context, _start, start) as pool:
        try:
            _run_all(pool, recipe, out, seeds, workers, events)
        except BrokenProcessPool:
            raise UserError(
                "a seed's process was killed (for want of memory?): what is finished is kept; run again to go on, with "
                "fewer seeds at a time if it was memory"
            ) from None
        except BaseException:  # of one seed, or Ctrl-C: nothing waits for what the others are at
            end_now(pool)
            raise
    _merge(out, seeds)


def _run_all(pool: ProcessPoolExecutor, recipe: Recipe, out: Path, seeds: list[int], workers: int, events: Any) -> None:
    """Shows what the seeds tell until all have ended. Raises the error of the first that fails."""
    values, waiting, pending = recipe.model_dump(), iter(seeds), set[Future[None]]()
    with progress.Bars() as bars:
        while True:
            # none ahead: a process that is to end would begin with what lies before it
            for seed in islice(waiting, workers - len(pending)):
                pending.add(pool.submit(_run_seed, values, out / f"seed_{seed}", seed))
            if not pending:
                return
            done, pending = wait(pending, timeout=0.2)
            while not events.empty():
                seed, event = events.get()
                bars.show(f"seed {seed}: ", event)
            for job in done:
                job.result()


def _run_seed(values: dict[str, Any], folder: Path, seed: int) -> None:
    from latent_thoughts.em import em
    from latent_thoughts.model import set_up_torch

    recipe = parse(Recipe, {**values, "seed": seed}, "recipe")
    set_up_torch(recipe.threads)
    with run_lock(folder), progress.sent_to(lambda event: _events.put((seed, event))):
        em(recipe, folder)


_events: Any = None  # a worker's way to its parent


def _start(events: Any, numbers: Any, workers: int, names: list[str]) -> None:
    """Sets a worker up. One whose parent was killed must not go on writing to the run folder."""
    from latent_thoughts.executors.local import live_with_driver, take_gpus

    global _events
    _events = events
    events.cancel_join_thread()  # an end that waits for somebody to read what is told would be none
    take_gpus(numbers, workers, names)
    live_with_driver()


def _merge(out: Path, seeds: list[int]) -> None:
    """One results.json over all seeds."""
    parts = [read_json(out / f"seed_{seed}" / "results.json") for seed in seeds]
    run = {**parts[0]["run"], "seeds": seeds}
    if ended := [told for part in parts for told in part["run"].get("ended", [])]:
        run["ended"] = ended
    write_json(out / "results.json", {"run": run, "rows": [row for part in parts for row in part["rows"]]})
