"""One task in one form, asked of one model through lm-evaluation-harness, and what came of it.

    FOLDER/results.json      figures with their errors (docs/formats.md)
    FOLDER/results.md        the same as a table
    FOLDER/budget.svg        accuracy against thought tokens, where several budgets were asked for
    FOLDER/samples.parquet   every prompt, thought, answer and grade

Every answered question is kept at once: what was killed goes on where it was, and asks nothing twice.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from latent_thoughts import model as models
from latent_thoughts.config import Benchmark, Recipe
from latent_thoughts.data.corpus import Source
from latent_thoughts.engines.load import loaded_engine
from latent_thoughts.journal import Journal
from latent_thoughts.places import version
from latent_thoughts.progress import track
from latent_thoughts.provenance import provenance
from latent_thoughts.stages.evaluate import repeated, statistics, tasks
from latent_thoughts.stages.evaluate.shown import curve, markdown
from latent_thoughts.store import (
    Stage,
    atomic,
    fingerprint,
    read_manifest,
    read_table,
    stage_key,
    told_apart,
    write_json,
)
from latent_thoughts.types import Manifest, UserError

SAMPLES = pa.schema(
    [
        ("question_id", pa.string()),
        ("task", pa.string()),  # the subject's
        ("sample", pa.int32()),
        ("budget", pa.int32()),
        ("question", pa.string()),  # without the examples before it
        ("prompt", pa.string()),
        ("thought", pa.string()),
        ("thought_tokens", pa.int32()),
        ("finished", pa.bool_()),
        ("text", pa.string()),
        ("extracted", pa.string()),
        ("gold", pa.string()),
        ("grade", pa.float64()),
        ("grades", pa.map_(pa.string(), pa.float64())),
        ("repeated", pa.list_(pa.string())),  # where the training data does; null where nothing was searched
    ]
)


def name_of(benchmark: Benchmark) -> str:
    """The folder of a task's results; what sets two of the same task and form apart stands behind."""
    plain = Benchmark(name=benchmark.name, form=benchmark.form)
    other = fingerprint(benchmark.model_dump(mode="json", exclude={"data", "limit"}))[:8]
    same = benchmark.model_dump(exclude={"data", "limit"}) == plain.model_dump(exclude={"data", "limit"})
    return f"{benchmark.name}-{benchmark.form}" + ("" if same else f"-{other}")


def ask_task(
    recipe: Recipe, benchmark: Benchmark, model: Path, folder: Path, trained_on: Mapping[str, Source] | None = None
) -> Manifest:
    """Asks `benchmark` of `model`, a train stage or a Hugging Face folder. What it was `trained_on`, by name, is
    searched for the questions. Raises UserError for data that is missing or lacks a field, and for a model without
    thought tokens that is to think."""
    weights = model / "model" if (model / "model").is_dir() else model
    budgets = benchmark.budgets or [recipe.sample.max_thought_tokens]
    seed = recipe.seed if benchmark.seed is None else benchmark.seed
    engine = recipe.engine.model_dump(include={"kind"})
    asked = benchmark.model_dump(exclude={"data", "seed"})
    settings = [asked, budgets, seed, recipe.model.dtype, engine, SAMPLES.names]
    inputs = {name: read_manifest(source.folder) for name, source in (trained_on or {}).items()}
    stage = Stage(folder, "task", stage_key("task", [*settings, _model_key(model), tasks.files_key(benchmark)], inputs))
    if (manifest := stage.manifest) is not None:
        return manifest
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    made = tasks.build(benchmark)
    if benchmark.form == "latent":
        models.load_tokenizer(weights)  # so that a model that cannot think is refused before it is loaded
    if benchmark.chat_template and not models.plain_tokenizer(weights).chat_template:
        raise UserError(f"{model} has no chat template: take chat_template from task {benchmark.name}")
    journal = Journal(folder / "answered.jsonl")
    total = sum(len(task.eval_docs) for _, task in made.values())
    began = time.perf_counter()
    from lm_eval.models.utils import resolve_max_length

    from latent_thoughts.stages.evaluate.harness import EngineLM

    longest = resolve_max_length(models.config_of(weights)) - 2
    loaded = loaded_engine(recipe, weights, longest)
    with loaded as engine, track(name_of(benchmark), total, "questions") as advance:
        lm = EngineLM(
            engine=engine,
            tokenizer=models.plain_tokenizer(weights),
            config=models.config_of(weights),
            bos=benchmark.bos,
            seed=seed,
            samples=benchmark.samples,
            budgets=budgets,
            journal=journal,
        )
        rows = list(_rows(lm, benchmark, made, advance))
    took = {"seconds": time.perf_counter() - began, "asked": lm.asked}
    if trained_on is not None:
        repeated.mark(rows, repeated.search(rows, trained_on, models.load_tokenizer(weights)[0]))
    stage.write("samples.parquet", rows, SAMPLES, {})
    counts = {**_results(benchmark, [seed], [rows]), **took}
    _write(folder, {"run": provenance(recipe), **counts})
    journal.remove()
    return stage.close(["samples.parquet"], counts)


