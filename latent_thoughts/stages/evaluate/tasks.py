"""GSM8K, MATH and MMLU-STEM in three forms, as tasks of lm-evaluation-harness.

Prompts, examples, stop strings, filters and metrics are the harness's own (its tasks gsm8k, minerva_math and
mmlu_flan_cot_fewshot); a form changes only what stands between question and answer of the examples:

    cot     Question: ... Answer: reasoning answer     (the harness's task as it is)
    direct  Question: ... Answer: answer
    latent  Question: ... Answer: S P reasoning E answer

In the latent form S P and E stand as the characters OPEN and CLOSE, which harness.py turns into control tokens; the
text itself never becomes one. The few-shot examples are the same for every question, unless `fewshot: random` asks
for the harness's default.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from latent_thoughts.config import Benchmark, Data
from latent_thoughts.data import readers
from latent_thoughts.places import place, version
from latent_thoughts.types import UserError

OPEN, CLOSE = "\ue000", "\ue001"  # private-use characters: no text has a meaning for them
FEWSHOT_SEED = 1234  # the harness's own
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Parts:
    """A solved row: what is asked, and the reasoning and answer that follow it."""

    question: str
    reasoning: str
    answer: str


@dataclass(frozen=True, slots=True)
class Subject:
    """One harness task of a benchmark: its name, the harness's own configuration, its rows and where they end."""

    name: str
    config: Row
    parts: Callable[[Row], Parts]  # of few-shot examples and training rows
    hub: tuple[str, str]  # data set and configuration
    fields: tuple[str, ...]
    metric: tuple[str, str]  # the headline's metric and filter
    kind: str | None = None  # rows of a shared file whose `type` is this
    answer_stops: tuple[str, ...] = ()  # where an answer behind a thought ends, besides where the harness stops
    direct: Row = field(default_factory=dict)  # what else the direct form changes

    def headline(self, form: str) -> tuple[str, str]:
        """The metric and the filter whose figure is called accuracy."""
        return ("acc", "none") if form == "direct" and self.direct else self.metric


def need(module: str) -> Any:
    """A module of the extra `eval`. Raises UserError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(module)
    except (ImportError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"tasks need an extra ({reason}): pip install 'latent-thoughts[eval]'") from None


@cache
def _harness(folder: str) -> dict[str, Row]:
    """The harness's configurations in one of its task folders, by name."""
    root = Path(need("lm_eval").__file__).parent / "tasks" / folder
    manager = need("lm_eval.tasks").TaskManager(include_path=[str(root)], include_defaults=False)
    return {name: entry.cfg for name, entry in manager.task_index.items() if entry.cfg and "task" in entry.cfg}


# GSM8K


def _gsm8k_parts(row: Row) -> Parts:
    reasoning, mark, final = row["answer"].rpartition("\n#### ")
    if not mark:
        raise UserError(f"a GSM8K answer has no line with #### before its result: {row['answer'][:60]!r}")
    return Parts(f"Question: {row['question']}\nAnswer:", f" {reasoning}", f"#### {final}")


def _gsm8k() -> list[Subject]:
    config = _harness("gsm8k")["gsm8k"]
    fields, metric = ("question", "answer"), ("exact_match", "strict-match")
    return [Subject("gsm8k", config, _gsm8k_parts, ("openai/gsm8k", "main"), fields, metric, answer_stops=("\n\n",))]


# MATH

MATH_SUBJECTS = {  # the harness's names and the rows' own
    "algebra": "Algebra",
    "counting_and_prob": "Counting & Probability",
    "geometry": "Geometry",
    "intermediate_algebra": "Intermediate Algebra",
    "num_theory": "Number Theory",
    "prealgebra": "Prealgebra",
    "precalc": "Precalculus",
}
_FINAL = "\nFinal Answer:"


def _math_parts(row: Row) -> Parts:
    """The harness's examples end with a line `Final Answer: ...`; a solution of the data set gets one."""
    question, solution = f"Problem:\n{row['problem']}\n\nSolution:", row["solution"]
    reasoning, mark, answer = solution.partition(_FINAL)
    if mark:
        return Parts(question, f" {reasoning}", f"Final Answer:{answer}")
    utils = need("lm_eval.tasks.minerva_math.utils")
    if (boxed := utils.last_boxed_only_string(solution)) is None:
        raise UserError(f"a MATH solution has no \\boxed answer: {solution[:60]!r}")
    final = utils.remove_boxed(boxed)
    return Parts(question, f" {solution}", f"Final Answer: The final answer is ${final}$. I hope it is correct.")


