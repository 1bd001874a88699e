"""How much a torch engine has in hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from latent_thoughts.config import Engine
from latent_thoughts.engines.passes import Passes

NAMES = ("sequences", "tokens", "pass_tokens", "logits")


@dataclass(frozen=True, slots=True)
class Limits:
    """`engine`'s settings; what they leave open is as a CPU likes it, or as much as suits a GPU."""

    sequences: int = 256
    tokens: int = 65536
    pass_tokens: int = 4096
    logits: int = 2**26

    @staticmethod
    def of(settings: Engine, passes: Passes) -> Limits:
        """On a GPU contexts and draws may have a quarter of the free memory each; passes take place in the rest."""
        made = Limits()
        if passes.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(passes.device)
            made = Limits(1024, max(made.tokens, free // 4 // passes.position), 16384, 2**28)
        given = {name: value for name in NAMES if (value := getattr(settings, name))}
        return replace(made, **given)

    def halved(self) -> Limits:
        return Limits(*(max(1, getattr(self, name) // 2) for name in NAMES))

    def __str__(self) -> str:
        return ", ".join(f"engine.{name}={getattr(self, name)}" for name in NAMES)
