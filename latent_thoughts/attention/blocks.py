"""The pass of training whose shapes do not depend on the documents, so that one compiled graph serves all batches."""

from __future__ import annotations

import torch
from torch.nn import functional

from latent_thoughts.attention.rule import Rule, softmax


class Blocks:
    """A training pass: a row of documents in blocks of at least the longest document's length, which see themselves and
    the block before. `documents_N` are the documents' numbers, N a multiple of `block`.

    That is twice the products of whole matrices of scores, and no operation whose shape the documents decide.
    """

    def __init__(self, documents_N: torch.Tensor, block: int):
        self.block = block
        own_BT = documents_N.view(-1, block)
        before_BT = torch.cat([torch.full_like(own_BT[:1], -1), own_BT[:-1]])
        self.same_BTK = own_BT[:, :, None] == torch.cat([before_BT, own_BT], 1)[:, None, :]
        # how far a key lies back
        at = torch.arange(block, device=documents_N.device)
        self.back_TK = block + at[:, None] - torch.arange(2 * block, device=documents_N.device)

    def attend(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        H, J = q_HND.shape[0], k_JND.shape[0]
        q_JEBTD = q_HND.unflatten(0, (J, H // J)).unflatten(2, (-1, self.block)) * rule.scaling
        k_JBKD, v_JBKD = (
            torch.cat([x.roll(1, 1), x], 2) for x in (y.unflatten(1, (-1, self.block)) for y in (k_JND, v_JND))
        )
        hidden_BTK = ~self.same_BTK | (self.back_TK < 0)
        if rule.window is not None:
            hidden_BTK = hidden_BTK | (self.back_TK >= rule.window)
        scores = q_JEBTD @ k_JBKD[:, None].mT
        sinks = None if rule.sinks is None else rule.sinks.view(J, -1, 1, 1, 1)
        shares = functional.dropout(softmax(scores, hidden_BTK, rule.softcap, sinks), rule.dropout)
        return (shares @ v_JBKD[:, None]).flatten(2, 3).flatten(0, 1)
