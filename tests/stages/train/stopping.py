"""python stopping.py STEP ARGUMENTS: runs `latent-thoughts ARGUMENTS`, sent SIGTERM at a step. Also under torchrun.

There the processes but the main one see no checkpoint: of a shared file system they may see an older state.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from latent_thoughts import cli
from latent_thoughts.stages.train import checkpoint
from latent_thoughts.stages.train.trainer import Trainer


def stop_at(step: int) -> None:
    original = Trainer.step

    def step_and_stop(self: Trainer, batch: Any, rate: float) -> Any:
        figures = original(self, batch, rate)
        if self.counters.step == step and self.ranks.main:  # a signal to one of the processes is enough
            os.kill(os.getpid(), signal.SIGTERM)
        return figures

    Trainer.step = step_and_stop


def see_nothing() -> None:
    checkpoint.there = lambda path: False


if __name__ == "__main__":
    if os.environ.get("RANK", "0") != "0":
        see_nothing()
    stop_at(int(sys.argv.pop(1)))
    cli.main()
