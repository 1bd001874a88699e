"""Attention over branching sequences: what many sequences share is stored, and read, once.

The model sees one long row of new tokens, without padding; this module, registered with
transformers as an attention implementation, gives each token the keys of its own past. Two kinds
of pass: `Extend` encodes spans of tokens behind paths of spans already encoded (in training:
documents, behind nothing); `Lanes` grows many draws by one token each. Axis suffixes: H heads,
J key-value heads, N new tokens, L tokens of a span, D head width, G lanes, R draws of a lane,
T tokens drawn.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

NAME = "latent_thoughts"
BLOCK = 64  # new tokens that attend at a time, where torch has no good kernel
SQUARE = 512  # documents up to so long are trained with their whole matrix of scores, where torch has no good kernel
LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class Rule:
    """How one layer attends."""

    scaling: float
    window: int | None  # a token sees itself and window - 1 tokens before it
    softcap: float | None
    sinks: torch.Tensor | None  # one more logit a head, which takes part of the attention to nowhere
    dropout: float = 0.0  # in training

    @property
    def plain(self) -> bool:
        """Nothing but scale and window, as fused kernels know it."""
        return self.softcap is None and self.sinks is None and self.dropout == 0


class Pass(Protocol):
    def attend(self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule) -> Any: ...


@torch.compiler.disable
def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    branches: Pass | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (1, heads, tokens, width) in, (1, tokens, heads, width) out."""
    assert branches is not None and query.shape[0] == 1
    rule = Rule(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        _window(module, settings.get("sliding_window")),
        settings.get("softcap"),
        settings.get("s_aux"),
        settings.get("dropout", 0.0),
    )
    out_HND = branches.attend(module.layer_idx, query[0], key[0], value[0], rule)
    return out_HND.transpose(0, 1)[None].contiguous(), None


def _window(module: Any, given: int | None) -> int | None:
    kinds = getattr(module.config, "layer_types", None)
    if kinds is not None and kinds[module.layer_idx] == "sliding_attention":
        return given or module.config.sliding_window
    return given if kinds is None else None


