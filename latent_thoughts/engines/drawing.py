"""Draws on their way: prompts that wait for a lane, and the lanes in which draws grow together."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from latent_thoughts import attention
from latent_thoughts.attention import Lanes, Path
from latent_thoughts.engines.base import Sampling
from latent_thoughts.engines.limits import Limits
from latent_thoughts.engines.passes import Growing, Passes
from latent_thoughts.engines.replay import Replay, Waits, lanes_of
from latent_thoughts.engines.work import Work

InSight = Callable[[Path], Iterable[Work]]  # the jobs that want draws behind a trunk


@dataclass(slots=True)
class Waiting:
    """Draws behind one prompt that wait for a lane. The path begins with its job's stem, `trunk`."""

    path: Path
    trunk: Path
    logits_V: torch.Tensor
    draws: list[Growing]


class Drawing:
    """Gives waiting draws lanes, and grows all that have one by a token at a time."""

    def __init__(self, passes: Passes, limits: Limits):
        self.passes, self.limits = passes, limits
        self.queue: deque[Waiting] = deque()  # prompts whose draws wait for a lane
        self.growing: dict[tuple[int, int], Growing] = {}  # by lane and place in it
        self.lanes: Lanes | None = None
        self.free: list[int] = []
        self.replay: Replay | None = None

    def fill(self, in_sight: InSight) -> None:
        """Draws the first tokens of waiting prompts and gives the draws lanes."""
        starting: list[Waiting] = []
        while self.queue and self._room(self.queue[0], starting, in_sight):
            starting.append(self.queue.popleft())
        if not starting:
            return
        draws = [d for prompt in starting for d in prompt.draws]
        logits_NV = torch.cat([prompt.logits_V.expand(len(prompt.draws), -1) for prompt in starting])
        goes_on = dict(zip(map(id, draws), self.passes.draw(logits_NV, draws), strict=True))
        for prompt in starting:
            if going := [d for d in prompt.draws if goes_on[id(d)]]:
                assert self.lanes is not None
                at = self.free.pop()
                self.lanes.fill(at, prompt.path)
                self.growing.update({(at, r): d for r, d in enumerate(going)})

    def _room(self, prompt: Waiting, starting: Sequence[Waiting], in_sight: InSight) -> bool:
        """Whether the draws may start now, beside others that do. Makes the lanes, anew where they are too narrow."""
        shared = attention.length(prompt.path) - attention.length(prompt.trunk)
        draws, own, lanes = len(prompt.draws), max(1, prompt.draws[0].how.max_tokens), self.lanes
        narrow = lanes is not None and (shared > lanes.shared or own > lanes.own or draws > lanes.draws)
        if lanes is None or narrow or prompt.trunk is not lanes.trunk:
            if self.growing or starting:
                return False
            self._make_lanes(prompt.trunk, shared, draws, own, in_sight)
        busy = len(self.growing) + sum(len(other.draws) for other in starting)
        return len(self.free) > len(starting) and (not busy or busy + draws <= self.limits.sequences)

    def _make_lanes(self, trunk: Path, shared: int, draws: int, own: int, in_sight: InSight) -> None:
        """As wide as the requests in sight behind that trunk need, as many as sequences and positions allow."""
        wanted = 0
        for work in in_sight(trunk):
            assert isinstance(work.request, Sampling)
            shared, own = max(shared, work.prompt()), max(own, work.request.how.max_tokens)
            draws, wanted = max([draws, *work.draws()]), wanted + len(work.draws())
        draws = min(draws, self.limits.sequences)
        enough = -(-self.limits.sequences // draws) + 1
        room = self.limits.tokens - attention.length(trunk)
        count = min(room // (shared + draws * own), enough, max(1, wanted))
        self.replay = self.lanes = None  # what the last ones hold is free before
        self.lanes = Lanes(max(1, count), draws, shared, own, self.passes.device, trunk)
        self.free = list(range(self.lanes.lanes))[::-1]  # the first comes last, and is taken first

    def grow(self) -> None:
        """One token for every draw that has a place."""
        assert self.lanes is not None
        places, draws = list(self.growing), list(self.growing.values())
        logits_NV = self._logits(self.lanes, places, draws)
        for place, goes in zip(places, self.passes.draw(logits_NV, draws), strict=True):
            if not goes:
                del self.growing[place]
        live = sorted({lane for lane, _ in self.growing})
        if not self.queue and 2 * len(live) <= max(lane for lane, _ in places) + 1:
            live = self._close_up(live)
        self.free = sorted(set(range(self.lanes.lanes)).difference(live), reverse=True)
        if not self.growing and not self.queue:
            self.replay = None  # what it holds is for others

    def _logits(self, lanes: Lanes, places: list[tuple[int, int]], draws: list[Growing]) -> torch.Tensor:
        """What comes next of every draw, (N, V): replayed on a GPU, where the model's passes can be."""
        if self.passes.replays:
            try:
                return self._replayed(lanes, places, draws)
            except Waits as error:
                why = (str(error).splitlines() or ["it waits for the GPU"])[0]
                print(f"latent-thoughts: draws without CUDA graphs, which this model rules out: {why}", file=sys.stderr)
                self.passes.replays, self.replay = False, None
        return self.passes.grow(lanes, places, draws)

    def _replayed(self, lanes: Lanes, places: list[tuple[int, int]], draws: list[Growing]) -> torch.Tensor:
        at, used = [len(d.ids) - 1 for d in draws], lanes_of(lanes, places)
        self.passes.check_length(lanes.longest(places, at) + 1)
        lanes.fit(max(at) + 1)
        if self.replay is None or not self.replay.suits(lanes, used):
            self.replay = None  # its memory is free before
            self.replay = Replay(self.passes.whole, lanes, used)
        return self.replay.grow(places, at, [d.ids[-1] for d in draws])

    def _close_up(self, live: Sequence[int]) -> list[int]:
        """Moves lanes whose draws still grow to the front: a pass reads all up to the last. Returns them."""
        assert self.lanes is not None
        to = {lane: n for n, lane in enumerate(live)}
        self.lanes.move(to)
        self.growing = {(to[lane], row): draw for (lane, row), draw in self.growing.items()}
        return list(to.values())
