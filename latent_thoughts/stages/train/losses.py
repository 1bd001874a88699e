"""Cross-entropy of a head's logits in blocks over positions, with its gradient.

Axis suffixes: N positions that carry loss, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

EVEN = 32  # a GPU's matrix units want such multiples of positions, and of the vocabulary


class Behind(NamedTuple):
    """What stands behind a head: its logits are scaled, and then capped, to cap tanh(x / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        """In place."""
        if self.scale != 1:
            logits *= self.scale
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def back(self, slope: torch.Tensor, made: torch.Tensor) -> None:
        """The loss's slope by what was made becomes, in place, that by the head's logits. What was made is used up."""
        if self.cap is not None:
            slope *= made.div_(self.cap).square_().neg_().add_(1)
        if self.scale != 1:
            slope *= self.scale


PLAIN = Behind()


def soften(
    logits_NV: torch.Tensor,
    goal_N1: torch.Tensor,
    bias_V: torch.Tensor | None,
    behind: Behind,
    slope_NV: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses (N, 1) in float32, and the slope of their sum by the bias, if there is one. Writes that by the head's
    logits where `slope_NV` is given."""
    logits = logits_NV.float()
    if bias_V is not None:
        logits += bias_V
    logits = behind.of(logits)
    # softmax is one pass, logsumexp would be several; the likeliest token's share never underflows
    slope = torch.softmax(logits, 1)
    total = logits.amax(1, keepdim=True) - slope.amax(1, keepdim=True).log()
    losses = total - logits.gather(1, goal_N1)
    if slope_NV is None:
        return losses, None
    if torch.compiler.is_compiling():  # where it is no pass of its own
        slope = slope - (torch.arange(slope.shape[1], device=slope.device) == goal_N1).float()
    else:
        slope.scatter_add_(1, goal_N1, torch.full_like(total, -1))
    behind.back(slope, logits)
    slope_NV.copy_(slope)
    return losses, None if bias_V is None else slope.sum(0)


def losses_by_blocks(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    block: int,
    behind: Behind = PLAIN,
    how: Callable[..., Any] = soften,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of a linear head and what is behind it: (sum, differentiable; losses (N,), not differentiable).

    No more than `block` rows of logits exist at a time. The gradient is taken on the way, while a block's
    logits are there (as in Liger's fused linear cross-entropy, Hsu et al. 2024), so that none is computed twice.
    `how` is `soften`, or what a compiler made of it.
    """
    slope = torch.is_grad_enabled()
    return _Losses.apply(hidden_ND, weight_VD, bias_V, targets_N, block, behind, how, slope)  # pyright: ignore


def _even(rows: torch.Tensor) -> torch.Tensor:
    """With rows of zeros up to a multiple of EVEN."""
    return nn.functional.pad(rows, (0, 0, 0, more)) if (more := -len(rows) % EVEN) else rows


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, block: int, behind: Behind, how: Any, slope: bool
    ) -> Any:
        device, count, vocabulary = hidden.device, len(hidden), len(weight)
        half = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if half else hidden.dtype
        rows, matrix = hidden.to(dtype), weight.to(dtype)
        if hidden.is_cuda and block % EVEN == 0:
            rows, matrix = _even(rows), _even(matrix)
        losses = torch.empty(count, dtype=torch.float32, device=device)
        dhidden = torch.empty_like(hidden, dtype=torch.float32)
        # the weight's gradient is a large sum: of several blocks at once, as far as 8 bytes a logit go
        together = block * max(1, 8 // dtype.itemsize)
        slopes = rows.new_zeros(min(len(rows), together) if slope else 0, len(matrix))
        dbias: Any = torch.zeros(vocabulary, device=device)
        dweight: Any = None if count else torch.zeros_like(weight, dtype=torch.float32)
        with torch.autocast(device.type, enabled=False):
            for start in range(0, count, block):
                stop, held = min(start + block, count), start % together
                part = slopes[held : held + stop - start]
                logits, goal = (rows[start:stop] @ matrix.T)[:, :vocabulary], targets[start:stop, None]
                found, more = how(logits, goal, bias, behind, part[:, :vocabulary] if slope else None)
                losses[start:stop] = found[:, 0]
                if not slope:
                    continue
                if more is not None:
                    dbias += more
                dhidden[start:stop] = part @ matrix
                if stop == count or held + block == together:
                    end = stop if stop < count else len(rows)
                    product = (slopes[: held + end - start].T @ rows[start - held : end])[:vocabulary].float()
                    dweight = product if dweight is None else dweight.add_(product)
        ctx.mark_non_differentiable(losses)
        if slope:
            of_bias = None if bias is None else dbias.to(bias.dtype)
            ctx.grads = dhidden.to(hidden.dtype), dweight.to(weight.dtype), of_bias
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, total: torch.Tensor, _: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads, ctx.grads = ctx.grads, None
        return *(g if g is None else g.mul_(total) for g in grads), None, None, None, None, None