def _math() -> list[Subject]:
    utils, found = need("lm_eval.tasks.minerva_math.utils"), []
    for name, kind in MATH_SUBJECTS.items():
        config = dict(_harness("minerva_math")[f"minerva_math_{name}"])
        functions = {"doc_to_text": utils.doc_to_text, "process_results": utils.process_results}
        config |= functions | {"process_docs": utils.process_docs}
        config["fewshot_config"] = {"sampler": "first_n", "samples": utils.list_fewshot_samples()}
        hub, fields = ("EleutherAI/hendrycks_math", config["dataset_name"]), ("problem", "solution")
        metric = ("math_verify", "none")
        found.append(Subject(f"math_{name}", config, _math_parts, hub, fields, metric, kind, ("\n\n",)))
    return found


# MMLU-STEM

_REASONED = re.compile(
    r"(Let's think step by step\.) (.*?)\s*(The (?:correct )?answer is (\([A-E]\))\.?)\s*", re.DOTALL
)
_LETTERS = ("(A)", "(B)", "(C)", "(D)")


def _mmlu_parts(row: Row) -> Parts:
    match = _REASONED.fullmatch(row["target"])
    assert match is not None  # of the harness's own examples
    return Parts(f"Q: {row['question'].strip()}\nA:", f" {match[1]} {match[2]}", match[3])


def _mmlu_question(row: Row) -> str:
    if "choices" not in row:
        return f"Q: {row['question'].strip()}\nA:"
    choices = " ".join(f"{letter} {text}" for letter, text in zip(_LETTERS, row["choices"], strict=True))
    return f"Q: {row['question'].strip()}\n{choices}\nA:"


def _mmlu_direct_target(row: Row) -> int | str:
    """A question's choice by number, an example's by letter."""
    if "choices" in row:
        return int(row["answer"])
    match = _REASONED.fullmatch(row["target"])
    assert match is not None
    return match[4]


def _mmlu() -> list[Subject]:
    prefix, found = "mmlu_flan_cot_fewshot_", []
    for name, config in _harness("mmlu/flan_cot_fewshot").items():
        if "stem" not in str(config.get("tag")) or "samples" not in config.get("fewshot_config", {}):
            continue
        kind = name.removeprefix(prefix)
        direct = {
            "output_type": "multiple_choice",
            "doc_to_choice": list(_LETTERS),
            "doc_to_target": _mmlu_direct_target,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "filter_list": None,
            "generation_kwargs": None,
        }
        fields, metric = ("question", "choices", "answer"), ("exact_match", "get-answer")
        hub = ("cais/mmlu", kind)
        found.append(Subject(f"mmlu_{kind}", config, _mmlu_parts, hub, fields, metric, kind, ("\n\n", "Q:"), direct))
    return found


SUBJECTS: dict[str, Callable[[], list[Subject]]] = {"gsm8k": _gsm8k, "math": _math, "mmlu_stem": _mmlu}
PRIVATE = re.compile(f"[{OPEN}{CLOSE}]")


# Rows


def rows(benchmark: Benchmark, subject: Subject, split: str) -> list[Row]:
    """A split's rows. Raises UserError for a data set that is missing or empty, or a row without a field."""
    if benchmark.data is None:
        name, subset = subject.hub
        source = Data(source=f"hub:{name}:{subset}", split=split)
        where = f"{name} ({split})"
    else:
        path = place(benchmark.data)
        path = path / f"{split}.jsonl" if path.is_dir() else path
        if split != "test" and path.name != f"{split}.jsonl":
            path = path.with_name(f"{split}.jsonl")
        source, where = Data(source=str(path)), str(path)
        if not path.exists():
            more = "; set shots: 0 to do without examples" if split != "test" else ""
            raise UserError(f"task {benchmark.name}: {path} does not exist{more}")
    found = list(readers.rows(source))
    if not found:
        raise UserError(f"task {benchmark.name}: {where} holds no rows")
    for number, row in enumerate(found, 1):
        if missing := [name for name in subject.fields if row.get(name) is None]:
            raise UserError(f"task {benchmark.name}: row {number} of {where} has no field {missing[0]}")
        if PRIVATE.search(json.dumps(row, ensure_ascii=False, default=str)):
            raise UserError(f"task {benchmark.name}: row {number} of {where} holds U+E000 or U+E001, which are taken")
    if benchmark.data is not None and subject.kind is not None:
        found = [row for row in found if row.get("type") == subject.kind]
    return found


