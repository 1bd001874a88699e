"""Tasks: prompts as lm-evaluation-harness makes them, grading as it and math-verify grade, and one line a mistake."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from latent_thoughts.config import Benchmark
from latent_thoughts.stages.evaluate import tasks
from latent_thoughts.types import UserError
from tests.stages.evaluate import benchmarks

pytest.importorskip("lm_eval")


def prompts(benchmark: Benchmark) -> list[str]:
    made = tasks.build(benchmark)
    found = []
    for _, task in made.values():
        task.set_fewshot_seed(tasks.FEWSHOT_SEED)
        found += [task.fewshot_context(doc, task.config.num_fewshot) for doc in task.eval_docs]
    return found


def test_the_plain_form_is_the_harness_own_task(tmp_path: Path) -> None:
    """With `fewshot: random` and `cot`, every prompt is that of the harness's gsm8k on the same rows."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    data = benchmarks.gsm8k(tmp_path)
    root = Path(lm_eval.__file__).parent / "tasks" / "gsm8k"
    files = {split: f"{data}/{split}.jsonl" for split in ("train", "test")}
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}, "num_fewshot": 3}
    manager = TaskManager(include_path=[str(root)], include_defaults=False)
    config = manager.task_index["gsm8k"].cfg
    theirs = manager.load({**config, **local})["tasks"]["gsm8k"]
    theirs.set_fewshot_seed(1234)
    expected = [theirs.fewshot_context(doc, 3) for doc in theirs.eval_docs]
    assert prompts(Benchmark(name="gsm8k", form="cot", data=data, shots=3, fewshot="random")) == expected
    assert len(set(expected)) == 8 and all(p.count("####") == 3 for p in expected)


def test_forms_differ_in_what_stands_between_question_and_answer(tmp_path: Path) -> None:
    data = benchmarks.gsm8k(tmp_path)
    direct, cot, latent = (
        prompts(Benchmark(name="gsm8k", form=form, data=data, shots=1))[0] for form in ("direct", "cot", "latent")
    )
    shot, asked = benchmarks.GSM8K[8], benchmarks.GSM8K[0]
    assert direct == f"Question: {shot['question']}\nAnswer: #### 17\n\nQuestion: {asked['question']}\nAnswer:"
    assert cot == f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\nQuestion: {asked['question']}\nAnswer:"
    o, c = tasks.OPEN, tasks.CLOSE
    thought = f"{o} 8 + 9 = 17{c} #### 17"
    assert latent == f"Question: {shot['question']}\nAnswer:{thought}\n\nQuestion: {asked['question']}\nAnswer:{o}"


@pytest.mark.parametrize("name", ["math", "mmlu_stem"])
def test_the_other_tasks_have_their_forms_too(tmp_path: Path, name: Any) -> None:
    data = benchmarks.write(tmp_path, benchmarks.MATH if name == "math" else benchmarks.MMLU)
    direct, cot, latent = (prompts(Benchmark(name=name, form=f, data=data)) for f in ("direct", "cot", "latent"))
    assert len(direct) == len(cot) == len(latent) == 4
    assert all(len(d) < len(c) for d, c in zip(direct, cot, strict=True))
    for prompt in latent:
        assert prompt.endswith(tasks.OPEN) and prompt.count(tasks.OPEN) == 5 == prompt.count(tasks.CLOSE) + 1
    beginning = (
        "Problem:\nWhat is $0 + 1$?\n\nSolution:" if name == "math" else "Q: Which is 0?\n(A) 0 (B) 1 (C) 2 (D) 3\nA:"
    )
    assert direct[0].endswith(beginning) and latent[0].endswith(beginning + tasks.OPEN)
    assert cot[0].endswith(beginning if name == "math" else beginning + " Let's think step by step.")


