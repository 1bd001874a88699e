"""The training loss: next-token loss of documents that do not see each other.

Axis suffixes: N positions that carry loss, D hidden width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from latent_thoughts import attention
from latent_thoughts.attention import Documents, FlashDocuments
from latent_thoughts.attention.documents import ROUND
from latent_thoughts.config import Train
from latent_thoughts.data import format
from latent_thoughts.data.packing import positions
from latent_thoughts.stages.train import layers
from latent_thoughts.stages.train.losses import EVEN, Behind, losses_by_blocks, soften
from latent_thoughts.stages.train.whole import Whole
from latent_thoughts.types import PackedRow


def logits_held(config: Train, device: torch.device) -> int:
    """How many at a time (positions x vocabulary), by default: of fewer, a GPU's products would wait for memory."""
    return config.logits or (2**27 if device.type == "cuda" else 2**24)


def _settings(config: Any) -> Iterable[tuple[float, float | None]]:
    """Scales and caps that a configuration names: Cohere multiplies, Granite divides, Gemma caps."""
    named = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "output_multiplier")]
    scales = [scale for value in named if value for scale in (value, 1 / value)]
    return itertools.product((1.0, *scales), (None, getattr(config, "final_logit_softcapping", None)))


class Objective(nn.Module):
    """A causal LM with its loss. `logits` is how many may be held at a time (positions x vocabulary).

    `whole` is the model's compiled training pass, where there is one.
    """

    def __init__(self, model: Any, logits: int, whole: Whole | None = None):
        super().__init__()
        self.model, self.logits, self.whole = model, logits, whole
        self.branching = attention.install(model)  # the model lets its attention be replaced by ours
        self.block = max(1, logits // self.head.weight.shape[0])
        self.block -= self.block % EVEN if self.block > EVEN else 0
        self.behind, self.soften = self._behind_head(), soften

    @property
    def head(self) -> Any:
        return self.model.get_output_embeddings()

    def compile_blocks(self, device: torch.device) -> None:
        """`train.compile: blocks`: the model's layers, and on a GPU what is done to logits."""
        layers.compile_blocks(self.model)
        if device.type == "cuda":
            self.soften = torch.compile(soften, dynamic=True)

    @torch.no_grad()
    def _behind_head(self) -> Behind | None:
        """What the model makes of its head's logits; None where that cannot be told.

        By what its configuration names, tried on logits that are multiplied so far that a cap shows. (By one factor:
        each stretched to one size would not tell a model that scales what it gives the head, as MiniCPM3 does.)
        """
        model, device, training = self.model, self.head.weight.device, self.model.training
        if model.base_model is model:
            return None
        ids = np.arange(4) % self.head.weight.shape[0]
        packed = PackedRow(ids, ids, np.zeros(4, int), ids)
        model.eval()
        try:
            hidden = self._hidden(model.base_model, packed).last_hidden_state.flatten(0, 1)[:4]
            logits = self.head(hidden.to(device))
            factor = 40 / logits.abs().max()
            with self.head.register_forward_hook(lambda _, __, out: factor * out):
                own = self._hidden(model, packed).logits.flatten(0, 1)[:4]
        finally:
            model.train(training)
        logits *= factor
        tried = (Behind(*settings) for settings in _settings(model.config.get_text_config()))
        return next((each for each in tried if torch.allclose(each.of(logits.clone()), own, 1e-5, 1e-5)), None)

    def forward(self, packed: PackedRow) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum of the losses, differentiable; the losses (N,); their `format.Part` (N,)), in nats."""
        if not len(packed.ids):  # of a last batch, of which other processes have a part
            nothing = np.zeros(1, np.int64)
            packed = PackedRow(nothing, nothing + format.IGNORE, nothing, nothing)
        if self.whole and self.training:
            return self._by_library(self.whole, packed)
        labels = torch.from_numpy(packed.labels)
        carries = (labels != format.IGNORE).nonzero()[:, 0]
        targets, parts = labels[carries].to(self.head.weight.device), torch.from_numpy(packed.parts)[carries]
        wanted, place = carries - 1, torch.from_numpy(positions(packed))
        documents = torch.from_numpy(packed.document_ids)
        if self.behind is not None:
            hidden = self._hidden(self.model.base_model, packed).last_hidden_state
            hidden_ND = self._at(hidden, documents, place, wanted)
            head = self.head.weight, self.head.bias
            total, losses = losses_by_blocks(hidden_ND, *head, targets, self.block, self.behind, self.soften)
        else:
            logits_NV = self._at(self._hidden(self.model, packed).logits, documents, place, wanted)
            losses = torch.nn.functional.cross_entropy(logits_NV.float(), targets, reduction="none")
            total = losses.sum()
        return total, losses.detach(), parts

    def _by_library(self, whole: Whole, packed: PackedRow) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total, losses = whole(packed)
        carries = (packed.labels != format.IGNORE).nonzero()[0]
        return total, losses[torch.from_numpy(carries - 1)], torch.from_numpy(packed.parts)[carries]

    def _at(self, values: torch.Tensor, documents: torch.Tensor, place: torch.Tensor, wanted: torch.Tensor) -> Any:
        if self.branching:
            return values[0].index_select(0, wanted.to(values.device))
        return values[documents[wanted].to(values.device), place[wanted].to(values.device)]

    def _hidden(self, module: Any, packed: PackedRow) -> Any:
        """What a module of the model returns for a row, in which no document sees another.

        Where attention can be replaced, the row goes in as it is. Else a document takes a row of its own,
        with padding behind it, which nothing before it sees, whatever the layers are.
        """
        device, place = self.head.weight.device, positions(packed)
        sizes = np.diff(np.flatnonzero(place == 0), append=len(place)).tolist()
        ids = torch.from_numpy(packed.ids).to(device)
        if not self.branching:
            padded = nn.utils.rnn.pad_sequence(list(ids.split(sizes)), batch_first=True)
            return module(input_ids=padded, use_cache=False)
        place = torch.from_numpy(place).to(device)
        if torch.is_autocast_enabled(device.type):
            # The last document grows: oneDNN compiles kernels for every length of a row, and a GPU's matrix units
            # take no sums of an odd number of tokens, as those of weights' gradients would be
            more = -len(ids) % ROUND
            sizes[-1] += more
            ids, place = (nn.functional.pad(x, (0, more)) for x in (ids, place))
        branches = (FlashDocuments if device.type == "cuda" else Documents)(sizes, device)
        return module(input_ids=ids[None], position_ids=place[None], use_cache=False, branches=branches)
