"""A model's layers: the list of them, in shards, and with dropout and recomputed activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from latent_thoughts import parallel
from latent_thoughts.stages.train import layers
from latent_thoughts.types import UserError
from tests.conftest import tiny

SIZES = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mbart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "dropout": 0.0,
              "pad_token_id": None},
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
             "is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
                "is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "mixtral": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
                "num_key_value_heads": 2, "num_local_experts": 2},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32},
}  # fmt: skip


def small(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if kind not in SIZES:
        return tiny(kind)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=32, **SIZES[kind]))


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("mamba", "MambaBlock"),
        ("mbart", "MBartDecoderLayer"),
        ("bert", "BertLayer"),
        ("roberta", "RobertaLayer"),
        ("llama", "LlamaDecoderLayer"),
        ("qwen3", "Qwen3DecoderLayer"),
        ("gemma3_text", "Gemma3DecoderLayer"),
        ("gpt2", "GPT2Block"),
        ("mixtral", "MixtralDecoderLayer"),
    ],
)
def test_a_model_is_a_stack_of_its_outermost_layers(kind: str, layer: str) -> None:
    """Of none within another, and of none that holds embeddings."""
    assert [type(block).__name__ for block in layers.blocks(small(kind))] == [layer] * 2


@pytest.mark.parametrize("kind", ["mamba", "mbart", "bert", "gpt2"])
def test_layers_in_shards_give_the_same_loss_and_a_gradient(kind: str, tmp_path: Path) -> None:
    """Where modules overlap, or share a parameter, FSDP ends with an error of its own."""
    plain, sharded = (small(kind).eval() for _ in range(2))
    given = {"input_ids": torch.arange(6)[None], "labels": torch.arange(6)[None]}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
        parallel.shard(sharded, layers.blocks(sharded), mesh, False)
        losses = [model(**given).loss for model in (plain, sharded)]
        losses[1].backward()
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
        embedding = sharded.get_input_embeddings().weight
        assert isinstance(embedding, DTensor) and isinstance(embedding.grad, DTensor)
        assert embedding.grad.full_tensor().any()
    finally:
        dist.destroy_process_group()


def test_dropout_is_in_layers_that_return_a_list_too() -> None:
    """The layers of the first GPT add it to another."""
    model, ids = small("openai-gpt"), torch.arange(6)[None]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    layers.add_dropout(model.train(), 0.5)
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_activations_that_cannot_be_computed_again_are_named() -> None:
    with pytest.raises(UserError, match="train.checkpoint_activations: .* openai-gpt models: leave it out"):
        layers.checkpoint_activations(small("openai-gpt"))
