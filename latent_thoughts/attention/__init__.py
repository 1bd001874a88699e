"""Attention over branching sequences: what many sequences share is stored, and read, once.

The model sees one long row of new tokens, without padding; what is registered here with transformers as an attention
implementation gives each token the keys of its own past. The kinds of pass: `Extend` (spans.py) encodes
spans of tokens behind paths of spans already encoded; `Lanes` (lanes.py) grows many draws by one token each;
`Documents` (documents.py) is training's, documents side by side that do not see each other, and `Blocks` (blocks.py)
the same where a whole step is compiled. kernels.py has torch's own kernels and what they take.

Axis suffixes: H heads, J key-value heads, N new tokens, M keys of all of them, L tokens of a span, D head width, G
lanes, R draws of a lane, T tokens drawn, or of a document.
"""

from __future__ import annotations

from typing import Any

import torch

from latent_thoughts.attention.blocks import Blocks as Blocks
from latent_thoughts.attention.documents import Documents as Documents
from latent_thoughts.attention.documents import FlashDocuments as FlashDocuments
from latent_thoughts.attention.lanes import Lanes as Lanes
from latent_thoughts.attention.rule import Pass as Pass
from latent_thoughts.attention.rule import Rule as Rule
from latent_thoughts.attention.spans import Extend as Extend
from latent_thoughts.attention.spans import Path as Path
from latent_thoughts.attention.spans import Span as Span
from latent_thoughts.attention.spans import length as length
from latent_thoughts.attention.trial import NotAsked
from latent_thoughts.attention.trial import tried as tried

NAME = "latent_thoughts"
LAYERS = {"full_attention", "sliding_attention"}


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
    if branches is None:
        raise NotAsked
    assert query.shape[0] == 1
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


def install(model: Any, store: bool = False) -> bool:
    """Makes the model use this module's attention; False where it cannot, and nothing is changed. With `store` only
    where keys and values can be kept layer by layer, as `Extend` and `Lanes` do."""
    from transformers import AttentionInterface

    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or LAYERS)
    if not getattr(model, "_supports_attention_backend", False) or not kinds <= LAYERS:
        return False
    AttentionInterface.register(NAME, attend)
    own = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    trial = tried(model)
    if trial and not trial.hides_window(config) and (trial.in_order() or not store):
        return True
    model.set_attn_implementation(own)
    return False
