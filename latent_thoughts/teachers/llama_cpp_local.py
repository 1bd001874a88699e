"""A teacher in this process, run by llama.cpp: a GGUF file with its own chat template, one reply after the other."""

from __future__ import annotations

from collections.abc import Iterable

from latent_thoughts.bases import path_of
from latent_thoughts.config.synthesize import Teacher as Config
from latent_thoughts.teachers.base import TOO_LONG, Answer, Answers, Failure, Request
from latent_thoughts.teachers.chat import completion_of
from latent_thoughts.types import UserError


class LlamaCppTeacher:
    def __init__(self, config: Config):
        try:
            from llama_cpp import Llama  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(
                "synthesize.teacher.kind: llama_cpp needs an extra: pip install 'latent-thoughts[llama-cpp]'"
            ) from None
        path = path_of(str(config.model))
        try:
            self.llama = Llama(path, n_ctx=config.window, verbose=False)
        except ValueError as error:
            raise UserError(f"cannot load model {config.model}: {' '.join(str(error).split())}") from None

    def ask(self, requests: Iterable[Request]) -> Answers:
        for request in requests:
            yield request.key, self._one(request)

    def _one(self, request: Request) -> Answer:
        body = {name: value for name, value in request.payload.items() if name != "model"}
        body["max_tokens"] = body.pop("max_completion_tokens", request.max_tokens)
        try:
            return completion_of(self.llama.create_chat_completion(**body, seed=request.seed))
        except ValueError as error:
            if "context window" not in str(error):
                raise
            return Failure(TOO_LONG, " ".join(str(error).split()))

    def close(self) -> None:
        self.llama.close()
