"""The demo: EM on a built-in world for several seeds side by side, and one report over all of them."""

from __future__ import annotations

from pathlib import Path

from latent_thoughts import seeds
from latent_thoughts.config import load_recipe
from latent_thoughts.stages.report import report
from latent_thoughts.store import run_lock


def demo(
    out: Path,
    numbers: list[int],
    samples: list[int],
    overrides: list[str],
    name: str = "castle",
    at_once: int | None = None,
) -> None:
    """Runs the recipe `name` for every seed and writes OUT/results.json and OUT/report.html."""
    extra = [f"em.samples={samples}"] if samples else []
    recipe = load_recipe(seeds.recipe_path(f"{name}.yaml"), [*overrides, *extra])
    with run_lock(out):
        seeds.run(recipe, out, numbers, at_once)
        report(out)
