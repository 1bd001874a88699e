"""python sampling_driver.py RECIPE RUN FOLDER: the first E-step of a run, into another folder, noting what is begun."""

from __future__ import annotations

import sys
from pathlib import Path

from latent_thoughts.config import load_recipe
from latent_thoughts.em import Run
from latent_thoughts.stages import sample as sampling
from latent_thoughts.store import run_lock
from tests.executors.faulty import Watched


def sample(run: Run, folder: Path) -> None:
    sampling.Shards = Watched
    with run_lock(folder.parent):
        sampling.sample(run.recipe, run.recipe.sample, run.warm_start / "train", run.prepared, folder, 1)


if __name__ == "__main__":
    sample(Run(load_recipe(Path(sys.argv[1])), Path(sys.argv[2])), Path(sys.argv[3]))
