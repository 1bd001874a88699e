"""The pass of training whose shapes do not depend on the documents, so that one compiled graph serves all batches."""

from __future__ import annotations

import torch
from torch.nn import functional

from latent_thoughts.attention.rule import Rule, softmax


class Blocks:
    """A training pass: a row of documents in blocks of at least the longest document's length, which see themselves and
    the block before. `hidden_BTK` (blocks, queries, keys) is what `hidden` gives.

    That is twice the products of whole matrices of scores, and no operation whose shape the documents decide.
    """

    def __init__(self, hidden_BTK: torch.Tensor):
        self.hidden_BTK, self.block = hidden_BTK, hidden_BTK.shape[1]

    @staticmethod
    def hidden(documents_N: torch.Tensor, block: int) -> torch.Tensor:
        """-inf for keys that a query does not see, those of other documents and those that follow it, else 0.
        `documents_N` are the documents' numbers, N a multiple of `block`. (A graph would compare anew in every layer,
        and adding is faster there than filling.)"""
        own_BT = documents_N.view(-1, block)
        before_BT = torch.cat([torch.full_like(own_BT[:1], -1), own_BT[:-1]])
        same_BTK = own_BT[:, :, None] == torch.cat([before_BT, own_BT], 1)[:, None, :]
        seen_BTK = same_BTK & (_back(block, documents_N.device) >= 0)
        return torch.zeros(seen_BTK.shape, device=documents_N.device).masked_fill_(~seen_BTK, -torch.inf)

    def attend(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        H, J = q_HND.shape[0], k_JND.shape[0]
        q_JEBTD = q_HND.unflatten(0, (J, H // J)).unflatten(2, (-1, self.block)) * rule.scaling
        k_JBKD, v_JBKD = (
            torch.cat([x.roll(1, 1), x], 2) for x in (y.unflatten(1, (-1, self.block)) for y in (k_JND, v_JND))
        )
        hidden_BTK = self.hidden_BTK
        if rule.window is not None:
            hidden_BTK = hidden_BTK.masked_fill(_back(self.block, q_HND.device) >= rule.window, -torch.inf)
        scores = q_JEBTD @ k_JBKD[:, None].mT
        sinks = None if rule.sinks is None else rule.sinks.view(J, -1, 1, 1, 1)
        shares = functional.dropout(softmax(scores, hidden_BTK.to(scores.dtype), rule.softcap, sinks), rule.dropout)
        return (shares @ v_JBKD[:, None]).flatten(2, 3).flatten(0, 1)


def _back(block: int, device: torch.device) -> torch.Tensor:
    """How far keys lie back from queries (T, K)."""
    return block + torch.arange(block, device=device)[:, None] - torch.arange(2 * block, device=device)
