"""The commands of single stages."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from latent_thoughts.cli.options import Iteration, Limit, Out, Overrides, RecipePath, Yes
from latent_thoughts.types import UserError

if TYPE_CHECKING:
    from latent_thoughts.em import Loop, Run


def prepare(recipe: RecipePath, overrides: Overrides = None, *, out: Out, limit: Limit = None) -> None:
    """Read, split, chunk and tokenise a corpus; set up the initial checkpoint."""
    with held(out):
        run = run_of(recipe, out, overrides, limit)
        _record(run, run.prepared)
        _tell(run.prepared, run.prepare().counts)


def synthesize(recipe: RecipePath, overrides: Overrides = None, *, out: Out, yes: Yes = False) -> None:
    """Get the warm start's thoughts, or paraphrases: those that come with the data, or a teacher's.

    Before a teacher behind an endpoint is asked, you are shown what it will take and cost.
    """
    from dataclasses import replace

    from latent_thoughts.approve import approval

    with held(out):
        run = replace(run_of(recipe, out, overrides), approve=approval(yes))
        folder = run.synthesized(run.recipe.synthesize.method)
        _record(run, folder)
        _tell(folder, run.synthesize().counts)


def sample(recipe: RecipePath, overrides: Overrides = None, *, out: Out, iteration: Iteration = 1) -> None:
    """E-step: infer thoughts for the corpus with the model of the iteration before."""
    with held(out):
        run = run_of(recipe, out, overrides)
        loop = _loop(run)
        folder = loop.e_step(iteration)
        _record(run, folder)
        _tell(folder, loop.sample(iteration).counts)


def train(recipe: RecipePath, overrides: Overrides = None, *, out: Out, iteration: Iteration = 0) -> None:
    """M-step: train on documents with their thoughts (iteration 0: the warm start).

    On several GPUs: torchrun --nproc-per-node 8 -m latent_thoughts.cli train RECIPE --out RUN
    """
    from latent_thoughts.store import run_lock

    main = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    with run_lock(out) if main else contextlib.nullcontext():
        run = run_of(recipe, out, overrides)
        loop = _loop(run)
        folder = loop.m_step(iteration)
        if main:
            _record(run, folder)
        manifest = run.train_warm_start() if iteration == 0 else loop.train(iteration)
        if main:
            _tell(folder, manifest.counts)


def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    *,
    out: Out,
    iteration: Iteration = 0,
    model: Annotated[
        str | None, Parameter(help="Ask the recipe's tasks of this model instead: a folder, a hub name or a GGUF file.")
    ] = None,
) -> None:
    """Likelihood, bound and answers of an iteration's model on held-out documents, and the recipe's tasks."""
    from latent_thoughts import examine
    from latent_thoughts.stages.evaluate.shown import places_table
    from latent_thoughts.terminal import output

    with held(out):
        run = run_of(recipe, out, overrides)
        if model is not None:
            _record(run, out / "tasks")
            _tell_tasks(examine.evaluate_model(run.recipe, model, out))
            return
        loop = _loop(run)
        folder = loop.iteration(iteration) / "evaluate"
        _record(run, folder)
        row, evaluated = loop.evaluate(iteration)
        _tell(folder, evaluated.counts)
        output().print(places_table(evaluated.counts))
        _tell_tasks(row["tasks"])
        examine.record(run.recipe, out, row)


def _record(run: Run, made: Path) -> None:
    """Leaves the recipe in the run folder, before its stage `made` is made."""
    from latent_thoughts.provenance import record_recipe

    if told := record_recipe(run.recipe, run.folder, made):
        print(f"latent-thoughts: {told}", file=sys.stderr)


def _loop(run: Run) -> Loop:
    """The run's EM."""
    from latent_thoughts.em import Loop

    return Loop(run, "em", run.recipe.sample, run.folder)


def _tell(folder: Path, counts: dict[str, object]) -> None:
    """Prints a stage's counts."""
    from latent_thoughts.cli.made import table
    from latent_thoughts.terminal import output

    output().print(table(folder, counts))


def _tell_tasks(results: list[dict[str, object]]) -> None:
    from latent_thoughts.stages.evaluate.shown import tasks_table
    from latent_thoughts.terminal import output

    if results:
        output().print(tasks_table(results))


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """The run's lock. Raises UserError where torchrun started several processes of a command that runs in one."""
    from latent_thoughts.parallel import launched
    from latent_thoughts.store import run_lock

    if launched() > 1:
        raise UserError("of the commands train alone runs in several processes: start this one without torchrun")
    with run_lock(out):
        yield


def run_of(recipe: Path, out: Path, overrides: list[str] | None, limit: int | None = None) -> Run:
    """The run of a recipe, with torch's threads set."""
    from latent_thoughts.config import load_recipe
    from latent_thoughts.em import Run
    from latent_thoughts.model import set_up_torch

    limits = [] if limit is None else [f"data.limit={limit}"]
    loaded = load_recipe(recipe, [*(overrides or []), *limits])
    set_up_torch(loaded.threads)
    return Run(loaded, out)
