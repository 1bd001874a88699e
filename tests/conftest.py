"""Shared tiny models and worlds. Nothing here is mocked: the models are real, only small."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from latent_thoughts.data.tokenizer import Controls
from tests.s3 import Store, served

settings.register_profile("untimed", deadline=None)  # tests never assert on time
settings.load_profile("untimed")
VOCABULARY = 23
CONTROLS = Controls(start=19, end=20, prior=21, posterior=22, bos=17, eos=18)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    from latent_thoughts.model import set_up_torch

    set_up_torch(1)


def tiny(kind: str, vocabulary: int = VOCABULARY) -> Any:
    """A random causal LM of a family, with weights large enough that its distributions are not flat."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, dict[str, Any]] = {
        "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "num_key_value_heads": 2},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
        "qwen3": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "head_dim": 8},
        "gemma3_text": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
        "gemma2": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 2.0},
        "deepseek_v3": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                        "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
                        "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        "gpt_oss": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "num_local_experts": 2,
                    "num_experts_per_tok": 1},
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, bos_token_id=17, eos_token_id=18, **sizes[kind])
    # eager: the plain path of transformers, which knows soft caps and attention sinks too
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "norm" not in name:
                parameter.mul_(6)
    return model


SMALL = {
    "threads": 1,
    "data": {
        "source": "world:castle",
        "shard_documents": 12,
        "world": {"documents": 40, "teacher_documents": 20, "held_out_share": 0.02},
    },
    "chunking": {"mode": "pieces", "thoughts": "last"},
    "model": {
        "tokenizer": "world",
        "base": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
    },
    "engine": {"sequences": 64},
    "sample": {"preset": "default", "k": 4, "max_thought_tokens": 10, "max_tokens": 64},
    "train": {
        "steps": 30,
        "loss_on": "targets",
        "sequence_length": 64,
        "rows": 4,
        "optimizer": "muon",
        "lr": 0.01,
        "dropout": 0.1,
        "checkpoint_steps": 10,
        "log_steps": 5,
    },
    "evaluate": {"documents": 12, "answer": "ends in (\\w+)", "answer_tokens": 8},
    "em": {"iterations": 2, "baselines": ["raw_tokens"]},
}


@pytest.fixture
def small() -> dict[str, Any]:
    """A recipe that runs end to end in seconds."""
    return copy.deepcopy(SMALL)


@pytest.fixture(scope="session")
def _served() -> Iterator[Store]:
    with served() as store:
        yield store


@pytest.fixture
def s3(_served: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An S3 server on loopback, and an environment and a cache in which it is the only one."""
    for name, value in _served.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LATENT_THOUGHTS_CACHE", str(tmp_path / "cache"))
    return _served


@pytest.fixture
def bucket(s3: Store) -> Path:
    """An empty folder of a new bucket."""
    return s3.bucket() / "here"
