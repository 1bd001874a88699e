"""Requests of lm-evaluation-harness as jobs for the engine: a prompt to go on from, or continuations to score."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from latent_thoughts.data import format
from latent_thoughts.engines.base import How, Ids, Job, SampleRequest, Sampling, ScoreRequest, Scoring
from latent_thoughts.stages.evaluate.tasks import CLOSE, OPEN
from latent_thoughts.types import UserError

if TYPE_CHECKING:
    from latent_thoughts.stages.evaluate.harness import EngineLM


def key_of(task: str, doc_id: int, idx: int, prompt: str) -> str:
    """Names a request in a journal, whose stage key says how it is asked."""
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{task} {doc_id} {idx} {digest[:16]}"


def stems(questions: Sequence[Question | Choices]) -> list[Ids]:
    """The tokens that all prompts of a question's task begin with; the last token of a prompt is its own."""
    groups: dict[str, list[Ids]] = {}
    for q in questions:
        groups.setdefault(q.task, []).append(q.prompt[:-1])
    shared = {task: _begin(prompts) for task, prompts in groups.items() if len(prompts) > 1}
    return [shared.get(q.task, ()) for q in questions]


def _begin(prompts: Sequence[Ids]) -> Ids:
    same = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))
    return tuple(ids[0] for ids in same)


class Question:
    """A prompt to go on from, by so many samples."""

    def __init__(self, lm: EngineLM, key: str, request: Instance, samples: int):
        arguments: Any = request.args
        prompt, given = arguments
        self.lm, self.key, self.task, self.samples = lm, key, str(request.task_name), samples
        kwargs: Any = normalize_gen_kwargs(given, lm.max_gen_toks)
        eos = lm.tokenizer.decode(lm.eot_token_id)
        self.until = handle_stop_sequences(kwargs.get("until"), eos=eos)
        self.max_tokens = kwargs["max_gen_toks"]
        self.temperature, self.top_p = kwargs["temperature"], kwargs.get("top_p", 1.0)
        self.thinks = OPEN in prompt
        room = lm.max_length - self.max_tokens
        if self.thinks:
            self.prompt = self._with_thoughts(prompt)
            room -= lm.budgets[0] + 3
        else:
            self.prompt = tuple(lm.tok_encode(prompt))
        if len(self.prompt) > room:
            raise UserError(
                f"task {self.task}: a prompt of {len(self.prompt)} tokens leaves no room to answer in the model's "
                f"{lm.max_length}: ask with fewer shots, or for fewer tokens"
            )

    def _with_thoughts(self, prompt: str) -> Ids:
        """The examples' thoughts between S P and E, up to where the question's own thought is to begin."""
        codec, controls = self.lm.thinking()
        if not prompt.endswith(OPEN):
            raise UserError(f"task {self.task}: a prompt with thoughts must end where the next one begins")
        first, *examples = prompt.removesuffix(OPEN).split(OPEN)
        ids = [controls.bos, *codec.encode(first)]
        for thought, _, text in (part.partition(CLOSE) for part in examples):
            ids += [controls.start, controls.prior, *codec.encode(thought), controls.end, *codec.encode(text)]
        return tuple(ids)

    def _seeds(self, purpose: str) -> tuple[int, ...]:
        text = f"{self.lm.seed}\n{self.key}\n{purpose}\n"
        digests = [hashlib.blake2b(f"{text}{n}".encode(), digest_size=8) for n in range(self.samples)]
        return tuple(int.from_bytes(digest.digest(), "big") for digest in digests)

    def job(self, stem: Ids) -> Job:
        rest = self.prompt[len(stem) :]
        return Job(rest, self._think(), stem) if self.thinks else Job((), self._answer(rest), stem)

    def _how(self, stop: int, limit: int, abort: frozenset[int], text: bool) -> How:
        halt = Halt(self.lm.tokenizer, self.until) if text else None
        return How(limit, stop, abort, self.temperature, self.top_p, halt)

    def _answer(self, prompt: Ids) -> Generator[Any, Any, list[dict[str, Any]]]:
        how = self._how(self.lm.eot_token_id, self.max_tokens, frozenset(), text=True)
        (found,) = yield Sampling((SampleRequest(prompt, self._seeds("answer")),), how)
        return [{"answers": {"": list(d.ids)}} for d in found.draws]

    def _think(self) -> Generator[Any, Any, list[dict[str, Any]]]:
        """A thought of the largest budget a sample; what it had got to within a smaller one is ended there."""
        controls, budgets = self.lm.thinking()[1], self.lm.budgets
        opening = format.prior_prompt(controls, ())
        thoughts: list[tuple[Ids, bool]] = [((), False)] * self.samples
        if budgets[0]:
            how = self._how(controls.end, budgets[0], controls.never_in_thoughts, text=False)
            (found,) = yield Sampling((SampleRequest(opening, self._seeds("think")),), how)
            thoughts = [(d.ids, d.finished) for d in found.draws]
        how = self._how(controls.eos, self.max_tokens, controls.never_in_thoughts | {controls.end}, text=True)
        seeds, asked = self._seeds("answer"), {}
        for (z, _), seed in zip(thoughts, seeds, strict=True):
            asked |= {(z[:budget], seed): None for budget in budgets}
        requests = [SampleRequest((*opening, *z, controls.end), (seed,)) for z, seed in asked]
        found = yield Sampling(tuple(requests), how)
        answers = {at: list(f.draws[0].ids) for at, f in zip(asked, found, strict=True)}
        return [
            {
                "thought": list(z),
                "finished": finished,
                "answers": {str(budget): answers[z[:budget], seed] for budget in budgets},
            }
            for (z, finished), seed in zip(thoughts, seeds, strict=True)
        ]

    def text(self, sample: dict[str, Any]) -> str:
        """The text of a sample, cut as the harness cuts."""
        ids = sample["answers"][str(self.lm.budget) if self.thinks else ""]
        text = self.lm.tokenizer.decode(ids, skip_special_tokens=True)
        return postprocess_generated_text(text, self.until, None)


class Halt:
    """Whether a draw's text has come to one of the stop strings with its last token."""

    def __init__(self, tokenizer: Any, until: Sequence[str]):
        self.tokenizer, self.until = tokenizer, [text for text in until if text]
        self.looks = 2 + max((len(text.encode()) for text in self.until), default=0)  # a token has a byte at least

    def __call__(self, ids: Sequence[int]) -> bool:
        tail = self.tokenizer.decode(list(ids[-self.looks :]), skip_special_tokens=False)
        return any(text in tail for text in self.until)


@dataclass(frozen=True, slots=True)
class Choices:
    """Continuations to score behind one context."""

    context: Ids
    continuations: tuple[Ids, ...]
    task: str = ""

    @property
    def prompt(self) -> Ids:
        return self.context

    @property
    def key(self) -> str:
        return hashlib.sha256(repr((self.context, self.continuations)).encode()).hexdigest()[:32]

    def job(self, stem: Ids) -> Job:
        return Job((), self._score(self.context[len(stem) :]), stem)

    def _score(self, prefix: Ids) -> Generator[Any, Any, list[tuple[float, bool]]]:
        longest = max(map(len, self.continuations))
        (drawn,) = yield Sampling((SampleRequest(prefix, (0,)),), How(longest, -1, frozenset(), 0.0))
        (scores,) = yield Scoring((ScoreRequest(prefix, self.continuations),))
        greedy = drawn.draws[0].ids
        return [
            (float(values[0].sum()), greedy[: len(ids)] == ids)
            for ids, values in zip(self.continuations, scores, strict=True)
        ]