def install(model: Any) -> bool:
    """Makes the model use this module's attention; False where it cannot."""
    from transformers import AttentionInterface

    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or LAYERS)
    if not getattr(model, "_supports_attention_backend", False) or not kinds <= LAYERS:
        return False
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)
    return True


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
        self.paths, self.sizes, self.keep = paths, sizes, keep
        self.starts = [0, *itertools.accumulate(sizes)]
        self.groups = [Group(self, part, device) for part in _alike([length(p) for p in paths], sizes)]
        self.order = torch.cat([group.rows for group in self.groups]).argsort()
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def positions(self) -> list[int]:
        return [length(path) + n for path, size in zip(self.paths, self.sizes, strict=True) for n in range(size)]

    def attend(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        if any(self.keep):
            self.kept.append((k_JND, v_JND))
        out = [group.attend(layer, q_HND, k_JND, v_JND, rule) for group in self.groups]
        return torch.cat(out, 1).index_select(1, self.order)

    def spans(self) -> list[Span | None]:
        """The new tokens' keys and values, of those items that keep theirs."""
        found: list[Span | None] = []
        for n, keep in enumerate(self.keep):
            part = slice(self.starts[n], self.starts[n + 1])
            kept = [torch.stack([kv[m][:, part] for kv in self.kept]) for m in (0, 1)] if keep else None
            found.append(Span(*kept) if kept else None)
        return found


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
        self.past = _padded(paths, self.L) if self.L else None
        self.masks: dict[int | None, torch.Tensor | None] = {}

    def attend(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        # index_select: in training its gradient is much cheaper than that of x[:, index]
        q, k, v = (
            x.index_select(1, self.index).unflatten(1, (-1, self.T)).transpose(0, 1) for x in (q_HND, k_JND, v_JND)
        )
        if self.past is not None:
            k, v = (torch.cat([past[layer], new], 2) for past, new in zip(self.past, (k, v), strict=True))
        mask = self._mask(rule.window)
        # torch's kernel for CPUs is slow in half precision (docs/log.md)
        slow = q.device.type == "cpu" and q.dtype != torch.float32 and not torch.is_grad_enabled()
        if slow or rule.softcap is not None or rule.sinks is not None:
            out = self._by_blocks(q, k, v, mask, rule)
        else:
            out = functional.scaled_dot_product_attention(
                q, k, v, mask, rule.dropout, is_causal=mask is None, scale=rule.scaling, enable_gqa=True
            )
        return out.transpose(0, 1).flatten(1, 2).index_select(1, self.flat)

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
            out.append((shares.flatten(2, 3) @ v[:, :, :seen]).view_as(block))
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


def _padded(paths: Sequence[Path], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of paths, (layers, B, J, L, D) each."""
    first = next(path[0] for path in paths if path)
    padded = []
    for part in ("keys", "values"):
        layers, heads, _, width = getattr(first, part).shape
        made = getattr(first, part).new_zeros(layers, len(paths), heads, longest, width)
        for n, path in enumerate(paths):
            start = 0
            for span in path:
                made[:, n, :, start : start + len(span)] = getattr(span, part)
                start += len(span)
        padded.append(made)
    return padded[0], padded[1]


def softmax(
    scores: torch.Tensor, hidden: torch.Tensor, softcap: float | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attention weights of scores (..., keys), some of them hidden, in their dtype (summed in float32).

    `sinks` (..., 1) take part of the attention to nowhere.
    """
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill_(hidden, -torch.inf)
    if sinks is None:
        return torch.softmax(scores, -1)
    sinks = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]


class Documents:
    """A training pass: documents side by side in a row, each of which attends to itself."""

    def __init__(self, sizes: Sequence[int], device: torch.device):
        self.sizes, self.device = list(sizes), device
        self.ends = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=device)
        self.masks: dict[tuple[int, int], torch.Tensor] = {}
        self.grouped = functools.cache(lambda *sizes: Extend([()] * len(sizes), sizes, [False] * len(sizes), device))

    def attend(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        kind = self.device.type
        if torch.is_autocast_enabled(kind):  # rotated queries and keys come in float32
            q_HND, k_JND, v_JND = (x.to(torch.get_autocast_dtype(kind)) for x in (q_HND, k_JND, v_JND))
        if kind == "cpu" and q_HND.dtype != torch.float32:
            q, k, v = (x.split(self.sizes, 1) for x in (q_HND, k_JND, v_JND))
            return torch.cat([self._alone(layer, *part, rule) for part in zip(q, k, v, strict=True)], 1)
        half = q_HND.dtype in (torch.bfloat16, torch.float16)
        if half and rule.plain and q_HND.shape[2] <= 256 and (varlen := _varlen(self.device)):
            window, longest = (rule.window or 0) - 1, max(self.sizes)  # how far back besides itself; -1: to the start
            q, k, v = (x.transpose(0, 1).contiguous() for x in (q_HND, k_JND, v_JND))
            bounds = self.ends, self.ends, longest, longest
            out = varlen(q, k, v, *bounds, scale=rule.scaling, window_size=(window, 0), enable_gqa=True)
            return out.transpose(0, 1)
        return self.grouped(*self.sizes).attend(layer, q_HND, k_JND, v_JND, rule)

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


class Lanes:
    """Draws that grow by one token a pass. A lane holds draws behind one shared path.

    Shared keys are stored once a lane, (G, J, L, D), and read once a pass for all its draws; what
    the draws have of their own is (G, J, R, T, D). Storage is as wide as what it holds, in steps of
    `STEP`, up to `shared` and `own`: a CPU's batched products copy what is not contiguous. The keys of
    `trunk` (J, P, D), with which the paths of all lanes begin, are stored and read once for all.
    """

    STEP = 32

    def __init__(self, lanes: int, draws: int, shared: int, own: int, device: torch.device, trunk: Path = ()):
        self.lanes, self.draws, self.shared, self.own, self.device = lanes, draws, shared, own, device
        self.trunk, self.P = trunk, length(trunk)
        self.before = [torch.cat([getattr(s, x) for s in trunk], 2) for x in ("keys", "values")] if trunk else []
        self.stored: list[torch.Tensor] = []  # shared keys and values, own keys and values
        self.length_G = torch.zeros(lanes, dtype=torch.long)
        self.rows_N = self.draw_N = self.at_N = torch.zeros(0, dtype=torch.long)  # of the N draws that grow

    def fill(self, lane: int, path: Path) -> None:
        """Puts the path's keys behind the trunk into a lane."""
        path = path[len(self.trunk) :]
        if not self.stored:
            self.stored = [
                x.new_zeros(x.shape[0], self.lanes, x.shape[1], *size, x.shape[3])
                for size in ((0,), (self.draws, 0))
                for x in (path[0].keys, path[0].values)
            ]
        self.length_G[lane] = length(path)
        self._fit(0, int(self.length_G.max()), self.shared)
        start = 0
        for span in path:
            self.stored[0][:, lane, :, start : start + len(span)] = span.keys
            self.stored[1][:, lane, :, start : start + len(span)] = span.values
            start += len(span)

    def _fit(self, first: int, needed: int, limit: int) -> int:
        """Makes two of the stored tensors (from `first`) wide enough, or less wide; returns their width."""
        width = min(limit, -(-needed // self.STEP) * self.STEP)
        held = self.stored[first].shape[-2]
        if width > held or width < held // 2:
            for n in (first, first + 1):
                old, keep = self.stored[n], min(width, held)
                self.stored[n] = old.new_zeros(*old.shape[:-2], width, old.shape[-1])
                self.stored[n][..., :keep, :] = old[..., :keep, :]
        return self.stored[first].shape[-2]

    def place(self, rows: Sequence[tuple[int, int]], at: Sequence[int]) -> list[int]:
        """Which draws (lane, draw) grow in the next pass, and how many tokens they hold; returns positions."""
        self.rows_N, self.draw_N = torch.tensor(rows, dtype=torch.long).unbind(1)
        self.at_N = torch.tensor(at, dtype=torch.long)
        positions = (self.P + self.length_G[self.rows_N] + self.at_N).tolist()
        used = int(self.rows_N.max()) + 1
        self.L, self.T = self.stored[0].shape[-2], self._fit(2, max(at) + 1, self.own)
        own_GR = torch.full((used, self.draws), -1)
        own_GR[self.rows_N, self.draw_N] = self.at_N
        self.position_GR = (self.P + self.length_G[:used, None] + own_GR).to(self.device)
        self.own_GR, self.size_G = own_GR.to(self.device), self.length_G[:used].to(self.device)
        self.index = tuple(x.to(self.device) for x in (self.rows_N, self.draw_N, self.at_N))
        self.hidden: dict[int | None, torch.Tensor] = {}
        return positions

    def _hidden(self, window: int | None) -> torch.Tensor:
        """Which keys a draw does not see, (G, 1, R, 1, P + L + T)."""
        if (mask := self.hidden.get(window)) is None:
            trunk, shared, own = (torch.arange(n, device=self.device) for n in (self.P, self.L, self.T))
            hidden = torch.cat(
                [
                    torch.zeros(len(self.size_G), self.draws, self.P, dtype=torch.bool, device=self.device),
                    (shared >= self.size_G[:, None, None]).expand(-1, self.draws, -1),
                    own > self.own_GR[..., None].clamp(min=0),  # a draw that does not grow sees a token, for no NaN
                ],
                -1,
            )
            if window is not None:
                before = torch.cat([trunk, self.P + shared]).expand(len(self.size_G), -1)
                keys = torch.cat([before, self.P + self.size_G[:, None] + own], 1)
                hidden |= keys[:, None] <= self.position_GR[..., None] - window
            mask = self.hidden[window] = hidden[:, None, :, None]
        return mask

    def attend(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        keys_GJLD, values_GJLD, keys_GJRTD, values_GJRTD = (x[layer] for x in self.stored)
        g, r, t = self.index
        keys_GJRTD[g, :, r, t], values_GJRTD[g, :, r, t] = k_JND.transpose(0, 1), v_JND.transpose(0, 1)
        used, J = len(self.size_G), k_JND.shape[0]
        q_GRHD = q_HND.new_zeros(used, self.draws, q_HND.shape[0], q_HND.shape[2])
        q_GRHD[g, r] = q_HND.transpose(0, 1) * rule.scaling
        q_GJRID = q_GRHD.unflatten(2, (J, -1)).transpose(1, 2).contiguous()  # I: the queries of a key-value head
        shared = (q_GJRID.flatten(2, 3) @ keys_GJLD[:used].mT).unflatten(2, (self.draws, -1))
        own = q_GJRID @ keys_GJRTD[:used].mT
        trunk = [self._of_trunk(q_GJRID, self.before[0][layer].mT)] if self.P else []
        sinks = None if rule.sinks is None else rule.sinks.view(J, 1, -1, 1)
        shares = softmax(torch.cat([*trunk, shared, own], -1), self._hidden(rule.window), rule.softcap, sinks)
        of_trunk, of_shared, of_own = shares.split([self.P, self.L, self.T], -1)
        out = (of_shared.flatten(2, 3) @ values_GJLD[:used]).view_as(q_GJRID) + of_own @ values_GJRTD[:used]
        if self.P:
            out += self._of_trunk(of_trunk, self.before[1][layer])
        return out.transpose(1, 2).flatten(2, 3)[g, r].transpose(0, 1)

    @staticmethod
    def _of_trunk(x_GJRIX: torch.Tensor, y_JXY: torch.Tensor) -> torch.Tensor:
        """All draws times what the trunk holds: one product a key-value head."""
        flat = x_GJRIX.transpose(0, 1)
        return (flat.flatten(1, 3) @ y_JXY).unflatten(1, flat.shape[1:4]).transpose(0, 1)