def _model_key(model: Path) -> Any:
    """The train stage's key, or a hash of the weights of a folder that came from elsewhere."""
    if (model / "manifest.json").exists():
        return told_apart(read_manifest(model))
    files = sorted([*model.glob("*.safetensors"), *model.glob("*.json")])
    if not files:
        raise UserError(f"{model} is not a model folder (no safetensors in it)")
    return fingerprint([(file.name, version(file)) for file in files])


def _rows(lm: Any, benchmark: Benchmark, made: dict[str, Any], advance: Any) -> Iterator[dict[str, Any]]:
    """The harness grades every sample at every budget; the engine is asked with the first."""
    from lm_eval import evaluator

    first = True
    for budget in lm.budgets:
        for sample in range(benchmark.samples):
            lm.budget, lm.sample = budget, sample
            lm.answered = advance if first else lambda _: None
            first = False
            for _, task in made.values():
                task.set_fewshot_seed(tasks.FEWSHOT_SEED)
            given = {name: task for name, (_, task) in made.items()}
            with _without_bars():
                found: Any = evaluator.evaluate(
                    lm,
                    {"tasks": given, "groups": {}, "group_map": {}},
                    bootstrap_iters=0,
                    apply_chat_template=benchmark.chat_template,
                    fewshot_as_multiturn=benchmark.multiturn,
                )
            for name, (subject, task) in made.items():
                yield from _graded(lm, benchmark, subject, task, found["samples"][name])


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """The harness shows a bar of its own for every subject, sample and budget; ours shows the questions."""
    from lm_eval.api import task

    shown, task.tqdm = task.tqdm, lambda rows, **_: rows
    try:
        yield
    finally:
        task.tqdm = shown


