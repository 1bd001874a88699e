"""Spans of encoded tokens, and the pass that encodes more of them behind paths."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from latent_thoughts.attention.kernels import ends, fused, over_rows, rows_fit
from latent_thoughts.attention.rule import Rule, softmax

BLOCK = 64  # new tokens that attend at a time, where torch has no good kernel
PADDED, PADDED_ON_GPU = 2**24, 2**30  # bytes of keys (and of values again) that a group of items holds padded


@dataclass(frozen=True, slots=True)
class Span:
    """Encoded tokens: keys and values of all layers, (layers, J, L, D)."""

    keys: torch.Tensor
    values: torch.Tensor

    def __len__(self) -> int:
        return self.keys.shape[2]

    def head(self, length: int) -> Span:
        return Span(self.keys[:, :, :length], self.values[:, :, :length])


Path = tuple[Span, ...]


def length(path: Path) -> int:
    return sum(map(len, path))


class Extend:
    """A pass that encodes spans behind their paths. Spans do not see each other."""

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int], keep: Sequence[bool], device: torch.device):
        self.paths, self.sizes, self.keep, self.device = paths, sizes, keep, device
        self.starts = [0, *itertools.accumulate(sizes)]
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    @functools.cached_property
    def rows(self) -> Rows:
        return Rows(self)

    @functools.cached_property
    def grouped(self) -> Grouped:
        return Grouped(self)

    def positions(self) -> list[int]:
        return [length(path) + n for path, size in zip(self.paths, self.sizes, strict=True) for n in range(size)]

    def attend(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        if any(self.keep):
            self.kept.append((k_JND, v_JND))
        way = self.rows if rows_fit(q_HND, v_JND, rule) else self.grouped
        return way.attend(layer, q_HND, k_JND, v_JND, rule)

    def spans(self) -> list[Span | None]:
        """The new tokens' keys and values, of those items that keep theirs."""
        found: list[Span | None] = []
        for n, keep in enumerate(self.keep):
            part = slice(self.starts[n], self.starts[n + 1])
            kept = [torch.stack([kv[m][:, part] for kv in self.kept]) for m in (0, 1)] if keep else None
            found.append(Span(*kept) if kept else None)
        return found


