"""A small prepared run whose thoughts a teacher on loopback writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from latent_thoughts.config import resolve
from latent_thoughts.em import Run

TINY = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}


def byte_tokenizer(folder: Path) -> Path:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(["<eos>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
    return folder


def sentence(n: int, m: int) -> str:
    return f"Sentence {m} of document {n} says that {n} times {m} is {n * m}. "


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A recipe for 20 documents of three sentences, a chunk each."""
    rows = [{"text": "".join(sentence(n, m) for m in range(3))} for n in range(20)]
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data": {"source": str(source), "held_out": 0, "warm_start": 1, "shard_documents": 8},
        "chunking": {"mode": "fixed", "mean": 1},
        "model": {"base": TINY, "tokenizer": str(byte_tokenizer(tmp_path / "tokenizer"))},
        "synthesize": {
            "method": "latent_thoughts",
            "teacher": {"model": "m", "concurrency": 8, "retries": 2, "timeout": 5, "key_env": "TEST_KEY"},
        },
    }


Make = Callable[..., Run]


@pytest.fixture
def make(values: dict[str, Any], tmp_path: Path) -> Make:
    """A prepared run that asks the endpoint `url`, with overrides."""

    def made(url: str, *overrides: str, folder: str = "run", **more: Any) -> Run:
        recipe = resolve(values, [f"synthesize.teacher.base_url={url}", *overrides])
        run = Run(recipe, tmp_path / folder, **more)
        run.prepare()
        return run

    return made
