"""How a model is evaluated: held-out text, tasks, fine-tuning."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from latent_thoughts.config.base import Distinct, Pattern, Positive, Section, Seed, Share, parse
from latent_thoughts.config.train import Train

Temperature = Annotated[float, Field(ge=0)]


def _has_group(pattern: str) -> str:
    if not re.compile(pattern).groups:
        raise ValueError("it needs a group around what is the answer, as in 'ends in (\\w+)'")
    return pattern


Answer = Annotated[Pattern, AfterValidator(_has_group)]


class Benchmark(Section):
    """One task in one form, asked through lm-evaluation-harness."""

    name: Literal["gsm8k", "math", "mmlu_stem"]
    form: Literal["direct", "cot", "latent"] = "latent"
    data: str | None = None  # a folder with test.jsonl (and train.jsonl), or one file; default: the hub's data set
    shots: Annotated[int, Field(ge=0)] | None = None  # few-shot examples; default: the harness's own number
    fewshot: Literal["first", "random"] = "first"  # the same for every question, or drawn anew for each
    limit: Positive | None = None  # the first so many questions (of every subject)
    samples: Positive = 1  # answers to every question
    temperature: Temperature = 0.0  # 0 is greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    pass_at: list[Positive] = []  # k of the reported pass@k
    budgets: list[Annotated[int, Field(ge=0)]] = []  # thought tokens; default: sample.max_thought_tokens alone
    max_tokens: Positive = 256  # of the answer (cot: with its reasoning)
    chat_template: bool = False  # put the prompt through the model's own, for instruction models
    multiturn: bool = True  # with a chat template: every example a turn of its own, not all in one message
    bos: bool | None = None  # whether plain prompts begin with BOS; default: as the tokenizer does
    seed: Seed | None = None  # of the samples; default: the run's

    @model_validator(mode="after")
    def _samples_differ(self) -> Benchmark:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples at temperature 0 are all the same: set a temperature")
        if any(k > self.samples for k in self.pass_at):
            raise ValueError("pass_at needs at least as many samples")
        if self.budgets and self.form != "latent":
            raise ValueError("budgets are of thoughts: they need form: latent")
        if self.chat_template and self.form == "latent":
            raise ValueError("thoughts stand in plain text as in training: chat_template needs form: direct or cot")
        return self


class FineTune(Section):
    """Fine-tuning on a task's training split in the thought form before it is asked (method, section 7).

    `train` overrides the M-step's settings; what it does not name is the paper's.
    """

    task: Literal["gsm8k", "math"] = "gsm8k"
    data: str | None = None
    form: Literal["direct", "cot", "latent"] = "latent"
    limit: Positive | None = None  # training rows, evenly of the subjects
    seeds: Positive = 5
    train: dict[str, Any] = {}
    ask: dict[str, Any] = {}  # overrides of how the task is asked afterwards

    @property
    def asked(self) -> Benchmark:
        """How the task is asked after fine-tuning."""
        values = {"name": self.task, "form": self.form, "data": self.data, **TUNED}
        return parse(Benchmark, {**values, **self.ask}, "evaluate.fine_tune.ask")

    @model_validator(mode="after")
    def _overrides_are_valid(self) -> FineTune:
        _ = self.asked, parse(Train, self.train, "evaluate.fine_tune.train")  # a mistake shows before anything runs
        return self


# How a fine-tuned model is asked, unless `ask` says otherwise: as trained, without examples, sampled as in the paper.
TUNED = {"shots": 0, "bos": True, "samples": 4, "temperature": 0.6, "top_p": 0.9}
ALIKE = {"name", "form", "data", "limit", "pass_at", "budgets"}  # told elsewhere, or no question is answered otherwise


def how(asked: Mapping[str, Any]) -> str:
    """How a task was asked, of its results: its form, and every setting that is not as usual. What differs in it was
    asked differently, and is neither averaged nor put on one line."""
    tuned, told = asked.get("fine_tuned"), {"chat_template": "chat", "multiturn": "one message"}
    usual = {name: field.default for name, field in Benchmark.model_fields.items() if name not in ALIKE}
    usual |= TUNED if tuned else {}
    others = {n: asked[n] for n, value in usual.items() if asked.get(n, value) != value}
    words = [told.get(name, f"{name.replace('_', ' ')} {value}") for name, value in others.items()]
    return ", ".join([asked["form"], *words, *(["fine-tuned"] if tuned else [])])


class Evaluate(Section):
    """Likelihood and answers on held-out documents (method, section 7)."""

    documents: Positive = 500
    bound: Annotated[list[Positive], Field(min_length=1), Distinct] = [1, 4]  # K of the reported bounds
    bound_posterior_share: Share = 0.5
    bound_temperature: Annotated[float, Field(gt=0)] = 1.0  # greedy draws have no density
    answer: Answer | None = None  # regular expression whose first group is the answer, in the last chunk
    answer_tokens: Positive = 64
    temperature: Temperature = 0.0  # of thinking and answering; 0 is greedy
    thoughts_kept: Positive = 50  # samples kept for the report
    tasks: list[Benchmark] = []
    fine_tune: FineTune | None = None

    @model_validator(mode="after")
    def _tasks_have_folders_of_their_own(self) -> Evaluate:
        asked = [task.model_dump(exclude={"data", "limit"}) for task in self.tasks]
        if twice := next((task for n, task in zip(asked, self.tasks, strict=True) if asked.count(n) > 1), None):
            raise ValueError(
                f"tasks: {twice.name}, form {twice.form}, stands there twice with nothing but data or limit different: "
                "their results would lie in one folder"
            )
        return self
