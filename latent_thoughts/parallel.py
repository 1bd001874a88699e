"""Ranks: one process, or several started by torchrun or Ray Train, each with a part of the model and of every batch."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from latent_thoughts.types import UserError

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `size`; `local` of them run on one machine."""

    rank: int = 0
    size: int = 1
    local: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def machine(self) -> int:
        return self.rank // self.local

    @property
    def first_here(self) -> bool:
        """Of the processes of its machine."""
        return self.rank % self.local == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of a tensor on the CPU."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def most(self, value: int) -> int:
        """The largest of all ranks' values."""
        values = torch.tensor(value)
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def agree(self, value: str) -> bool:
        """Whether all ranks have the same."""
        number = int.from_bytes(hashlib.sha256(value.encode()).digest()[:7], "big")
        return self.most(number) == -self.most(-number)

    def any(self, flag: bool) -> bool:
        return bool(self.most(int(flag)))

    def told(self, look: Callable[[], Made]) -> Made:
        """What the main process finds. It alone looks, since of a shared file system others may see an older state.

        Raises UserError in all processes where it does there.
        """
        found: list[Any] = [None]
        with all_or_none(self):
            if self.main:
                found[0] = look()
        if self.size > 1:
            dist.broadcast_object_list(found, 0, device=torch.device("cpu"))
        return found[0]

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def launched() -> int:
    """How many processes torchrun or Ray Train started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """Joins the processes of torchrun, over gloo on CPUs and NCCL on GPUs; those of Ray Train are joined already.

    Raises UserError where this machine has fewer GPUs than processes.
    """
    if launched() == 1:
        yield Ranks()
        return
    if dist.is_initialized():
        yield _joined()
        return
    if torch.cuda.is_available():
        rank, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if rank >= found:
            raise UserError(
                f"torchrun started more processes than there are GPUs: give --nproc-per-node {found}, or for CPUs "
                'CUDA_VISIBLE_DEVICES="" and model.device=cpu'
            )
        torch.cuda.set_device(rank)
    dist.init_process_group(backends(torch.cuda.is_available()))
    try:
        yield _joined()
    finally:
        dist.destroy_process_group()


def backends(gpus: bool) -> str:
    """Figures are added up on the CPU, gradients where the model is."""
    return "cpu:gloo,cuda:nccl" if gpus else "gloo"


def _joined() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextlib.contextmanager
def all_or_none(ranks: Ranks) -> Iterator[None]:
    """Ends all processes where one gives up, for which the others would wait."""
    failed: UserError | None = None
    try:
        yield
    except UserError as error:
        failed = error
    if ranks.any(failed is not None):
        raise failed or UserError("another of the processes gave up")


def in_turn(ranks: Ranks, make: Callable[[], Made], together: int = 1) -> Made:
    """What `make` returns, called by so many processes of a machine `together` and then by the next: what it needs
    meanwhile, such as a whole model of which a shard stays. Raises UserError in all processes where it does in one."""
    made: list[Made] = []
    own = ranks.rank % ranks.local // together
    for turn in range(ranks.most(own) + 1):
        with all_or_none(ranks):
            if turn == own:
                made.append(make())
    return made[0]


def mesh(device: torch.device, ranks: Ranks, how: str) -> DeviceMesh:
    """All ranks in one dimension; with `hybrid` machines, which keep a copy each, by the ranks of a machine.

    Raises UserError where the machines have unequal numbers of ranks.
    """
    if how != "hybrid":
        return init_device_mesh(device.type, (ranks.size,), mesh_dim_names=("shard",))
    if ranks.size % ranks.local:
        raise UserError(f"train.shard: hybrid needs as many ranks on every machine, not {ranks.size} in all")
    sizes = ranks.size // ranks.local, ranks.local
    return init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))


def shard(root: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, half: bool) -> None:
    """FSDP2: every block, and what is left of `root`, in shards over the mesh and on its device, one after the other.

    `half`: gathered and multiplied in bfloat16, reduced in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)
