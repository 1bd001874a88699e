"""How a layer attends, what a pass is, and the softmax that passes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Rule:
    """How one layer attends."""

    scaling: float
    window: int | None  # a token sees itself and window - 1 tokens before it
    softcap: float | None
    sinks: torch.Tensor | None  # one more logit a head, which takes part of the attention to nowhere
    dropout: float = 0.0  # in training

    @property
    def fused(self) -> bool:
        """Nothing but scale, window and dropout, as torch's kernel knows them."""
        return self.softcap is None and self.sinks is None

    @property
    def plain(self) -> bool:
        """Nothing but scale and window, as flash attention over rows knows them."""
        return self.fused and self.dropout == 0


class Pass(Protocol):
    def attend(self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule) -> Any: ...


def softmax(
    scores: torch.Tensor, hidden: torch.Tensor, softcap: float | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attention weights of scores (..., keys), some of them hidden, in their dtype (summed in float32).

    `hidden` says which, or is added: -inf where they are.
    `sinks` (..., 1) take part of the attention to nowhere.
    """
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill_(hidden, -torch.inf) if hidden.dtype == torch.bool else scores + hidden
    if sinks is None:
        return torch.softmax(scores, -1)
    sinks = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
