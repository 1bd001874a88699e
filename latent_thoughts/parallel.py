"""Ranks: one process, or several started by torchrun or Ray Train, each with a part of the model and of every batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from latent_thoughts.types import UserError


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

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor(float(flag)))) if self.size > 1 else flag

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


def shard(root: nn.Module, blocks: Iterable[nn.Module], ranks: Ranks, how: str, half: bool) -> None:
    """FSDP2: every block, and what is left of `root`, in shards over the ranks.

    `hybrid` shards within a machine and keeps a copy on each. `half`: gathered and multiplied in bfloat16,
    reduced in float32. Raises UserError where the machines have unequal numbers of ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    sizes, names = (ranks.size,), ("shard",)
    if how == "hybrid":
        if ranks.size % ranks.local:
            raise UserError(f"train.shard: hybrid needs as many ranks on every machine, not {ranks.size} in all")
        sizes, names = (ranks.size // ranks.local, ranks.local), ("replicate", "shard")
    mesh = init_device_mesh(next(root.parameters()).device.type, sizes, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)