class Rows:
    """A pass for flash attention: the items' keys one behind the other, those of its path before each item's own."""

    def __init__(self, extend: Extend):
        self.spans = list({id(span): span for path in extend.paths for span in path}.values())  # what is shared, once
        sizes = [len(span) for span in self.spans]
        first = dict(zip(map(id, self.spans), itertools.accumulate(sizes, initial=0), strict=False))
        parts = []
        for path, start, size in zip(extend.paths, extend.starts, extend.sizes, strict=False):
            parts += [np.arange(first[id(span)], first[id(span)] + len(span)) for span in path]
            parts.append(np.arange(start, start + size) + sum(sizes))
        self.keys = torch.from_numpy(np.concatenate(parts)).to(extend.device) if self.spans else None
        whole = [length(path) + size for path, size in zip(extend.paths, extend.sizes, strict=True)]
        self.ends = ends(extend.sizes, extend.device), ends(whole, extend.device)
        self.longest = max(extend.sizes), max(whole)

    def attend(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        q_NHD = q_HND.transpose(0, 1).contiguous()
        k_MJD, v_MJD = self._row(layer, "keys", k_JND), self._row(layer, "values", v_JND)
        return over_rows(q_NHD, k_MJD, v_MJD, self.ends, self.longest, rule)

    def _row(self, layer: int, part: str, new_JND: torch.Tensor) -> torch.Tensor:
        if self.keys is None:
            return new_JND.transpose(0, 1).contiguous()
        held = [getattr(span, part)[layer] for span in self.spans]
        return torch.cat([*held, new_JND], 1).transpose(0, 1).index_select(0, self.keys)


class Grouped:
    """A pass in rectangles: items of like size together."""

    def __init__(self, extend: Extend):
        alike = _alike([length(path) for path in extend.paths], extend.sizes)
        self.groups = [Group(extend, part, extend.device) for part in alike]
        self.order = torch.cat([group.rows for group in self.groups]).argsort()

    def attend(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        out = [group.attend(layer, q_HND, k_JND, v_JND, rule) for group in self.groups]
        return torch.cat(out, 1).index_select(1, self.order)


def _alike(before: Sequence[int], new: Sequence[int]) -> list[list[int]]:
    """Items of like size in groups, in whose padded rectangles at most a third is padding."""
    groups: list[list[int]] = []
    past = longest = area = 0
    for n in sorted(range(len(new)), key=lambda n: (before[n] + new[n], new[n])):
        wider = max(past, before[n]) + max(longest, new[n])
        if groups and wider * (len(groups[-1]) + 1) <= 1.5 * (area + before[n] + new[n]):
            groups[-1].append(n)
        else:
            groups.append([n])
            past = longest = area = 0
        past, longest, area = max(past, before[n]), max(longest, new[n]), area + before[n] + new[n]
    return [sorted(group) for group in groups]


class Group:
    """Items B of a pass that attend together: past keys padded to L, new tokens padded to T."""

    def __init__(self, extend: Extend, items: Sequence[int], device: torch.device):
        paths, sizes = [extend.paths[n] for n in items], [extend.sizes[n] for n in items]
        self.past_B = torch.tensor([length(path) for path in paths], device=device)
        self.L, self.T = max(length(path) for path in paths), max(sizes)
        starts = torch.tensor([extend.starts[n] for n in items])
        within = torch.arange(self.T) < torch.tensor(sizes)[:, None]
        index = torch.where(within, starts[:, None] + torch.arange(self.T), starts[:, None])
        self.rows = index[within].to(device)  # the new tokens in this group's order
        self.index, self.flat = index.flatten().to(device), within.flatten().nonzero()[:, 0].to(device)
        self.paths, self.past, self.layers = paths, None, range(0)  # whose past is at hand
        self.masks: dict[int | None, torch.Tensor | None] = {}

    def attend(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        # index_select: in training its gradient is much cheaper than that of x[:, index]
        q, k, v = (
            x.index_select(1, self.index).unflatten(1, (-1, self.T)).transpose(0, 1) for x in (q_HND, k_JND, v_JND)
        )
        if self.L:
            k, v = (torch.cat([past, new], 2) for past, new in zip(self._past(layer), (k, v), strict=True))
        mask = self._mask(rule.window)
        # torch's kernel for CPUs is slow in half precision (docs/log.md)
        slow = q.device.type == "cpu" and q.dtype != torch.float32 and not torch.is_grad_enabled()
        out = self._by_blocks(q, k, v, mask, rule) if slow or not rule.fused else fused(q, k, v, mask, rule)
        return out.transpose(0, 1).flatten(1, 2).index_select(1, self.flat)

    def _past(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the paths, (B, J, L, D) each. They are padded for some layers at a time: all of them at
        once would be a pass's largest part, and a peak of memory whenever many items come together."""
        if layer not in self.layers:
            whole = next(path[0] for path in self.paths if path).keys
            layers, heads, _, width = whole.shape
            size = len(self.paths) * heads * self.L * width * whole.element_size()
            most = PADDED if whole.device.type == "cpu" else PADDED_ON_GPU  # where many small copies cost more
            self.layers = range(layer, min(layers, layer + max(1, most // size)))
            self.past = _padded(self.paths, self.L, slice(layer, self.layers.stop))
        assert self.past is not None
        return self.past[0][layer - self.layers.start], self.past[1][layer - self.layers.start]

    def _by_blocks(self, q: Any, k: Any, v: Any, mask: torch.Tensor | None, rule: Rule) -> torch.Tensor:
        """Attention in plain products, a block of new tokens at a time, to the keys that the block may see."""
        if mask is None:
            mask = torch.ones(self.T, self.T, dtype=torch.bool, device=q.device).tril()[None, None]
        hidden, groups = ~mask[:, :, None], (k.shape[1], -1)
        sinks = None if rule.sinks is None else rule.sinks.view(*groups, 1, 1)
        q_BJITD = (q * rule.scaling).unflatten(1, groups)  # I: the queries of a key-value head
        out = []
        for start in range(0, self.T, BLOCK):
            stop = min(start + BLOCK, self.T)
            seen = self.L + stop
            block = q_BJITD[..., start:stop, :]
            scores = (block.flatten(2, 3) @ k[:, :, :seen].mT).unflatten(2, block.shape[2:4])
            shares = softmax(scores, hidden[..., start:stop, :seen], rule.softcap, sinks)
            shares = functional.dropout(shares, rule.dropout)
            out.append((shares.flatten(2, 3) @ v[:, :, :seen]).unflatten(2, block.shape[2:4]))
        return torch.cat(out, 3).flatten(1, 2)

    def _mask(self, window: int | None) -> torch.Tensor | None:
        """Which keys each new token sees, (B, 1, T, L + T); None where that is plainly causal.

        Padding comes last, so that without a past no token sees it.
        """
        if window is not None and window >= self.L + self.T:
            window = None
        if window not in self.masks:
            self.masks[window] = None if window is None and not self.L else self._made(window)
        return self.masks[window]

    def _made(self, window: int | None) -> torch.Tensor:
        device = self.past_B.device
        past, new = torch.arange(self.L, device=device), torch.arange(self.T, device=device)
        past_B1 = self.past_B[:, None]
        keys = torch.cat([past.expand(len(past_B1), -1), past_B1 + new], 1)[:, None]  # positions
        there = torch.cat([past < past_B1, torch.ones_like(past_B1, dtype=torch.bool).expand(-1, self.T)], 1)[:, None]
        at = (past_B1 + new)[..., None]
        seen = there & (keys <= at)
        if window is not None:
            seen &= keys > at - window
        return seen[:, None]


def _padded(paths: Sequence[Path], longest: int, of: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of paths in some layers, (layers, B, J, L, D) each."""
    first = next(path[0] for path in paths if path)
    padded = []
    for part in ("keys", "values"):
        layers, heads, _, width = getattr(first, part)[of].shape
        made = getattr(first, part).new_zeros(layers, len(paths), heads, longest, width)
        for n, path in enumerate(paths):
            start = 0
            for span in path:
                made[:, n, :, start : start + len(span)] = getattr(span, part)[of]
                start += len(span)
        padded.append(made)
    return padded[0], padded[1]