def graded(task: Any, doc: dict[str, Any], text: str) -> dict[str, float]:
    """Grades by every filter, through the harness."""
    from lm_eval.api.instance import Instance

    found = {}
    instance = Instance("generate_until", doc, ("", {}), 0, (task.config.task, 0, 1), resps=[text])
    task._instances = [instance]
    task.apply_filters()
    for name, resps in instance.filtered_resps.items():
        found |= {f"{metric},{name}": v for metric, v in task.process_results(doc, [resps]).items()}
    return found


@pytest.mark.parametrize("form", ["direct", "cot", "latent"])
def test_gsm8k_and_math_are_graded_right(tmp_path: Path, form: Any) -> None:
    made = tasks.build(Benchmark(name="gsm8k", form=form, data=benchmarks.gsm8k(tmp_path / "g"), shots=0))
    ((subject, task),) = made.values()
    headline = ",".join(subject.headline(form))
    for doc in task.eval_docs:
        gold = doc["answer"].split("#### ")[1]
        assert graded(task, doc, f" #### {gold}")[headline] == 1
        assert graded(task, doc, f" #### {int(gold) + 1}")[headline] == 0
        assert graded(task, doc, " no idea")[headline] == 0
    made = tasks.build(Benchmark(name="math", form=form, data=benchmarks.write(tmp_path / "m", benchmarks.MATH)))
    ((subject, task),) = made.values()
    headline = ",".join(subject.headline(form))
    for doc in task.eval_docs:
        right, wrong = (f" Final Answer: The final answer is ${n}$. I hope" for n in (doc["answer"], "77"))
        assert graded(task, doc, right)[headline] == graded(task, doc, f"\\boxed{{{doc['answer']}}}")[headline] == 1
        assert graded(task, doc, wrong)[headline] == 0


MISTAKES = {
    "no folder": ({}, "does not exist"),
    "no train split": ({"test": benchmarks.GSM8K[:2]}, "train.jsonl does not exist; set shots: 0"),
    "empty": ({"test": []}, "holds no rows"),
    "no field": ({"test": [{"question": "why?"}]}, "row 1 of .* has no field answer"),
    "not json": ({"test": None}, "not valid JSON"),
    "no result": ({"test": benchmarks.GSM8K[:1], "train": [{"question": "a", "answer": "b"}] * 5}, "no line with ####"),
    "taken": ({"test": [{"question": tasks.OPEN, "answer": "#### 1"}]}, "which are taken"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(tmp_path: Path, name: str) -> None:
    files, expected = MISTAKES[name]
    folder = tmp_path / "data"
    for split, rows in files.items():
        folder.mkdir(exist_ok=True)
        text = "{\n" if rows is None else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    with pytest.raises(UserError, match=expected) as error:
        prompts(Benchmark(name="gsm8k", form="latent", data=str(folder)))
    assert "\n" not in str(error.value)


def test_few_training_rows_are_of_all_subjects(tmp_path: Path) -> None:
    kinds = ["Algebra"] * 8 + ["Geometry"] * 2 + ["Number Theory"] * 5
    train = [{**benchmarks.MATH[0], "problem": kind, "type": kind} for kind in kinds]
    data = benchmarks.write(tmp_path, [], train)
    asked = Benchmark(name="math", data=data)

    def taken(limit: int | None) -> Counter[str]:
        return Counter(parts.question.split("\n")[1] for parts in tasks.solved(asked, limit))

    assert taken(3) == {"Algebra": 1, "Geometry": 1, "Number Theory": 1}
    assert taken(9) == {"Algebra": 4, "Geometry": 2, "Number Theory": 3}
    assert taken(None) == Counter(kinds)


def test_rows_of_no_known_type_are_named(tmp_path: Path) -> None:
    data = benchmarks.write(tmp_path, [{**benchmarks.MMLU[0], "type": "law"}])
    with pytest.raises(UserError, match="rows of no known type"):
        tasks.build(Benchmark(name="mmlu_stem", form="direct", data=data))
