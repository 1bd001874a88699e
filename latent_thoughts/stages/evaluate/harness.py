"""Our engine as a model of lm-evaluation-harness (registered as `latent-thoughts`).

Plain prompts are tokenised as the harness's `hf` model does, and what is generated is cut as it does, so that
figures are the same to the digit. A prompt whose text opens a thought (tasks.OPEN) is answered by thinking first.
What the prompts of one task have in common, its few-shot examples, is encoded once for all questions.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)

from latent_thoughts import model as models
from latent_thoughts.config import Engine as Limits
from latent_thoughts.config import Model
from latent_thoughts.data import format
from latent_thoughts.data.tokenizer import Codec, Controls, controls_of
from latent_thoughts.engines.base import (
    Engine,
    How,
    Ids,
    Job,
    SampleRequest,
    Sampling,
    ScoreRequest,
    Scoring,
)
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.stages.evaluate.tasks import CLOSE, OPEN
from latent_thoughts.store import Journal
from latent_thoughts.types import UserError

Answered = Callable[[int], None]  # told how many questions were answered


@register_model("latent-thoughts")
class EngineLM(TemplateLM):
    """A model behind the engine of the E-step.

    With a journal, what it holds is not asked again and what is answered is added. To every question `samples`
    answers are drawn, each at all `budgets` of thought, and that of `sample` and `budget` is given: further ones
    are there when the same question comes again.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | None = None,
        engine: Engine | None = None,
        tokenizer: Any = None,
        config: Any = None,
        dtype: str = "float32",
        bos: bool | None = None,
        seed: int = 0,
        samples: int = 1,
        budgets: Sequence[int] = (256,),
        journal: Journal | None = None,
        answered: Answered = lambda _: None,
        **_: Any,
    ):
        super().__init__()
        if engine is None:
            assert pretrained is not None
            model = models.load(Path(pretrained), Model(dtype=dtype))  # pyright: ignore[reportArgumentType]
            engine, config = TorchEngine(model, Limits()), model.config
            tokenizer = models.plain_tokenizer(Path(pretrained))
        self.engine, self.tokenizer, self.config = engine, tokenizer, config
        self.bos, self.seed, self.journal, self.answered = bos, seed, journal, answered
        self.budgets, self.budget = tuple(sorted(set(budgets), reverse=True)), max(budgets)
        self.samples, self.sample = samples, 0
        self.codec: Codec | None = None
        self.known: dict[str, Any] = dict(journal.known) if journal else {}
        self.asked = 0  # questions that the engine was asked

    # What lm-evaluation-harness wants to know of a model

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        return resolve_max_length(self.config, self.tokenizer)

    @property
    def max_gen_toks(self) -> int:
        return 256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As HFLM encodes: with the tokenizer's own BOS, if it has one and the text does not begin with it."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        chosen = self.bos if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, **({} if chosen is None else {"add_special_tokens": chosen}))

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """One text a request. Where the harness repeats a request, each is another sample."""
        numbered: dict[str, list[int]] = {}  # which requests are the samples of one question
        for n, request in enumerate(requests):
            key = _key(str(request.task_name), request.doc_id or 0, request.idx, request.args[0])
            numbered.setdefault(key, []).append(n)
        questions = [_Question(self, key, requests[at[0]], max(self.samples, len(at))) for key, at in numbered.items()]
        self._run(questions)
        texts = [""] * len(requests)
        for question, at in zip(questions, numbered.values(), strict=True):
            for n, number in zip(at, range(len(at)) if len(at) > 1 else [self.sample], strict=True):
                texts[n] = question.text(self.known[question.key][number])
        return texts

    def of(self, task: str, doc_id: int, prompt: str) -> dict[str, Any]:
        """What is kept of the sample that was given for a prompt."""
        return self.known[_key(task, doc_id, 0, prompt)][self.sample]

    def _run(self, questions: Sequence[_Question | _Choices]) -> None:
        """Asks the engine what is not known yet."""
        self.answered(sum(q.key in self.known for q in questions))
        missing = [q for q in questions if q.key not in self.known]
        jobs = [q.job(stem) for q, stem in zip(missing, _stems(missing), strict=True)]
        for n, result in self.engine.run(jobs):
            self.known[missing[n].key] = result
            self.asked += 1
            if self.journal:
                self.journal.add(missing[n].key, result)
            self.answered(1)

    def thinking(self) -> tuple[Codec, Controls]:
        """Raises UserError for a model without thought tokens."""
        controls = controls_of(self.tokenizer)
        self.codec = self.codec or Codec(self.tokenizer)
        return self.codec, controls

    # Likelihood

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """Of each continuation: its log-probability, and whether it is what greedy decoding gives.

        What does not fit the model's length is cut off a context's left, as HFLM cuts.
        """
        room = self.max_length + 1
        requests = [(text, context[-max(1, room - len(given)) :], given) for text, context, given in requests]
        grouped: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for _, context, continuation in requests:
            grouped.setdefault(tuple(context), []).append(tuple(continuation))
        choices = [_Choices(context, tuple(dict.fromkeys(given))) for context, given in grouped.items()]
        self._run(choices)
        table = {
            (c.context, ids): values
            for c in choices
            for ids, values in zip(c.continuations, self.known[c.key], strict=True)
        }
        return [(float(v[0]), bool(v[1])) for _, c, x in requests for v in [table[tuple(c), tuple(x)]]]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the model's length, each token once."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [("", *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return totals


def _key(task: str, doc_id: int, idx: int, prompt: str) -> str:
    """Names a request in a journal, whose stage key says how it is asked."""
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{task} {doc_id} {idx} {digest[:16]}"


def _stems(questions: Sequence[_Question | _Choices]) -> list[Ids]:
    """The tokens that all prompts of a question's task begin with; the last token of a prompt is its own."""
    groups: dict[str, list[Ids]] = {}
    for q in questions:
        groups.setdefault(q.task, []).append(q.prompt[:-1])
    shared = {task: _begin(prompts) for task, prompts in groups.items() if len(prompts) > 1}
    return [shared.get(q.task, ()) for q in questions]


def _begin(prompts: Sequence[Ids]) -> Ids:
    same = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))
    return tuple(ids[0] for ids in same)


class _Question:
    """A prompt to go on from, by so many samples."""

    def __init__(self, lm: EngineLM, key: str, request: Instance, samples: int):
        prompt, given = request.args
        self.lm, self.key, self.task, self.samples = lm, key, str(request.task_name), samples
        kwargs = normalize_gen_kwargs(given, lm.max_gen_toks)
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
class _Choices:
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
