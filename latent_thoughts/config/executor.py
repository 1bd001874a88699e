"""Where stages run. Nothing here is part of a stage's key: it changes how fast, never what comes out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from latent_thoughts.config.base import Positive, Section

Amount = Annotated[float, Field(ge=0)]


class Executor(Section):
    """Processes of this machine, or actors of a Ray cluster, that share a stage's shards."""

    kind: Literal["local", "ray"] = "local"
    workers: Positive = 1  # processes or actors at a time; with local and 1 the command's own process works
    address: str | None = None  # of a Ray cluster: auto or HOST:PORT; default: one is started here
    cpus: Amount = 1  # of an actor, and of a process that trains; may be a fraction
    gpus: Amount = 0  # the same; a fraction shares a GPU, several are for engine.vllm_parallel
    train_workers: Positive = 1  # processes that train a model together, where Ray starts them
    retries: Annotated[int, Field(ge=0)] = 5  # of an actor or a training whose process or node was lost
