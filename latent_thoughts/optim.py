"""Optimizers: AdamW, and Muon over stacks of equal matrices.

torch.optim.Muon orthogonalises one matrix after the other in bf16. A small model has many small
matrices, and on a CPU the calls cost more than the products (benchmarks/muon.py). Here matrices of
equal shape go through the Newton-Schulz iteration together, in their own precision on a CPU; those that FSDP
shards are gathered for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from latent_thoughts.config import Train

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic iteration, Jordan et al. 2024


def orthogonalise(stack: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz towards U Vᵀ of every matrix U S Vᵀ of a stack, shape (matrices, rows, columns); on a GPU in
    bfloat16, as Jordan's own."""
    a, b, c = COEFFICIENTS
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.device.type == "cuda":
        x = x.bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(stack.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay; the same update as torch.optim.Muon.

    The rate grows with the outputs a matrix has for an input. Those `transposed` are kept as (inputs, outputs).
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        transposed: Iterable[torch.Tensor] = (),
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.transposed = {id(parameter) for parameter in transposed}
        for group in self.param_groups:
            self.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in group["params"]})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, bool], list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape, id(parameter) in self.transposed].append(parameter)
            for (shape, transposed), parameters in alike.items():
                self._step(parameters, shape[::-1] if transposed else shape, group)

    def _step(self, parameters: list[torch.Tensor], shape: Sequence[int], group: dict[str, Any]) -> None:
        """On matrices of one shape; `shape` is (outputs, inputs)."""
        momentum, decay = group["momentum"], group["lr"] * group["weight_decay"]
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        gradients = torch.stack([_local(p.grad) for p in parameters if p.grad is not None])
        averages = torch.stack([_local(b) for b in buffers]).lerp_(gradients, 1 - momentum)
        updates = _by_whole_matrices(orthogonalise, gradients.lerp(averages, momentum), parameters)
        rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
        for parameter, buffer, average, update in zip(parameters, buffers, averages, updates, strict=True):
            _local(buffer).copy_(average)
            _local(parameter).mul_(1 - decay).add_(update, alpha=-rate)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a parameter, or what belongs to one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _by_whole_matrices(
    function: Callable[[torch.Tensor], torch.Tensor], stack: torch.Tensor, parameters: list[torch.Tensor]
) -> Iterable[torch.Tensor]:
    """A function of a stack of whole matrices, where the stack holds this rank's shards of them.

    Every rank gathers all and takes its part of the result: what is sent is a gradient's worth a step.
    """
    first = parameters[0]
    if not isinstance(first, DTensor):
        return function(stack)
    mesh, placed = first.device_mesh, first.placements
    whole = [
        DTensor.from_local(part, mesh, placed, shape=first.shape, stride=first.stride()).full_tensor() for part in stack
    ]
    # without a source rank nothing is sent: all have the same
    return [
        distribute_tensor(matrix, mesh, placed, src_data_rank=None).to_local()
        for matrix in function(torch.stack(whole))
    ]


def _adamw(parameters: list[torch.Tensor], config: Train) -> torch.optim.AdamW:
    """With the state of all parameters, which torch makes where a gradient first comes.

    A parameter that gets none (an idle vision tower) would have none in a checkpoint, and be missed when that is
    loaded; and to save before the first step torch takes a step of its own, which counts.
    """
    adamw = torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    for parameter in parameters:
        adamw.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return adamw


def optimizers(model: Any, config: Train) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon (Jordan et al. 2024) on the hidden matrices and AdamW on everything else."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    outside = {id(layer.weight) for layer in (*tables, model.get_input_embeddings(), model.get_output_embeddings())}
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in parameters if config.optimizer == "muon" and p.ndim == 2 and id(p) not in outside]
    rest = [p for p in parameters if all(p is not q for q in hidden)]
    built: list[torch.optim.Optimizer] = [_adamw(rest, config)]
    if hidden:
        transposed = [module.weight for module in model.modules() if isinstance(module, Conv1D)]
        built.append(Muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay, transposed=transposed))
    for optimizer in built:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return built
