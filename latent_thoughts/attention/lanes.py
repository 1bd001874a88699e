"""The pass that draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from latent_thoughts.attention.rule import Rule, softmax
from latent_thoughts.attention.spans import Path, length


class Lanes:
    """Draws that grow by one token a pass. A lane holds draws behind one shared path.

    Shared keys are stored once a lane, (G, J, L, D), and read once a pass for all its draws; what
    the draws have of their own is (G, J, R, T, D). Storage is as wide as what it holds, in steps of
    `STEP` (on a GPU in powers of two of them), up to `shared` and `own`: a CPU's batched products copy what is not
    contiguous. The keys of `trunk` (J, P, D), with which the paths of all lanes begin, are stored and read
    once for all.
    """

    STEP = 32

    def __init__(self, lanes: int, draws: int, shared: int, own: int, device: torch.device, trunk: Path = ()):
        self.lanes, self.draws, self.shared, self.own, self.device = lanes, draws, shared, own, device
        self.trunk, self.P = trunk, length(trunk)
        self.before = [torch.cat([getattr(s, x) for s in trunk], 2) for x in ("keys", "values")] if trunk else []
        self.stored: list[torch.Tensor] = []  # shared keys and values, own keys and values
        self.length_G = torch.zeros(lanes, dtype=torch.long)

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

    def move(self, to: Mapping[int, int]) -> None:
        """What lanes hold to other lanes, in this order."""
        for old, new in to.items():
            if old != new:
                self.length_G[new] = self.length_G[old]
                for held in self.stored:
                    held[:, new] = held[:, old]

    def _fit(self, first: int, needed: int, limit: int) -> None:
        """Makes two of the stored tensors (from `first`) wide enough, or less wide."""
        steps = -(-needed // self.STEP)
        if self.device.type == "cuda" and steps:  # for every width a pass is recorded
            steps = 1 << (steps - 1).bit_length()
        width, held = min(limit, steps * self.STEP), self.stored[first].shape[-2]
        if width > held or width < held // 2:
            for n in (first, first + 1):
                old, keep = self.stored[n], min(width, held)
                self.stored[n] = old.new_zeros(*old.shape[:-2], width, old.shape[-1])
                self.stored[n][..., :keep, :] = old[..., :keep, :]

    def place(self, rows: Sequence[tuple[int, int]], at: Sequence[int]) -> list[int]:
        """Which draws (lane, draw) grow in the next pass, and how many tokens they hold; returns positions."""
        rows_N, draw_N = torch.tensor(rows, dtype=torch.long).unbind(1)  # of the N draws that grow
        at_N = torch.tensor(at, dtype=torch.long)
        positions = (self.P + self.length_G[rows_N] + at_N).tolist()
        used = int(rows_N.max()) + 1
        self.fit(max(at) + 1)
        own_GR = torch.full((used, self.draws), -1)
        own_GR[rows_N, draw_N] = at_N
        self._stand(own_GR.to(self.device), self.length_G[:used].to(self.device))
        self.index = tuple(x.to(self.device) for x in (rows_N, draw_N, at_N))
        return positions

    def longest(self, rows: Sequence[tuple[int, int]], at: Sequence[int]) -> int:
        """The last position of draws (lane, draw) that hold `at` tokens before the one that is fed."""
        lengths = self.length_G.tolist()
        return self.P + max(lengths[lane] + n for (lane, _), n in zip(rows, at, strict=True))

    def fit(self, tokens: int) -> None:
        """Makes room for so many tokens of every draw."""
        self._fit(2, tokens, self.own)

    def widths(self) -> tuple[int, int]:
        """Of what is stored, shared and own."""
        return self.stored[0].shape[-2], self.stored[2].shape[-2]

    def storage(self) -> tuple[int, ...]:
        """What a recorded pass depends on: where what is stored lies, and how wide it is."""
        return *self.widths(), *(held.data_ptr() for held in self.stored)

    def everywhere(self, own_GR: torch.Tensor, size_G: torch.Tensor) -> torch.Tensor:
        """The next pass is over every place of the first lanes, of which draws are at `own_GR` (G, R) of what they
        drew, -1 where none grows, and share `size_G` (G,). Waits for nothing on a GPU. Returns positions (N,)."""
        self._stand(own_GR, size_G)
        lanes, draws = own_GR.shape
        lane_GR = torch.arange(lanes, device=self.device)[:, None].expand(lanes, draws)
        draw_GR = torch.arange(draws, device=self.device).expand(lanes, draws)
        self.index = tuple(x.flatten() for x in (lane_GR, draw_GR, own_GR.clamp(min=0)))
        return self.position_GR.clamp(min=0).flatten()

    def _stand(self, own_GR: torch.Tensor, size_G: torch.Tensor) -> None:
        self.L, self.T = self.widths()
        self.own_GR, self.size_G, self.position_GR = own_GR, size_G, self.P + size_G[:, None] + own_GR
        self.hidden: dict[int | None, torch.Tensor] = {}

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
        out = (of_shared.flatten(2, 3) @ values_GJLD[:used]).unflatten(2, (self.draws, -1))
        out += of_own @ values_GJRTD[:used]
        if self.P:
            out += self._of_trunk(of_trunk, self.before[1][layer])
        return out.transpose(1, 2).flatten(2, 3)[g, r].transpose(0, 1)

    @staticmethod
    def _of_trunk(x_GJRIX: torch.Tensor, y_JXY: torch.Tensor) -> torch.Tensor:
        """All draws times what the trunk holds: one product a key-value head."""
        flat = x_GJRIX.transpose(0, 1)
        return (flat.flatten(1, 3) @ y_JXY).unflatten(1, flat.shape[1:4]).transpose(0, 1)
