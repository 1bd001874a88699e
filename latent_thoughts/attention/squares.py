"""Attention of short documents by whole matrices of scores, in memory that one document leaves to the next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class Square:
    """A document in its row. Its matrix takes in tokens that follow it, which its own do not see."""

    start: int
    size: int
    wide: int  # size, and those tokens
    hidden: torch.Tensor  # -inf where a key is hidden, else 0: (I x wide, wide), I queries of a key-value head

    @property
    def own(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def taken(self) -> slice:
        return slice(self.start, self.start + self.wide)


class Squares(torch.autograd.Function):
    """softmax(scaling Q K' + hidden) V of every document, (H, N, D), and its gradients.

    Operation by operation, autograd would make a dozen tensors for a document in every layer, of sizes of its own, to
    be got and freed (docs/log.md). Here its attention weights alone outlive it.
    """

    @staticmethod
    def forward(ctx: Any, q_HND: Any, k_JND: Any, v_JND: Any, squares: Sequence[Square], scaling: float) -> Any:
        (H, N, _), (J, _, V) = q_HND.shape, v_JND.shape
        areas = [H * s.wide**2 for s in squares]
        out_NHV, weights = q_HND.new_empty(N, H, V), q_HND.new_empty(sum(areas)).split(areas)
        rows, (matrix,) = _rooms(q_HND, v_JND, squares, 2, 1)
        for s, kept in zip(squares, weights, strict=True):
            q, out = (_front(room, J, H // J, s.wide, x.shape[2]) for room, x in zip(rows, (q_HND, v_JND), strict=True))
            weight, scores = (_front(room, J, H // J * s.wide, s.wide) for room in (kept, matrix))
            q.copy_(q_HND[:, s.taken].unflatten(0, (J, -1)))
            torch.baddbmm(s.hidden, q.flatten(1, 2), k_JND[:, s.taken].mT, alpha=scaling, out=scores)
            torch.softmax(scores, -1, out=weight)
            torch.bmm(weight, v_JND[:, s.taken], out=out.flatten(1, 2))
            out_NHV[s.own] = out[:, :, : s.size].flatten(0, 1).transpose(0, 1)
        ctx.save_for_backward(q_HND, k_JND, v_JND, *weights)
        ctx.squares, ctx.scaling = squares, scaling
        return out_NHV.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_HNV: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q_HND, k_JND, v_JND, *weights = ctx.saved_tensors
        (H, _, D), (J, _, V), scaling = q_HND.shape, v_JND.shape, ctx.scaling
        dq_HND, dk_JND, dv_JND = (torch.empty_like(x) for x in (q_HND, k_JND, v_JND))
        dq_JIND, slope_JINV = (x.unflatten(0, (J, -1)) for x in (dq_HND, slope_HNV))
        rows, matrices = _rooms(q_HND, v_JND, ctx.squares, 4, 2)
        for s, kept in zip(ctx.squares, weights, strict=True):
            q, dq, slope = (_front(x, J, H // J, s.wide, y) for x, y in zip(rows[:3], (D, D, V), strict=True))
            dk, dv = (_front(rows[3], J, s.wide, width) for width in (D, V))  # one after the other
            weight, dweight, dscores = (_front(x, J, H // J * s.wide, s.wide) for x in (kept, *matrices))
            q.copy_(q_HND[:, s.taken].unflatten(0, (J, -1)))
            slope[:, :, : s.size] = slope_JINV[:, :, s.own]
            slope[:, :, s.size :] = 0  # what tokens of other documents see here counts for nothing
            dv_JND[:, s.own] = torch.bmm(weight.mT, slope.flatten(1, 2), out=dv)[:, : s.size]
            torch.bmm(slope.flatten(1, 2), v_JND[:, s.taken].mT, out=dweight)
            torch.ops.aten._softmax_backward_data.out(dweight, weight, -1, weight.dtype, grad_input=dscores)
            torch.bmm(dscores, k_JND[:, s.taken], out=dq.flatten(1, 2))
            torch.mul(dq[:, :, : s.size], scaling, out=dq_JIND[:, :, s.own])
            torch.bmm(dscores.mT, q.flatten(1, 2), out=dk)
            torch.mul(dk[:, : s.size], scaling, out=dk_JND[:, s.own])
        return dq_HND, dk_JND, dv_JND, None, None


def _rooms(q_HND: Any, v_JNV: Any, squares: Sequence[Square], rows: int, matrices: int) -> Iterator[Any]:
    """Memory for rows and matrices of scores of the widest document, a number of each."""
    widest, width = max(s.wide for s in squares), max(q_HND.shape[2], v_JNV.shape[2])
    return (q_HND.new_empty(number, len(q_HND) * widest * x) for number, x in ((rows, width), (matrices, widest)))


def _front(room: torch.Tensor, *shape: int) -> torch.Tensor:
    return room[: math.prod(shape)].view(shape)
