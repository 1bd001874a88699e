"""One task in one form, asked of one model through lm-evaluation-harness, and what came of it.

    FOLDER/results.json      figures with their errors (docs/formats.md)
    FOLDER/results.md        the same as a table
    FOLDER/samples.parquet   every prompt, thought, answer and grade

Every answered question is kept at once: what was killed goes on where it was, and asks nothing twice.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from latent_thoughts import model as models
from latent_thoughts.config import Benchmark, Recipe
from latent_thoughts.engines.load import loaded_engine
from latent_thoughts.runlog import provenance, track
from latent_thoughts.stages.evaluate import statistics, tasks
from latent_thoughts.store import Journal, Stage, atomic, fingerprint, read_manifest, sha256, stage_key, write_json
from latent_thoughts.types import Manifest, UserError

SAMPLES = pa.schema(
    [
        ("question_id", pa.string()),
        ("task", pa.string()),  # the subject's
        ("sample", pa.int32()),
        ("budget", pa.int32()),
        ("prompt", pa.string()),
        ("thought", pa.string()),
        ("thought_tokens", pa.int32()),
        ("finished", pa.bool_()),
        ("text", pa.string()),
        ("extracted", pa.string()),
        ("gold", pa.string()),
        ("grade", pa.float64()),
        ("grades", pa.map_(pa.string(), pa.float64())),
    ]
)


def name_of(benchmark: Benchmark) -> str:
    """The folder of a task's results; what sets two of the same task and form apart stands behind."""
    plain = Benchmark(name=benchmark.name, form=benchmark.form)
    other = fingerprint(benchmark.model_dump(mode="json", exclude={"data", "limit"}))[:8]
    same = benchmark.model_dump(exclude={"data", "limit"}) == plain.model_dump(exclude={"data", "limit"})
    return f"{benchmark.name}-{benchmark.form}" + ("" if same else f"-{other}")


def ask_task(recipe: Recipe, benchmark: Benchmark, model: Path, folder: Path) -> Manifest:
    """Asks `benchmark` of `model`, a train stage or a Hugging Face folder. Raises UserError for data that is missing
    or lacks a field, and for a model without thought tokens that is to think."""
    weights = model / "model" if (model / "model").is_dir() else model
    budgets = benchmark.budgets or [recipe.sample.max_thought_tokens]
    seed = recipe.seed if benchmark.seed is None else benchmark.seed
    engine = recipe.engine.model_dump(include={"kind"})
    settings = [benchmark.model_dump(exclude={"data", "seed"}), budgets, seed, recipe.model.dtype, engine]
    stage = Stage(folder, "task", stage_key("task", [*settings, _model_key(model), _data_key(benchmark)]))
    if (manifest := stage.manifest) is not None:
        return manifest
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    made = tasks.build(benchmark)
    if benchmark.form == "latent":
        models.load_tokenizer(weights)  # so that a model that cannot think is refused before it is loaded
    journal = Journal(folder / "answered.jsonl")
    total = sum(len(task.eval_docs) for _, task in made.values())
    began = time.perf_counter()
    with loaded_engine(recipe, weights) as engine, track(name_of(benchmark), total, "questions") as advance:
        from latent_thoughts.stages.evaluate.harness import EngineLM

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
    stage.write("samples.parquet", rows, SAMPLES, {})
    counts = {**described(benchmark, seed), "results": figures(benchmark, rows), **took}
    write_json(folder / "results.json", {"run": provenance(recipe), **counts})
    with atomic(folder / "results.md") as temporary:
        temporary.write_text(markdown([counts]), encoding="utf-8")
    journal.remove()
    return stage.close(["samples.parquet"], counts)


def _model_key(model: Path) -> str:
    """The train stage's key, or a hash of the weights of a folder that came from elsewhere."""
    if (model / "manifest.json").exists():
        return read_manifest(model).key
    files = sorted([*model.glob("*.safetensors"), *model.glob("*.json")])
    if not files:
        raise UserError(f"{model} is not a model folder (no safetensors in it)")
    return fingerprint([(file.name, sha256(file)) for file in files])


def _data_key(benchmark: Benchmark) -> list[str]:
    """Hashes of local files; a hub's data set goes by its name."""
    if benchmark.data is None:
        return []
    path = Path(benchmark.data).expanduser()
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
    return [f"{file.name} {sha256(file)}" for file in files]