def _graded(
    lm: Any, benchmark: Benchmark, subject: tasks.Subject, task: Any, logged: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """One row (SAMPLES) a question, from the harness's own record of it: one of every filter."""
    metric, by = subject.headline(benchmark.form)
    grades: dict[int, list[tuple[str, float]]] = {}
    for record in logged:
        named = [(f"{m},{record['filter']}", float(record[m])) for m in record["metrics"]]
        grades.setdefault(record["doc_id"], []).extend(named)
    for record in logged:
        if record["filter"] != by:
            continue
        prompt, chosen = record["arguments"][0][0], task.OUTPUT_TYPE == "multiple_choice"
        kept = {} if chosen else lm.of(subject.name, record["doc_id"], prompt)
        thought = kept.get("thought")
        thought = None if thought is None else thought[: lm.budget]
        if chosen:
            scores = [float(r[0][0]) for r in record["resps"]]
            text = extracted = task.doc_to_choice(record["doc"])[int(np.argmax(scores))]
        else:
            text, extracted = record["resps"][0][0], _extracted(subject, record)
        yield {
            "question_id": f"{subject.name}/{record['doc_hash'][:16]}",
            "task": subject.name,
            "sample": lm.sample,
            "budget": lm.budget if thought is not None else None,
            "question": _question(task, record["doc"]),
            "prompt": prompt.replace(tasks.OPEN, " [thought: ").replace(tasks.CLOSE, "]"),
            "thought": None if thought is None else lm.tokenizer.decode(thought),
            "thought_tokens": None if thought is None else len(thought),
            "finished": None if thought is None else kept["finished"] and len(kept["thought"]) <= lm.budget,
            "text": text,
            "extracted": extracted,
            "gold": str(record["target"]),
            "grade": dict(grades[record["doc_id"]])[f"{metric},{by}"],
            "grades": grades[record["doc_id"]],
            "repeated": None,
        }


def _question(task: Any, doc: dict[str, Any]) -> str:
    return str(task.doc_to_text(doc)).removesuffix(tasks.OPEN)


def _extracted(subject: tasks.Subject, record: dict[str, Any]) -> str:
    """The answer in a text, as the grader reads it: for the vote."""
    if subject.metric[0] != "math_verify":
        return str(record["filtered_resps"][0])
    found = tasks.need("math_verify").parse(record["resps"][0][0])
    return str(found[0]) if found else "[invalid]"


def described(benchmark: Benchmark, seeds: list[int]) -> dict[str, Any]:
    """What was asked, in results and comparisons."""
    left_out = {"data", "pass_at", "budgets"} | (set() if benchmark.chat_template else {"multiturn"})
    return {**benchmark.model_dump(exclude=left_out), "seeds": seeds}


def _results(benchmark: Benchmark, seeds: list[int], rows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """What was asked and what came of it, from the sample rows of every seed."""
    every = [row for of_seed in rows for row in of_seed]
    found = {"contamination": repeated.counts(every), "results": figures(benchmark, rows, repeated.clean(every))}
    return described(benchmark, seeds) | found


def figures(
    benchmark: Benchmark, seeds: Sequence[Sequence[dict[str, Any]]], clean: set[str] | None = None
) -> list[dict[str, Any]]:
    """Of the sample rows of every seed, one entry a budget (one in all where nothing is thought): accuracy, vote and
    pass@k over questions. `clean` questions, which the training data does not repeat, are counted apart too."""
    return [
        _figures(benchmark, [[r for r in rows if r["budget"] == b] for rows in seeds], clean) for b in _budgets(seeds)
    ]


def _budgets(seeds: Sequence[Sequence[dict[str, Any]]]) -> list[int | None]:
    return sorted({r["budget"] for rows in seeds for r in rows}, key=lambda b: b or 0)


def _figures(benchmark: Benchmark, seeds: Sequence[Sequence[dict[str, Any]]], clean: set[str] | None) -> dict[str, Any]:
    first = seeds[0]
    entry: dict[str, Any] = {
        "budget": first[0]["budget"],
        "accuracy": statistics.over_seeds(_grades(seeds, benchmark.samples).mean(-1)),
        "metrics": {
            name: statistics.over_seeds(_grades(seeds, benchmark.samples, name).mean(-1))
            for name in dict(first[0]["grades"])
        },
    }
    if clean is not None and clean:
        kept = [[r for r in rows if r["question_id"] in clean] for rows in seeds]
        entry["accuracy_clean"] = statistics.over_seeds(_grades(kept, benchmark.samples).mean(-1))
    if benchmark.samples > 1:
        entry["majority"] = statistics.over_seeds(np.array([_votes(rows) for rows in seeds]))
        right = _grades(seeds, benchmark.samples).sum(-1).astype(int)
        passed = np.vectorize(statistics.pass_at, otypes=[float])
        entry["pass_at"] = {
            str(k): statistics.over_seeds(passed(right, benchmark.samples, k)) for k in benchmark.pass_at
        }
    if entry["budget"] is not None:
        every = [r for rows in seeds for r in rows]
        entry["thought_tokens"] = float(np.mean([r["thought_tokens"] for r in every]))
        entry["finished"] = float(np.mean([r["finished"] for r in every]))
    return entry


def _grades(seeds: Sequence[Sequence[dict[str, Any]]], samples: int, name: str | None = None) -> np.ndarray:
    """Grades by (seed, question, sample), of the headline's metric or of another."""
    names = sorted({r["question_id"] for r in seeds[0]})
    at = {name: n for n, name in enumerate(names)}
    table = np.full((len(seeds), len(names), samples), np.nan)
    for n, rows in enumerate(seeds):
        for r in rows:
            table[n, at[r["question_id"]], r["sample"]] = r["grade"] if name is None else dict(r["grades"])[name]
    assert not np.isnan(table).any()
    return table


def _votes(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Grade of the answer that most samples of a question gave, one a question; of equals the first. A sample
    without an answer does not vote."""
    questions: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: r["sample"]):
        questions.setdefault(row["question_id"], []).append(row)
    grades = []
    for samples in questions.values():
        votes = Counter(r["extracted"] for r in samples if r["extracted"] != "[invalid]")
        winner = votes.most_common(1)[0][0] if votes else "[invalid]"
        grades.append(next(r["grade"] for r in samples if r["extracted"] == winner))
    return grades


def joined(benchmark: Benchmark, folders: Sequence[Path], seeds: list[int], into: Path) -> dict[str, Any]:
    """The results of one task asked of models that were fine-tuned with these seeds, as one; written to `into`."""
    rows = [read_table(folder / "samples.parquet").to_pylist() for folder in folders]
    found = {**_results(benchmark, seeds, rows), "fine_tuned": True}
    _write(into, found)
    return found


def _write(folder: Path, results: dict[str, Any]) -> None:
    write_json(folder / "results.json", results)
    with atomic(folder / "results.md") as temporary:
        temporary.write_text(markdown([results]), encoding="utf-8")
    if len(results["results"]) > 1:
        with atomic(folder / "budget.svg") as temporary:
            curve(results, temporary)
