"""A teacher in this process: any chat model that our torch engine runs, a hub name, a folder or a GGUF file."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from itertools import islice
from typing import Any

from latent_thoughts import model as models
from latent_thoughts.config import Engine, Model
from latent_thoughts.config.synthesize import Teacher as Config
from latent_thoughts.engines.base import How, Job, SampleRequest, Sampling
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.teachers.base import Answers, Completion, Payload, Request, too_long
from latent_thoughts.types import Draw, UserError

WAVE = 8  # requests in hand for every sequence that is decoded at a time


class TransformersTeacher:
    """Draws from the whole distribution at the recipe's temperature; a reply depends on its request alone."""

    def __init__(self, config: Config, max_tokens: int):
        if config.parameters:
            raise UserError("synthesize.teacher.parameters are for endpoints, vllm and llama_cpp: take them away")
        model, self.tokenizer = models.load_plain(Model(base=str(config.model), dtype=config.dtype))
        self.engine, self.in_hand = TorchEngine(model, Engine(sequences=config.concurrency)), WAVE * config.concurrency
        self.window = min(config.window, getattr(model.config, "max_position_embeddings", config.window))
        ends = getattr(model.generation_config, "eos_token_id", None) or []
        self.ends = {self.tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends)} - {None}
        if not self.ends:
            raise UserError(f"{config.model} has no end-of-sequence token: it cannot end a reply")

    def ask(self, requests: Iterable[Request]) -> Answers:
        source = iter(requests)
        while wave := list(islice(source, self.in_hand)):
            fitting: list[tuple[Request, tuple[int, ...]]] = []
            for request in wave:
                ids = prompt_ids(self.tokenizer, request.payload)
                if failure := too_long(len(ids), request.max_tokens, self.window):
                    yield request.key, failure
                else:
                    fitting.append((request, ids))
            jobs = [Job((), self._program(request, ids)) for request, ids in fitting]
            for n, draw in self.engine.run(jobs):
                yield fitting[n][0].key, self._completion(draw, len(fitting[n][1]))

    def _program(self, request: Request, ids: tuple[int, ...]) -> Generator[Sampling, Any, Draw]:
        stop, *others = sorted(self.ends)
        how = How(request.max_tokens, stop, frozenset(others), request.payload["temperature"])
        (sampled,) = yield Sampling((SampleRequest(ids, (request.seed,)),), how)
        return sampled.draws[0]

    def _completion(self, draw: Draw, prompt_tokens: int) -> Completion:
        text = self.tokenizer.decode(list(draw.ids), skip_special_tokens=True)
        finish = "length" if draw.finish == "length" else "stop"
        return Completion(text, finish, prompt_tokens, len(draw.ids) + (finish == "stop"))

    def close(self) -> None:
        del self.engine


def prompt_ids(tokenizer: Any, payload: Payload) -> tuple[int, ...]:
    """A chat as the model's own template has it; where it has none, the messages with empty lines between them."""
    messages = payload["messages"]
    if not tokenizer.chat_template:
        return tuple(tokenizer("\n\n".join(m["content"] for m in messages) + "\n\n")["input_ids"])
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
