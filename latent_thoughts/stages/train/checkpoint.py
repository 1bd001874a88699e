"""Checkpoints: model, optimizers, averages and the loader's place, written by any number of ranks and read by any.

checkpoint_000500/   a folder of torch.distributed.checkpoint, and state.json; complete or absent
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from latent_thoughts.parallel import Ranks
from latent_thoughts.store import read_json, settle, write_json

Optimizers = Sequence[torch.optim.Optimizer]


def folder_of(stage: Path, step: int) -> Path:
    return stage / f"checkpoint_{step:06}"


def found(stage: Path) -> list[Path]:
    """From the first step to the last."""
    return sorted(stage.glob("checkpoint_*"), key=lambda path: int(path.name.rpartition("_")[2]))


def best(stage: Path) -> Path | None:
    """The one with the lowest held-out loss (of equal ones the first)."""
    losses = [(read_json(path / "state.json")["held_out_loss"], path) for path in found(stage)]
    return min(((loss, path) for loss, path in losses if loss is not None), default=(0, None))[1]


def save(
    path: Path, ranks: Ranks, model: nn.Module, optimizers: Optimizers, averages: dict[str, Any], state: Any
) -> None:
    """`state` is JSON, the same on every rank."""
    temporary = path.with_name(f".{path.name}.tmp")
    if ranks.main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.wait()
    weights, moments = get_state_dict(model, list(optimizers))
    values = {"model": weights, "optimizers": moments, "averages": averages}
    with _in_one_process():
        state_dict_saver.save(values, checkpoint_id=temporary)
    ranks.wait()
    if ranks.main:
        write_json(temporary / "state.json", state)
        shutil.rmtree(path, ignore_errors=True)
        settle(temporary, path)
    ranks.wait()


def load(path: Path, ranks: Ranks, model: nn.Module, optimizers: Optimizers, averages: dict[str, Any]) -> Any:
    """Restores everything in place; returns the state."""
    weights, moments = get_state_dict(model, list(optimizers))
    values = {"model": weights, "optimizers": moments, "averages": averages}
    with _in_one_process():
        state_dict_loader.load(values, checkpoint_id=path)
    set_state_dict(model, list(optimizers), model_state_dict=weights, optim_state_dict=moments)
    return read_json(path / "state.json")


@contextlib.contextmanager
def _in_one_process() -> Iterator[None]:
    """Without the warning that this is what is meant where there are no ranks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def prune(stage: Path, keep: int) -> None:
    """Keeps the last `keep` checkpoints and the best one."""
    kept = best(stage)
    for path in found(stage)[:-keep]:
        if path != kept:
            remove(path)


def remove(path: Path) -> None:
    """Never half: what is being removed has no checkpoint's name."""
    aside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    shutil.rmtree(aside)
