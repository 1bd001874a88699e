"""The pass of training."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from latent_thoughts.attention.rule import Rule, softmax
from latent_thoughts.attention.spans import Extend

SQUARE = 512  # documents up to so long are trained with their whole matrix of scores, where torch has no good kernel
ROUND = 32  # oneDNN compiles kernels for every length it meets, of rows and documents: only for multiples of this


class Documents:
    """A training pass: documents side by side in a row, each of which attends to itself."""

    def __init__(self, sizes: Sequence[int], device: torch.device):
        self.sizes, self.device = list(sizes), device
        self.runs = [(size, len(list(run))) for size, run in itertools.groupby(sizes)]  # of one length, side by side
        self.ends = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=device)
        self.masks: dict[tuple[int, int], torch.Tensor] = {}
        self.grouped = functools.cache(lambda *sizes: Extend([()] * len(sizes), sizes, [False] * len(sizes), device))

    @torch.compiler.disable
    def attend(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        kind = self.device.type
        if torch.is_autocast_enabled(kind):  # rotated queries and keys come in float32
            q_HND, k_JND, v_JND = (x.to(torch.get_autocast_dtype(kind)) for x in (q_HND, k_JND, v_JND))
        if kind == "cpu" and q_HND.dtype != torch.float32:
            return self._one_by_one(layer, q_HND, k_JND, v_JND, rule)
        half = q_HND.dtype in (torch.bfloat16, torch.float16)
        if half and rule.plain and q_HND.shape[2] <= 256 and (varlen := _varlen(self.device)):
            window, longest = (rule.window or 0) - 1, max(self.sizes)  # how far back besides itself; -1: to the start
            q, k, v = (x.transpose(0, 1).contiguous() for x in (q_HND, k_JND, v_JND))
            bounds = self.ends, self.ends, longest, longest
            out = varlen(q, k, v, *bounds, scale=rule.scaling, window_size=(window, 0), enable_gqa=True)
            return out.transpose(0, 1)
        if rule.fused and rule.window is None and 2 * len(self.runs) <= len(self.sizes):
            return self._by_runs(q_HND, k_JND, v_JND, rule)
        return self.grouped(*self.sizes).attend(layer, q_HND, k_JND, v_JND, rule)

    def _by_runs(self, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule) -> torch.Tensor:
        """Documents of one length as a batch, in place: nothing is gathered, nothing padded."""
        spans = [x.split([size * count for size, count in self.runs], 1) for x in (q_HND, k_JND, v_JND)]
        out = []
        for (size, _), *part in zip(self.runs, *spans, strict=True):
            q, k, v = (x.unflatten(1, (-1, size)).transpose(0, 1) for x in part)
            batch = functional.scaled_dot_product_attention(
                q, k, v, None, rule.dropout, is_causal=True, scale=rule.scaling, enable_gqa=True
            )
            out.append(batch.transpose(0, 1).flatten(1, 2))
        return torch.cat(out, 1)

    def _one_by_one(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        """A short document goes with tokens that follow it, which its own do not see, up to a multiple of ROUND."""
        out, start = [], 0
        for size in self.sizes:
            wide = size if size > SQUARE else min(size + -size % ROUND, q_HND.shape[1] - start)
            q, k, v = (x.narrow(1, start, wide) for x in (q_HND, k_JND, v_JND))
            out.append(self._alone(layer, q, k, v, rule)[:, :size])
            start += size
        return torch.cat(out, 1)

    def _alone(
        self, layer: int, q_HTD: torch.Tensor, k_JTD: torch.Tensor, v_JTD: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        """One document; a short one in plain products, up to three times as fast as torch's kernel (docs/log.md)."""
        T, J = q_HTD.shape[1], k_JTD.shape[0]
        if T > SQUARE:
            return self.grouped(T).attend(layer, q_HTD, k_JTD, v_JTD, rule)
        each, window = q_HTD.shape[0] // J, min(rule.window or T, T)  # each: the queries of a key-value head
        if (hidden := self.masks.get((T, window))) is None:
            seen = torch.ones(T, T, dtype=torch.bool, device=self.device).tril().triu(1 - window)
            hidden = self.masks[T, window] = (~seen).repeat(each, 1)
        scores = (q_HTD * rule.scaling).reshape(J, each * T, -1) @ k_JTD.mT
        sinks = None if rule.sinks is None else rule.sinks.view(J, each, 1).repeat_interleave(T, 1)
        shares = functional.dropout(softmax(scores, hidden, rule.softcap, sinks), rule.dropout)
        return (shares @ v_JTD).view_as(q_HTD)


@functools.cache
def _varlen(device: torch.device) -> Any:
    """Flash attention over rows of documents; None where this torch or device has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
    return (
        varlen_attn if known and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else None
    )
