"""One question to a trained model: think, then answer."""

from __future__ import annotations

import math
from pathlib import Path

from latent_thoughts import model as models
from latent_thoughts.config import Model
from latent_thoughts.data.tokenizer import Codec, Controls
from latent_thoughts.engines.base import in_order
from latent_thoughts.engines.joint import Answering
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.types import UserError


def model_folder(folder: Path) -> Path:
    """The model of a train stage, or the folder itself. Raises UserError where there is none."""
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not a model folder (no config.json)")
    return folder


def ask(
    folder: Path, question: str, seed: int, temperature: float, max_thought_tokens: int, max_answer_tokens: int
) -> tuple[str, str]:
    """(thought, answer). Raises UserError for a folder without a model, or a model without thought tokens."""
    folder = model_folder(folder)
    tokenizer, controls = models.load_tokenizer(folder)
    codec, engine = Codec(tokenizer), TorchEngine(models.load(folder, Model()))
    return answer(engine, codec, controls, question, seed, temperature, max_thought_tokens, max_answer_tokens)


def answer(
    engine: TorchEngine,
    codec: Codec,
    controls: Controls,
    question: str,
    seed: int,
    temperature: float,
    max_thought_tokens: int,
    max_answer_tokens: int,
) -> tuple[str, str]:
    """(thought, answer) of a model that is loaded. Raises UserError for limits and temperatures below what can be, and
    where they and the question are longer than the model's table of positions."""
    if not 0 <= temperature < math.inf or min(max_thought_tokens, max_answer_tokens) < 1 or seed < 0:
        raise UserError("temperature and seed are 0 or more, and the limits of thought and answer 1 token or more")
    context = (controls.bos, *codec.encode(question))
    longest = len(context) + max_thought_tokens + max_answer_tokens + 3  # S P, and E behind the thought
    models.check_positions(engine.passes.model, longest, "the question with the limits of thought and answer")
    job = Answering(controls, True, max_thought_tokens, max_answer_tokens, temperature).job(context, (seed, seed + 1))
    (thought, answer), *_ = in_order(engine, [job])
    return codec.decode(thought.ids), codec.decode(answer)
