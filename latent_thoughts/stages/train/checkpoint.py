"""Checkpoints: model, optimizers, averages and the loader's place, written by any number of ranks and read by any.

checkpoint_000500/   a folder of torch.distributed.checkpoint, and state.json with their hashes; complete or absent

Here a checkpoint gets its name when it is whole. In a store `state.json` makes it whole: it is put last and goes first;
every machine puts what its ranks wrote.
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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from latent_thoughts import places, transfer
from latent_thoughts.files import Damaged, settle
from latent_thoughts.parallel import Ranks
from latent_thoughts.seals import hashes, read_sealed, write_sealed
from latent_thoughts.stages.train.safe_reading import Planner, Reader
from latent_thoughts.types import UserError

Optimizers = Sequence[torch.optim.Optimizer]


def folder_of(stage: Path, step: int) -> Path:
    return stage / f"checkpoint_{step:06}"


def step_of(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def found(stage: Path) -> list[Path]:
    """From the first step to the last."""
    return sorted((path for path in stage.glob("checkpoint_*") if there(path)), key=step_of)


def there(path: Path) -> bool:
    return (path / "state.json").exists()


def best(stage: Path) -> Path | None:
    """The one with the lowest held-out loss (of equal ones the first)."""
    losses = [(read_state(path)["held_out_loss"], path) for path in found(stage)]
    return min(((loss, path) for loss, path in losses if loss is not None), default=(0, None))[1]


def save(
    path: Path, ranks: Ranks, model: nn.Module, optimizers: Optimizers, averages: dict[str, Any], state: Any
) -> None:
    """In the place of what is there. `state` is JSON, the same on every rank."""
    temporary = _working_name(path, ranks.machine)
    if ranks.main or (ranks.first_here and places.remote(path)):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.wait()
    weights, moments = get_state_dict(model, list(optimizers))
    values = {"model": weights, "optimizers": moments, "averages": averages}
    try:
        with _in_one_process():
            state_dict_saver.save(values, checkpoint_id=temporary)
    except BaseException:  # such as a full disk, on which it must not lie about
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    ranks.wait()
    if places.remote(path):
        if ranks.main and there(path):
            remove(path)
        ranks.wait()
        if ranks.first_here:
            transfer.put_files(temporary, path)
            shutil.rmtree(temporary)
        ranks.wait()
        if ranks.main:
            write_sealed(path / "state.json", state)
    elif ranks.main:
        write_sealed(temporary / "state.json", {**state, "files": hashes(temporary)})
        shutil.rmtree(path, ignore_errors=True)
        settle(temporary, path)
    ranks.wait()


def load(path: Path, ranks: Ranks, model: nn.Module, optimizers: Optimizers, averages: dict[str, Any]) -> Any:
    """Restores everything in place; returns the state. Averages that the checkpoint lacks begin at its weights.

    Raises UserError for a checkpoint that is damaged, or of another model or optimizer.
    """
    state = ranks.told(lambda: check(path))
    if ranks.first_here:  # one copy a machine
        transfer.local(path)
    ranks.wait()
    weights, moments = get_state_dict(model, list(optimizers))
    values = {"model": weights, "optimizers": moments}
    reader = Reader(transfer.local(path))
    known = reader.read_metadata().state_dict_metadata  # which says in one line what is wrong with it
    if averaged := any(name.startswith("averages.") for name in known):
        values["averages"] = averages
    try:
        with _in_one_process():
            state_dict_loader.load(values, storage_reader=reader, planner=Planner())
    except CheckpointException as error:
        (first, _), *_ = error.failures.values()
        if "Missing key" in str(first):
            raise UserError(f"checkpoint {path} is of another model or optimizer ({first})") from None
        raise UserError(f"checkpoint {path} cannot be read ({' '.join(str(first).split())}): remove it") from None
    ranks.wait()
    if ranks.first_here:
        transfer.forget(path)
    set_state_dict(model, list(optimizers), model_state_dict=weights, optim_state_dict=moments)
    if not averaged:
        for name, average in averages.items():
            average.copy_(weights[f"model.{name}"])
    return state


def read_state(path: Path) -> dict[str, Any]:
    return read_sealed(path / "state.json", "place", "counters", "recent", "held_out_loss")


def check(path: Path) -> dict[str, Any]:
    """A checkpoint's state. Raises UserError where one of its files is not what was written. (In a store, where every
    machine puts its own, the hashes of files are not known.)"""
    state = read_state(path)
    if (known := state.get("files")) is not None:
        there = hashes(path)
        for name, value in known.items():
            if there.get(name) != value:
                raise Damaged(path / name, "checksum differs" if name in there else "it is missing")
    return state


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
    """Never half: what is being removed has no checkpoint's name, or no state."""
    if places.remote(path):
        transfer.remove(path, "state.json")
        return
    aside = _working_name(path)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    shutil.rmtree(aside)


def _working_name(path: Path, machine: int = 0) -> Path:
    """The same on every rank of a machine; here, where all see the same folder, on all machines."""
    if places.remote(path):
        return places.bench(path.parent) / f".{path.name}.{machine}.tmp"
    return path.with_name(f".{path.name}.tmp")
