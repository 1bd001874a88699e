"""One question to a trained model: think, then answer."""

from __future__ import annotations

from pathlib import Path

from latent_thoughts import model as models
from latent_thoughts.config import Model
from latent_thoughts.data import format
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.engines.base import SampleRequest
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.types import UserError


def ask(
    folder: Path, question: str, seed: int, temperature: float, max_thought_tokens: int, max_answer_tokens: int
) -> tuple[str, str]:
    """(thought, answer). Raises UserError for a folder without a model, or a model without thought tokens."""
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not a model folder (no config.json)")
    tokenizer, controls = models.load_tokenizer(folder)
    codec, engine = Codec(tokenizer), TorchEngine(models.load(folder, Model()))
    prompt = format.prior_prompt(controls, (controls.bos, *codec.encode(question)))
    request = SampleRequest(prompt, (seed,), max_thought_tokens)
    abort = controls.never_in_thoughts
    thought = engine.sample([request], stop=controls.end, abort=abort, temperature=temperature)[0][0]
    request = SampleRequest((*prompt, *thought.ids, controls.end), (seed + 1,), max_answer_tokens)
    answer = engine.sample([request], stop=controls.eos, abort=abort | {controls.end}, temperature=temperature)[0][0]
    return codec.decode(thought.ids), codec.decode(answer.ids)
