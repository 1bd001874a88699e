"""A model's layers: which there are, and what training adds to them."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import nn

from latent_thoughts.types import UserError

ADDING = ("self_attn", "attn", "attention", "mlp", "feed_forward")  # blocks that add to the residual stream


def blocks(model: Any) -> list[Any]:
    """The layers that a model is a stack of.

    Of the modules that transformers would not split those count that lie in no other (MBart names a layer's attention
    too), without those that hold embeddings (BERT's), which the head may share.
    """
    kinds = set(model._no_split_modules or ())
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    embeddings = {parameter for layer in ends if layer is not None for parameter in layer.parameters()}
    found, within = list[Any](), set[Any]()
    for module in model.modules():  # a module comes before those in it
        if type(module).__name__ in kinds and module not in within and embeddings.isdisjoint(module.parameters()):
            found.append(module)
            within.update(module.modules())
    return found


def compiler() -> str | None:
    """The C++ compiler that torch.compile would take on a CPU."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), None)


def compile_blocks(model: Any) -> None:
    """torch.compile for every block: one graph for all, whatever the length of a row. On a CPU without attention."""
    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # else a graph for every layer's number
    for block in blocks(model):
        block.compile(dynamic=True)


def checkpoint_activations(model: Any) -> None:
    """What a layer computes is computed again for its gradient, not kept. Raises UserError where it cannot be."""
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"train.checkpoint_activations: transformers cannot do that for {model.config.model_type} models: leave it "
            "out, and lower train.micro_rows to save memory"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})


def add_dropout(model: Any, share: float) -> None:
    """Dropout on the embeddings and on what every attention and MLP block adds to the residual stream.

    Hugging Face's Llama-like models have dropout on attention weights alone.
    """
    named = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in ADDING}
    # GPT-Neo's attention is one within another
    adding = [module for name, module in named.items() if name.rpartition(".")[0] not in named]
    if not adding:
        raise UserError("train.dropout: this model has no blocks named " + ", ".join(ADDING))

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):  # the first of GPT's list, which its layers add to another
            return type(output)((nn.functional.dropout(output[0], share, module.training), *output[1:]))
        return nn.functional.dropout(output, share, module.training)

    for module in [model.get_input_embeddings(), *adding]:
        module.register_forward_hook(hook)
