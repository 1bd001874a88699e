"""What a model's layers ask of attention, as one pass over two tokens shows it: not all families do what most do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from latent_thoughts.attention.rule import Rule


class NotAsked(Exception):
    """The model does not hand on what is given to its attention."""


@dataclass(frozen=True)
class Trial:
    """A pass that notes layers and what they ask for, and attends to nothing."""

    layers: list[tuple[int, int, int, int, Rule]] = field(default_factory=list)

    def attend(
        self, layer: int, q_HND: torch.Tensor, k_JND: torch.Tensor, v_JND: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        self.layers.append((layer, k_JND.shape[0], k_JND.shape[2], v_JND.shape[2], rule))
        return q_HND.new_zeros(*q_HND.shape[:2], v_JND.shape[2])

    def in_order(self) -> bool:
        """Every layer attends once, one after the other, with keys and values of one shape: they can be kept so."""
        numbers, *shapes = zip(*[layer[:4] for layer in self.layers], strict=True)
        return list(numbers) == list(range(len(numbers))) and all(len(set(widths)) == 1 for widths in shapes)

    def numbers(self) -> int:
        """Of a position, in the keys and values of all layers."""
        return sum(heads * (width + of_values) for _, heads, width, of_values, _ in self.layers)

    def hides_window(self, config: Any) -> bool:
        """The configuration has a sliding window that no layer asks for: the model builds it into its mask, or not at
        all, which cannot be told."""
        window = getattr(config, "sliding_window", None)
        told = getattr(config, "layer_types", None) or getattr(config, "use_sliding_window", True) is False
        if not window or told or any(layer[4].window for layer in self.layers):
            return False
        return window < (getattr(config, "max_position_embeddings", None) or torch.inf)


@torch.no_grad()
def tried(model: Any) -> Trial | None:
    """None where the model's attention is never asked, or not told what it is to see."""
    trial, training = Trial(), model.training
    ids = torch.arange(2, device=model.get_output_embeddings().weight.device)[None]
    model.eval()
    try:
        model(input_ids=ids, position_ids=ids, use_cache=False, branches=trial)
    except NotAsked:
        return None
    finally:
        model.train(training)
    return trial if trial.layers else None