def files_key(benchmark: Benchmark) -> list[str]:
    """Hashes of local files, for a stage's key; a hub's data set goes by its name."""
    if benchmark.data is None:
        return []
    path = place(benchmark.data)
    found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
    return [f"{file.name} {version(file)}" for file in found]


def build(benchmark: Benchmark) -> dict[str, tuple[Subject, Any]]:
    """The harness's task objects of a benchmark in its form, by name: one for every subject that has rows."""
    made = {}
    for subject in SUBJECTS[benchmark.name]():
        test = rows(benchmark, subject, "test")
        if test:
            made[subject.name] = (subject, _task(benchmark, subject, test[: benchmark.limit]))
    if not made:
        raise UserError(f"task {benchmark.name}: {benchmark.data} holds rows of no known type")
    return made


def _task(benchmark: Benchmark, subject: Subject, test: list[Row]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    made = config(benchmark, subject)
    splits = {"test": datasets.Dataset.from_list(test)}
    if "fewshot_split" in made:
        if made["num_fewshot"]:
            splits[made["fewshot_split"]] = datasets.Dataset.from_list(rows(benchmark, subject, "train"))
        else:
            del made["fewshot_split"]
    return need("lm_eval.api.task").ConfigurableTask(config=made | {"custom_dataset": lambda **_: splits})


def config(benchmark: Benchmark, subject: Subject) -> Row:
    """The harness's configuration of a task in a form."""
    made = {
        k: v for k, v in subject.config.items() if k not in ("dataset_path", "dataset_name", "tag", "training_split")
    }
    made |= {"task": subject.name, "test_split": "test", "validation_split": None, "metadata": None}
    if benchmark.shots is not None:
        made["num_fewshot"] = benchmark.shots
    if benchmark.fewshot == "first":
        made["fewshot_config"] = {**(made.get("fewshot_config") or {}), "sampler": "first_n"}
    generation = {**made["generation_kwargs"], "max_gen_toks": benchmark.max_tokens}
    if benchmark.temperature:
        generation |= {"do_sample": True, "temperature": benchmark.temperature, "top_p": benchmark.top_p}
    if benchmark.form == "latent":
        generation["until"] = [*generation["until"], *subject.answer_stops]
    made |= {"generation_kwargs": generation}
    if benchmark.form == "cot":
        return made
    return made | _form(benchmark, subject)


def _form(benchmark: Benchmark, subject: Subject) -> Row:
    """What the direct and the latent form change: the prompt's end, and what the examples say."""
    latent, parts = benchmark.form == "latent", subject.parts

    def question(row: Row) -> str:
        text = _mmlu_question(row) if subject.parts is _mmlu_parts else parts(row).question
        return text + OPEN if latent else text

    def target(row: Row) -> str:
        solved = parts(row)
        return f"{solved.reasoning}{CLOSE} {solved.answer}" if latent else solved.answer

    def gold(row: Row) -> Any:
        given = subject.config["doc_to_target"]
        return row["target"] if "target" in row else need("lm_eval.utils").apply_template(given, row)

    made: Row = {"doc_to_text": question, "doc_to_target": gold}
    examples = {"doc_to_text": question, "doc_to_target": target, "target_delimiter": "" if latent else " "}
    if not latent and subject.direct:
        made |= subject.direct
        examples["doc_to_target"] = subject.direct["doc_to_target"]
        examples.pop("target_delimiter")
    given = subject.config.get("fewshot_config") or {}
    sampler = {"sampler": "first_n"} if benchmark.fewshot == "first" else {}
    return made | {"fewshot_config": {**given, **sampler, **examples}}


def solved(benchmark: Benchmark, limit: int | None) -> Sequence[Parts]:
    """The training split's rows with their reasoning, for fine-tuning, its subjects in turn: the first so many are of
    all of them."""
    subjects = SUBJECTS[benchmark.name]()
    found = [[subject.parts(row) for row in rows(benchmark, subject, "train")] for subject in subjects]
    return [parts for turn in itertools.zip_longest(*found) for parts in turn if parts is not None][:limit]
