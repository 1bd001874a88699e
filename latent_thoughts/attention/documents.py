"""The pass of training."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from latent_thoughts.attention.kernels import ends, fused, over_rows, rows_fit
from latent_thoughts.attention.rule import Rule, softmax
from latent_thoughts.attention.spans import Extend
from latent_thoughts.attention.squares import Square, Squares

SQUARE = 512  # documents up to so long are trained with their whole matrix of scores, where torch has no good kernel
ROUND = 32  # oneDNN compiles kernels for every length it meets, of rows and documents: only for multiples of this


class Documents:
    """A training pass: documents side by side in a row, each of which attends to itself."""

    def __init__(self, sizes: Sequence[int], device: torch.device):
        self.sizes, self.device = list(sizes), device
        self.runs = [(size, len(list(run))) for size, run in itertools.groupby(sizes)]  # of one length, side by side
        self.masks: dict[tuple[int, int, int], torch.Tensor] = {}
        self.stretches = _stretches(self.sizes)
        self.grouped = functools.cache(lambda *sizes: Extend([()] * len(sizes), sizes, [False] * len(sizes), device))

    @torch.compiler.disable
    def attend(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        q_HND, k_JND, v_JND = cast(q_HND, k_JND, v_JND)
        if self.device.type == "cpu" and q_HND.dtype != torch.float32:
            return self._in_squares(layer, q_HND, k_JND, v_JND, rule)
        if rule.fused and rule.window is None and 2 * len(self.runs) <= len(self.sizes):
            return self._by_runs(q_HND, k_JND, v_JND, rule)
        return self.grouped(*self.sizes).attend(layer, q_HND, k_JND, v_JND, rule)

    def _by_runs(self, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule) -> torch.Tensor:
        """Documents of one length as a batch, in place: nothing is gathered, nothing padded."""
        spans = [x.split([size * count for size, count in self.runs], 1) for x in (q_HND, k_JND, v_JND)]
        out = []
        for (size, _), *part in zip(self.runs, *spans, strict=True):
            q, k, v = (x.unflatten(1, (-1, size)).transpose(0, 1) for x in part)
            out.append(fused(q, k, v, None, rule).transpose(0, 1).flatten(1, 2))
        return torch.cat(out, 1)

    def _in_squares(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        """Short documents by their whole matrices of scores, up to three times as fast as torch's kernel in half
        precision (docs/log.md); long ones one at a time."""
        out, start = [], 0
        for sizes in self.stretches:
            q, k, v = (x.narrow(1, start, sum(sizes)) for x in (q_HND, k_JND, v_JND))
            start += sum(sizes)
            if sizes[0] > SQUARE:
                out.append(self.grouped(*sizes).attend(layer, q, k, v, rule))
                continue
            squares = self._squares(sizes, rule.window, len(q) // len(k), q.dtype)
            if rule.plain:
                out.append(Squares.apply(q, k, v, squares, rule.scaling))
            else:
                out += [_alone(square, q, k, v, rule) for square in squares]
        return torch.cat(out, 1)

    def _squares(self, sizes: Sequence[int], window: int | None, each: int, dtype: torch.dtype) -> list[Square]:
        """Where each stands, with tokens that follow it up to a multiple of ROUND.

        `each`: the queries of a key-value head.
        """
        made, start, end = [], 0, sum(sizes)
        for size in sizes:
            wide = min(size + -size % ROUND, end - start)
            back = min(window or wide, wide)
            if (hidden := self.masks.get((wide, back, each))) is None:
                seen = torch.ones(wide, wide, dtype=torch.bool, device=self.device).tril().triu(1 - back)
                hidden = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, -torch.inf)
                hidden = self.masks[wide, back, each] = hidden.repeat(each, 1)
            made.append(Square(start, size, wide, hidden))
            start += size
        return made


class FlashDocuments:
    """The same on a GPU, by flash attention over the row where that takes a layer. A compiler sees through it: what
    differs from row to row is a tensor and a bound."""

    def __init__(self, sizes: Sequence[int], device: torch.device):
        self.ends = ends(sizes, device)
        self.others: Any = Documents(sizes, device)  # where it does not
        self.longest = 1 << (max(sizes) - 1).bit_length()  # few bounds, should a compiler take them one by one

    def attend(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        q_HND, k_JND, v_JND = cast(q_HND, k_JND, v_JND)
        if not rows_fit(q_HND, v_JND, rule):
            return self.others.attend(layer, q_HND, k_JND, v_JND, rule)
        q_NHD, k_NJD, v_NJD = (x.transpose(0, 1).contiguous() for x in (q_HND, k_JND, v_JND))
        return over_rows(q_NHD, k_NJD, v_NJD, (self.ends, self.ends), (self.longest, self.longest), rule)


def cast(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For autocast: rotated queries and keys come in float32."""
    kind = values[0].device.type
    if not torch.is_autocast_enabled(kind):
        return values
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in values)


def _alone(square: Square, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule) -> torch.Tensor:
    """One document, for what `Squares` does not know."""
    q_HTD, k_JTD, v_JTD = (x[:, square.taken] for x in (q_HND, k_JND, v_JND))
    J, T = k_JTD.shape[:2]
    scores = (q_HTD * rule.scaling).reshape(J, -1, q_HTD.shape[2]) @ k_JTD.mT
    sinks = None if rule.sinks is None else rule.sinks.view(J, -1, 1).repeat_interleave(T, 1)
    shares = functional.dropout(softmax(scores, square.hidden, rule.softcap, sinks), rule.dropout)
    return (shares @ v_JTD).view(len(q_HTD), T, -1)[:, : square.size]


def _stretches(sizes: Sequence[int]) -> list[list[int]]:
    """Short documents that follow each other together, long ones alone."""
    stretches: list[list[int]] = []
    for size in sizes:
        if stretches and max(size, stretches[-1][0]) <= SQUARE:
            stretches[-1].append(size)
        else:
            stretches.append([size])
    return stretches
