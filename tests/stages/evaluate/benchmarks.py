"""A tiny model over characters, and tiny GSM8K, MATH and MMLU files for it."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from latent_thoughts.config import Benchmark, Recipe
from latent_thoughts.stages.evaluate import asking, tasks

GSM8K = [
    {
        "question": f"Ann has {n} figs and buys {n + 1}. How many?",
        "answer": f"{n} + {n + 1} = {2 * n + 1}\n#### {2 * n + 1}",
    }
    for n in range(12)
]
MATH = [
    {
        "problem": f"What is ${n} + 1$?",
        "solution": f"We add: $\\boxed{{{n + 1}}}$.",
        "level": "Level 1",
        "type": "Algebra",
    }
    for n in range(4)
]
MMLU = [
    {"question": f"Which is {n}?", "choices": [str((n + m) % 4) for m in range(4)], "answer": 0, "type": "astronomy"}
    for n in range(4)
]


def write(folder: Path, test: list[dict[str, Any]], train: list[dict[str, Any]] | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("test", test), ("train", train)):
        if rows is not None:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def gsm8k(folder: Path) -> str:
    return write(folder, GSM8K[:8], GSM8K[8:])


CHAT = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<bos>assistant: {% endif %}"


def save_model(folder: Path, thinks: bool = True) -> Path:
    """A random Llama over printable characters. Its EOS comes now and then, and so do ends of thoughts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from latent_thoughts.data.tokenizer import add_control_tokens

    characters = ["<unk>", "<bos>", "<eos>", *string.printable]
    core = Tokenizer(models.WordLevel({c: n for n, c in enumerate(characters)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    tokenizer.chat_template = CHAT
    if thinks:
        add_control_tokens(tokenizer)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "norm" not in name:
                parameter.mul_(6)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def as_through_hf(recipe: Recipe, asked: Benchmark, model: Path, out: Path) -> dict[str, str]:
    """Asks a model through our engine and through the harness's `hf` model, which must agree in every figure and to the
    letter; returns the answers by prompt."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    found = asking.ask_task(recipe, asked, model, out).counts["results"][0]
    theirs = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=3)
    ((name, (_, task)),) = tasks.build(asked).items()
    task.set_fewshot_seed(tasks.FEWSHOT_SEED)
    given: Any = {"tasks": {name: task}, "groups": {}, "group_map": {}}
    how = {"apply_chat_template": asked.chat_template, "fewshot_as_multiturn": asked.multiturn}
    expected: Any = evaluator.evaluate(theirs, given, bootstrap_iters=0, **how)
    for metric, value in found["metrics"].items():
        assert value["value"] == expected["results"][name][metric]
    texts = {s["arguments"][0][0]: s["resps"][0][0] for s in expected["samples"][name]}
    assert {r["prompt"]: r["text"] for r in pq.read_table(out / "samples.parquet").to_pylist()} == texts
    return texts