def _rows(lm: Any, benchmark: Benchmark, made: dict[str, Any], advance: Any) -> Any:
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
            found = evaluator.evaluate(
                lm, {"tasks": given, "groups": {}, "group_map": {}}, bootstrap_iters=0, log_samples=True
            )
            assert found is not None
            for name, (subject, task) in made.items():
                yield from _graded(lm, benchmark, subject, task, found["samples"][name])


def _graded(lm: Any, benchmark: Benchmark, subject: tasks.Subject, task: Any, logged: Sequence[dict[str, Any]]) -> Any:
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
            "prompt": prompt.replace(tasks.OPEN, " [thought: ").replace(tasks.CLOSE, "]"),
            "thought": None if thought is None else lm.tokenizer.decode(thought),
            "thought_tokens": None if thought is None else len(thought),
            "finished": None if thought is None else kept["finished"] and len(kept["thought"]) <= lm.budget,
            "text": text,
            "extracted": extracted,
            "gold": str(record["target"]),
            "grade": dict(grades[record["doc_id"]])[f"{metric},{by}"],
            "grades": grades[record["doc_id"]],
        }


def _extracted(subject: tasks.Subject, record: dict[str, Any]) -> str:
    """The answer in a text, as the grader reads it: for the vote."""
    if subject.metric[0] != "math_verify":
        return str(record["filtered_resps"][0])
    found = tasks.need("math_verify").parse(record["resps"][0][0])
    return str(found[0]) if found else "[invalid]"


def described(benchmark: Benchmark, seed: int) -> dict[str, Any]:
    """What was asked, in results and comparisons."""
    named = {"name", "form", "shots", "fewshot", "samples", "temperature", "top_p", "max_tokens", "limit"}
    return {**benchmark.model_dump(include=named), "seed": seed, "contamination": None}


def figures(benchmark: Benchmark, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a budget (one in all where nothing is thought): accuracy, vote and pass@k over questions."""
    found = []
    for budget in sorted({r["budget"] for r in rows}, key=lambda b: b or 0):
        part = [r for r in rows if r["budget"] == budget]
        names, numbers = np.unique([r["question_id"] for r in part], return_inverse=True)
        table = np.full((len(names), benchmark.samples), np.nan)
        for row, n in zip(part, numbers, strict=True):
            table[n, row["sample"]] = row["grade"]
        entry: dict[str, Any] = {"budget": budget, "accuracy": statistics.over_seeds(table.T.mean(0)[None])}
        entry["metrics"] = {
            name: statistics.over_seeds(np.array([[dict(r["grades"])[name] for r in part]]))
            for name in dict(part[0]["grades"])
        }
        if benchmark.samples > 1:
            entry["majority"] = statistics.over_seeds(np.array([_votes(part)]))
            right = table.sum(1).astype(int)
            entry["pass_at"] = {
                str(k): statistics.over_seeds(
                    np.array([[statistics.pass_at(int(c), benchmark.samples, k) for c in right]])
                )
                for k in benchmark.pass_at
            }
        if budget is not None:
            entry["thought_tokens"] = float(np.mean([r["thought_tokens"] for r in part]))
            entry["finished"] = float(np.mean([r["finished"] for r in part]))
        found.append(entry)
    return found


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


def markdown(evaluations: Sequence[dict[str, Any]]) -> str:
    """A table, one line a task, form and budget."""
    lines = ["| task | form | thought tokens | n | samples | accuracy | vote | pass@k | repeated in training |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for e in evaluations:
        for r in e["results"]:
            passes = ", ".join(f"{k}: {shown(v)}" for k, v in r.get("pass_at", {}).items())
            cells = [
                e["name"],
                e["form"],
                "" if r["budget"] is None else f"≤ {r['budget']} ({r['thought_tokens']:.0f})",
                str(r["accuracy"]["n"]),
                str(e["samples"]),
                shown(r["accuracy"]),
                shown(r["majority"]) if "majority" in r else "",
                passes,
                repeated(e["contamination"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(figure: dict[str, Any]) -> str:
    """A share in percent with its standard error."""
    error = "" if figure["se"] is None else f" ± {100 * figure['se']:.1f}"
    return f"{100 * figure['value']:.1f}{error} %"


def repeated(contamination: dict[str, Any] | None) -> str:
    if contamination is None:
        return "not checked"
    return ", ".join(f"{what} {c['questions']} of {c['of']}" for what, c in contamination.items())


def read(folder: Path) -> dict[str, Any]:
    """The results of a task's folder."""
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
