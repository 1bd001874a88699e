"""Our engine as a model of lm-evaluation-harness (registered as `latent-thoughts`).

Plain prompts are tokenised as the harness's `hf` model does, and what is generated is cut as it does, so that
figures are the same to the digit. A prompt whose text opens a thought (tasks.OPEN) is answered by thinking first.
What the prompts of one task have in common, its few-shot examples, is encoded once for all questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, resolve_max_length

from latent_thoughts import model as models
from latent_thoughts.config import Engine as Limits
from latent_thoughts.config import Model
from latent_thoughts.data.tokenizer import Codec, Controls, controls_of
from latent_thoughts.engines.base import Engine
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.journal import Journal
from latent_thoughts.places import place
from latent_thoughts.stages.evaluate.questions import Choices, Question, key_of, stems

Answered = Callable[[int], None]  # told how many questions were answered


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
            model = models.load(place(pretrained), Model(dtype=dtype))  # pyright: ignore[reportArgumentType]
            engine, config = TorchEngine(model, Limits()), model.config
            tokenizer = models.plain_tokenizer(place(pretrained))
        self.engine, self.tokenizer, self.config = engine, tokenizer, config
        self.bos, self.seed, self.journal, self.answered = bos, seed, journal, answered
        self.budgets, self.budget = tuple(sorted(set(budgets), reverse=True)), max(budgets)
        self.samples, self.sample = samples, 0
        self.codec: Codec | None = None
        self.scored: list[str] = []  # the tasks of the requests in hand
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
        """As HFLM encodes: with the tokenizer's own BOS, if it has one and the text does not begin with it.

        Where a BOS is asked for, it is there as in training, also of tokenizers that would add none.
        """
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        chosen = self.bos if add_special_tokens is None else add_special_tokens
        ids = self.tokenizer.encode(string, **({} if chosen is None else {"add_special_tokens": chosen}))
        lacking = add_special_tokens is None and self.bos and ids[:1] != [self.prefix_token_id]
        return [self.prefix_token_id, *ids] if lacking else ids

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As HFLM: a template that knows no system role goes without."""
        from jinja2 import TemplateError

        how = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        how["continue_final_message"] = not add_generation_prompt
        try:
            return self.tokenizer.apply_chat_template(chat_history, **how)
        except TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(others, **how)

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """One text a request. Where the harness repeats a request, each is another sample."""
        numbered: dict[str, list[int]] = {}  # which requests are the samples of one question
        for n, request in enumerate(requests):
            key = key_of(str(request.task_name), request.doc_id or 0, request.idx, request.args[0])
            numbered.setdefault(key, []).append(n)
        questions = [Question(self, key, requests[at[0]], max(self.samples, len(at))) for key, at in numbered.items()]
        self._run(questions)
        texts = [""] * len(requests)
        for question, at in zip(questions, numbered.values(), strict=True):
            for n, number in zip(at, range(len(at)) if len(at) > 1 else [self.sample], strict=True):
                texts[n] = question.text(self.known[question.key][number])
        return texts

    def of(self, task: str, doc_id: int, prompt: str) -> dict[str, Any]:
        """What is kept of the sample that was given for a prompt."""
        return self.known[key_of(task, doc_id, 0, prompt)][self.sample]

    def _run(self, questions: Sequence[Question | Choices]) -> None:
        """Asks the engine what is not known yet."""
        self.answered(sum(q.key in self.known for q in questions))
        missing = [q for q in questions if q.key not in self.known]
        jobs = [q.job(stem) for q, stem in zip(missing, stems(missing), strict=True)]
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

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.scored = [str(request.task_name) for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self.scored = []

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """Of each continuation: its log-probability, and whether it is what greedy decoding gives.

        What does not fit the model's length is cut off a context's left, as HFLM cuts.
        """
        room = self.max_length + 1
        requests = [(text, context[-max(1, room - len(given)) :], given) for text, context, given in requests]
        grouped: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for _, context, continuation in requests:
            grouped.setdefault(tuple(context), []).append(tuple(continuation))
        of_task = dict(zip((tuple(context) for _, context, _ in requests), self.scored, strict=False))
        choices = [Choices(c, tuple(dict.fromkeys(given)), of_task.get(c, "")) for c, given in grouped.items()]
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


register_model("latent-thoughts")(EngineLM)
