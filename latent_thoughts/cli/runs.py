"""The commands of whole runs, and what they will cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from latent_thoughts.cli.options import AtOnce, Limit, Out, Overrides, Place, RecipePath, Yes
from latent_thoughts.cli.stages import held, run_of
from latent_thoughts.types import UserError


def demo(
    *,
    out: Out = Path("runs/demo"),
    seeds: Annotated[str, Parameter(help="Comma-separated.")] = "0,1",
    at_once: AtOnce = None,
    samples: Annotated[str, Parameter(help="Further numbers of draws K, for both presets: 1,4,16")] = "",
    recipe: Annotated[str, Parameter(help="castle, hindsight or stories: a recipe of a built-in world.")] = "castle",
    set_: Annotated[list[str] | None, Parameter(name="--set", help="Overrides of the recipe.")] = None,
) -> None:
    """Bootstrap a small model on a built-in world and compare it with every baseline."""
    from latent_thoughts.demo import demo as run

    run(out, _integers(seeds, "--seeds"), _integers(samples, "--samples"), set_ or [], recipe, at_once)


def experiment(
    name: Annotated[str, Parameter(help="methods, bootstrap, samples, ablations, data, or a YAML file like theirs.")],
    overrides: Overrides = None,
    *,
    size: Annotated[
        Literal["tiny", "small", "paper"],
        Parameter(help="tiny: the castle, on a laptop; small: SmolLM2-135M on GSM8K; paper: planned, not run."),
    ] = "tiny",
    seeds: Annotated[str, Parameter(help="Comma-separated; a verdict needs two at least.")] = "0,1,2",
    at_once: AtOnce = None,
    out: Annotated[Place | None, Parameter(name=["--out", "-o"], help="The run folder; paper needs none.")] = None,
    limit: Limit = None,
) -> None:
    """Run one of the paper's experiments for several seeds: tables, figures, a report, and verdict.json."""
    from latent_thoughts import experiment as experiments

    limits = [] if limit is None else [f"data.limit={limit}"]
    changes, numbers = [*(overrides or []), *limits], _integers(seeds, "--seeds")
    if size == "paper":
        from latent_thoughts.scale.estimate import estimate, show

        show(estimate(experiments.named(name).recipe(size, changes)), None)
        return
    if out is None:
        raise UserError(f"--out is missing: name a folder for the runs of size {size}")
    experiments.experiment(name, size, numbers, out, changes, at_once)


def em(recipe: RecipePath, overrides: Overrides = None, *, out: Out, limit: Limit = None, yes: Yes = False) -> None:
    """All stages in turn: warm start, EM iterations, baselines, report."""
    from latent_thoughts import em as chain
    from latent_thoughts.approve import approval
    from latent_thoughts.stages.report import report as write

    with held(out):
        run = run_of(recipe, out, overrides, limit)
        chain.em(run.recipe, out, approval(yes))
        write(out)


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    *,
    json: Annotated[Place | None, Parameter(help="Write the plan to this file too.")] = None,
) -> None:
    """What a run of a recipe will cost: tokens, hours, money and disk of every stage, before it starts."""
    from latent_thoughts.config import load_recipe
    from latent_thoughts.model import set_up_torch
    from latent_thoughts.scale.estimate import estimate, show

    loaded = load_recipe(recipe, overrides)
    set_up_torch(loaded.threads)
    show(estimate(loaded), json)


def _integers(text: str, name: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{name} must be whole numbers with commas between them, not {text!r}") from None
    if twice := [number for number in found if found.count(number) > 1]:
        raise UserError(f"{name} has {twice[0]} more than once")
    return found
