"""Drawing on GPUs, where a pass over one token a draw takes longer to ask for than to compute: it is recorded once, as
a CUDA graph, and replayed for every token.

A graph's tensors have one place and one shape. So a pass is over every place of the lanes, whether or not a draw grows
there: what comes of a place without one is not looked at, and what it writes belongs to no draw.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from latent_thoughts.attention import Lanes
from latent_thoughts.machine import out_of_memory
from latent_thoughts.types import UserError

Forward = Callable[[torch.Tensor, torch.Tensor, Lanes], torch.Tensor]  # of ids and positions (N,); logits (N, V)
BEFORE = 2  # passes that are not recorded: the first of a kind allocate and choose kernels, the last one is a trial


class Replay:
    """The next token's logits for the first `used` of the lanes, for as long as these keep their storage."""

    def __init__(self, forward: Forward, lanes: Lanes, used: int):
        self.forward, self.lanes, self.kind, self.passed = forward, lanes, (used, *lanes.storage()), 0
        self.own_GR = torch.full((used, lanes.draws), -1, device=lanes.device)
        self.size_G = torch.zeros(used, dtype=torch.long, device=lanes.device)
        self.ids_N = torch.zeros(used * lanes.draws, dtype=torch.long, device=lanes.device)
        self.again: Callable[[], None] | None = None
        self.logits_NV = torch.zeros(0)

    def suits(self, lanes: Lanes, used: int) -> bool:
        return lanes is self.lanes and self.kind == (used, *lanes.storage())

    def grow(self, rows: Sequence[tuple[int, int]], at: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
        """Logits (N, V) of draws at (lane, draw), whose last token `ids` stands at `at` of what they drew."""
        lane_N, draw_N = torch.tensor(rows, dtype=torch.long).unbind(1)
        place_N = lane_N * self.lanes.draws + draw_N
        own_N, ids_N = torch.full(self.ids_N.shape, -1), torch.zeros(self.ids_N.shape, dtype=torch.long)
        own_N[place_N], ids_N[place_N] = torch.tensor(at, dtype=torch.long), torch.tensor(ids, dtype=torch.long)
        self.own_GR.copy_(own_N.view(self.own_GR.shape))
        self.size_G.copy_(self.lanes.length_G[: len(self.size_G)])
        self.ids_N.copy_(ids_N)
        self._pass()
        return self.logits_NV.index_select(0, place_N.to(self.logits_NV.device))

    def _pass(self) -> None:
        if self.again is None and self.passed == BEFORE:
            self.again, self.logits_NV = record(self._work, self.lanes.device)
        if self.again is not None:
            self.again()
            return
        self.passed += 1
        with waiting_refused() if self.passed == BEFORE else contextlib.nullcontext():
            self.logits_NV = self._work()

    def _work(self) -> torch.Tensor:
        return self.forward(self.ids_N, self.lanes.everywhere(self.own_GR, self.size_G), self.lanes)


def lanes_of(lanes: Lanes, rows: Sequence[tuple[int, int]]) -> int:
    """How many a pass for draws at (lane, draw) is over: powers of two, so that there are few kinds."""
    used = max(lane for lane, _ in rows) + 1
    return min(lanes.lanes, 1 << (used - 1).bit_length())


class Waits(RuntimeError):
    """The CPU waits for the GPU within a pass, which can then not be recorded."""


@contextlib.contextmanager
def waiting_refused() -> Iterator[None]:
    """Tells beforehand what a recording would fail by: one that fails leaves torch in disorder."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise Waits(str(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


@functools.cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def record(work: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
    """Work on the GPU that can be done again, and where its result will then be. Raises UserError where it fails."""
    with torch.cuda.device(device):  # a recording is of the current one alone, and says nothing
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=_stream(device)):
                out = work()
        except RuntimeError as error:
            torch.cuda.set_stream(before)
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if out_of_memory(cause):
                raise cause from None
            why = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise UserError(f"a pass of this model cannot be a CUDA graph ({why}): set engine.graphs=false") from error
    return graph.replay, out
