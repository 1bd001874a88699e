"""Comparisons of evaluated folders, and tasks in the chain: fine-tuning, contamination, results."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from latent_thoughts.config import Benchmark, FineTune, resolve
from latent_thoughts.data import records
from latent_thoughts.em import Run
from latent_thoughts.stages.evaluate import asking, fine_tuning, held_out, likelihood
from latent_thoughts.stages.evaluate.compare import ANSWERS, LIKELIHOOD, compare, load
from latent_thoughts.stages.evaluate.shown import comparison_tables
from latent_thoughts.store import Stage
from latent_thoughts.types import UserError
from tests.stages.evaluate import benchmarks


def evaluated(folder: Path, right: Sequence[float], asked: Benchmark | None = None, prefix: str = "gsm8k") -> Path:
    """A folder as `ask_task` leaves it, with these grades."""
    asked = asked or Benchmark(name="gsm8k", form="cot")
    rows = [
        {"question_id": f"{prefix}/{n}", "sample": 0, "budget": None, "grade": grade, "grades": [("m,f", grade)]}
        for n, grade in enumerate(right)
    ]
    where = folder / "tasks" / asking.name_of(asked)
    stage = Stage(where, "task", "key")
    stage.write("samples.parquet", rows, asking.SAMPLES, {})
    counts = {**asking.described(asked, [0]), "results": asking.figures(asked, [rows])}
    (where / "results.json").write_text(json.dumps(counts))
    stage.close(["samples.parquet"], counts)
    return folder


def test_which_differences_are_real(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 200).astype(float)
    worse = np.where(rng.random(200) < 0.2, 0, base)
    other = np.where(rng.random(200) < 0.02, 1 - base, base)
    folders = [evaluated(tmp_path / n, list(g)) for n, g in zip("abc", (base, worse, other), strict=True)]
    found = {(Path(c.first).name, Path(c.second).name): c for c in compare([load(f) for f in folders])}
    assert found["a", "b"].better == str(folders[0])
    assert found["a", "b"].difference.value == pytest.approx(base.mean() - worse.mean())
    assert found["a", "c"].better is None
    assert all(c.adjusted >= c.difference.p for c in found.values())


def test_models_that_were_asked_in_different_forms_are_compared_on_their_questions(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", [1.0] * 30 + [0.0] * 5)
    b = evaluated(tmp_path / "b", [0.0] * 30 + [0.0] * 5, Benchmark(name="gsm8k", form="direct"))
    (found,) = compare([load(a), load(b)])
    assert found.task == "gsm8k, cot and direct" and found.better == str(a)


def test_what_was_asked_otherwise_is_no_seed(tmp_path: Path) -> None:
    """Only models that were fine-tuned with several seeds are averaged."""
    ways: list[tuple[dict[str, Any], list[float]]] = [
        ({"shots": 8}, [1.0] * 4),
        ({"shots": 0}, [0.0] * 4),
        ({"temperature": 0.6, "seed": 1}, [1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 0.6, "seed": 2}, [1.0, 1.0, 0.0, 0.0]),
        ({"temperature": 0.6, "seed": 2, "pass_at": [1]}, [1.0, 1.0, 0.0, 0.0]),
    ]
    for settings, right in ways:
        evaluated(tmp_path / "iter_00", right, Benchmark(name="gsm8k", form="cot", **settings))
    for seed, right in enumerate(([1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0])):
        asked = FineTune(form="cot", ask={"samples": 1}).asked
        evaluated(tmp_path / "iter_00" / "fine_tune" / f"seed_{seed}", right, asked)
    found = load(tmp_path / "iter_00").figures
    assert {form: (f["value"], f["seeds"]) for (_, form), f in found.items()} == {
        "cot, shots 8": (1, 1),
        "cot, shots 0": (0, 1),
        "cot, temperature 0.6, seed 1": (0.25, 1),
        "cot, temperature 0.6, seed 2": (0.5, 1),
        "cot, samples 1, fine-tuned": (0.625, 2),
    }


def test_a_folder_of_several_models_is_refused(tmp_path: Path) -> None:
    """Iterations are no seeds; what was set aside for other settings is no model."""
    for name in ("iter_00", "iter_01"):
        evaluated(tmp_path / name, [1.0])
    with pytest.raises(UserError, match=r"holds 2 models, name one: .*/iter_00, .*/iter_01$"):
        load(tmp_path)
    old = tmp_path / "iter_01" / "tasks" / "gsm8k-cot"
    shutil.copytree(old, old.with_name("gsm8k-cot.0123456789ab"))
    assert load(tmp_path / "iter_01").grades == load(old).grades


def test_mistakes_of_comparing(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path / "a", [1.0]), evaluated(tmp_path / "b", [1.0], prefix="other")
    with pytest.raises(UserError, match="were asked different questions of gsm8k"):
        compare([load(a), load(b)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no evaluation"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nowhere")


def test_an_evaluation_that_was_killed_is_not_compared(tmp_path: Path) -> None:
    """Its first 50 documents are no figure of the model."""
    folder = scored(tmp_path / "a", [60.0] * 4)
    (folder / "evaluate" / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no evaluation that is complete: run latent-thoughts evaluate first"):
        load(folder)


def scored(
    folder: Path, costs: Sequence[float], k: Sequence[int] = (1, 4), text: str = "", never: Sequence[int] = ()
) -> Path:
    """A folder with the likelihood of two chunks of 50 bytes a document, at these costs in nats by the largest K; about
    chunks number `never` no thought ended."""
    rows = [
        {"doc_id": f"d{n // 2}", "chunk_index": n % 2, "text": f"{text}{n}", "place": 0.0, "tokens": 9,
         "characters": 50, "bytes": 50, "log_raw": -1.0, "log_thoughtless": -1.0,
         "bounds": [(i, -cost - 9 * (max(k) - i)) for i in k], "finished": [(i, float(n not in never)) for i in k]}
        for n, cost in enumerate(costs)
    ]  # fmt: skip
    stage = Stage(folder / "evaluate", "evaluate", "k")
    stage.write("likelihood-00000.parquet", rows, likelihood.SCORES, {})
    stage.close(["likelihood-00000.parquet"], {})
    return folder


def test_text_is_compared_by_document(tmp_path: Path) -> None:
    costs = np.random.default_rng(0).uniform(50, 100, 40)
    (found,) = compare([load(scored(tmp_path / name, [*(costs + more)])) for name, more in (("a", 0.0), ("b", 5.0))])
    assert found.task == f"{LIKELIHOOD} (L_4)" and found.difference.n == 20
    assert found.difference.value == pytest.approx(-5 / np.log(2) / 50)
    assert found.better == str(tmp_path / "a") and found.unfinished == (0, 0)


def test_text_is_compared_by_the_largest_k_that_both_have(tmp_path: Path) -> None:
    """L_4 beside L_4: not the L_16 of the one, which has more draws."""
    a, b = scored(tmp_path / "a", [60.0] * 40, (1, 4, 16)), scored(tmp_path / "b", [60.0 + 9 * 12] * 40, (1, 4))
    (found,) = compare([load(a), load(b)])
    assert found.task == f"{LIKELIHOOD} (L_4)" and found.difference.value == 0 and found.better is None
    with pytest.raises(UserError, match="have bounds of no K in common: see evaluate.bound"):
        compare([load(a), load(scored(tmp_path / "c", [60.0] * 40, [8]))])


def test_only_the_same_text_is_compared(tmp_path: Path) -> None:
    """Documents of two runs may have the same numbers and other words."""
    a, b = scored(tmp_path / "a", [60.0] * 4), scored(tmp_path / "b", [65.0] * 4, text="other ")
    with pytest.raises(UserError, match="were scored on different held-out text"):
        compare([load(a), load(b)])
    (found,) = compare([load(a), load(scored(tmp_path / "more", [65.0] * 40))])
    assert found.difference.n == 2
    old = tmp_path / "old" / "likelihood-00000.parquet"
    old.parent.mkdir()
    pq.write_table(pq.read_table(a / "evaluate" / old.name).drop_columns(["text", "finished"]), old)
    (old.parent / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="written by an earlier version: run latent-thoughts evaluate again"):
        load(old.parent)


def test_chunks_without_a_thought_that_ended_are_counted(tmp_path: Path) -> None:
    models = [
        load(scored(tmp_path / name, [cost] * 40, never=never))
        for name, cost, never in (("a", 60.0, [0, 1, 2]), ("b", 65.0, [2, 7]))
    ]
    (found,) = compare(models)
    assert found.unfinished == (3, 2) and found.difference.n == 20
    assert found.difference.value == pytest.approx(-5 / np.log(2) / 50)
    table = comparison_tables(models, [found])[-1]
    assert "A − B: of 3 chunks no thought of A ended, of 2 none of B" in table.notes[-1]


def answered(folder: Path, right: Sequence[bool], gold: str = "den") -> Path:
    rows = [{"doc_id": f"d{n}", "question": "where?", "gold": gold, "right": is_so} for n, is_so in enumerate(right)]
    Stage(folder / "evaluate", "evaluate", "k").write("answers.parquet", rows, held_out.ANSWERS, {})
    return scored(folder, [60.0] * 4)


def test_answers_on_held_out_documents_are_compared(tmp_path: Path) -> None:
    """Question by question, beside the text; and both tables name the models."""
    folders = [answered(tmp_path / n, r) for n, r in (("a", [True] * 12 + [False]), ("b", [False] * 12 + [True]))]
    models = [load(folder) for folder in folders]
    found = {c.task: c for c in compare(models)}
    assert found.keys() == {"held-out documents, answers", f"{LIKELIHOOD} (L_4)"}
    answers = found["held-out documents, answers"].difference
    assert answers.test.startswith("McNemar") and (answers.n, answers.p) == (13, pytest.approx(0.00342, abs=1e-5))
    assert models[0].figures[ANSWERS]["value"] == 12 / 13
    with pytest.raises(UserError, match="were asked different questions of held-out documents"):
        compare([models[0], load(answered(tmp_path / "c", [True], "attic"))])


def test_models_of_text_alone_are_named(tmp_path: Path) -> None:
    models = [load(scored(tmp_path / name, [60.0] * 4)) for name in ("a", "b")]
    shown, _ = comparison_tables(models, compare(models))
    assert shown.title == f"Models in {tmp_path}"
    assert [row[:2] for row in shown.rows] == [["A", "a"], ["B", "b"]]


def test_a_difference_has_its_unit_sign_and_interval(tmp_path: Path) -> None:
    folders = [answered(tmp_path / n, r) for n, r in (("a", [True] * 12 + [False]), ("b", [False] * 12 + [True]))]
    models = [load(folder) for folder in folders[::-1]]
    _, shown = comparison_tables(models, compare(models))
    answers, text = shown.rows
    assert answers[:4] == ["held-out documents, answers", "A − B", "13", "−84.6 points"] and answers[5] == "0.0034"
    assert re.fullmatch(r"−\d+\.\d to −\d+\.\d", str(answers[4]))
    assert text[0] == f"{LIKELIHOOD} (L₄)" and text[3:5] == ["+0.00 bits/byte", "+0.00 to +0.00"]
    assert "-" not in "".join(map(str, [*answers[1:], *text[1:]]))


def test_a_folder_is_not_compared_with_itself(tmp_path: Path) -> None:
    a = scored(tmp_path / "a", [60.0] * 4)
    with pytest.raises(UserError, match="a folder is named twice"):
        compare([load(a), load(a / ".." / "a")])


def test_fine_tuned_models_are_compared_over_their_seeds(tmp_path: Path) -> None:
    """A gap of one seed a side that is real, for those two models, is none of the settings they were trained with."""
    rng, asked = np.random.default_rng(0), FineTune(form="cot", ask={"samples": 1}).asked
    for name, shares in (("a", (0.9, 0.5, 0.3)), ("b", (0.6, 0.4, 0.3))):
        for seed, share in enumerate(shares):
            right = (rng.random(400) < share).astype(float)
            evaluated(tmp_path / name / "fine_tune" / f"seed_{seed}", [*right], asked)
    models = [load(tmp_path / name) for name in "ab"]
    (found,) = compare(models)
    assert found.task == "gsm8k, cot, samples 1, fine-tuned" and found.better is None
    assert found.difference.test == "Welch's t of 3 and 3 training seeds" and found.difference.n == 400
    means = [np.array(list(m.grades["gsm8k", "cot, samples 1, fine-tuned"].values())).mean(0) for m in models]
    assert found.difference.p == pytest.approx(stats.ttest_ind(*means, equal_var=False).pvalue)
    assert "training seeds are held fixed" in comparison_tables(models, [found])[-1].notes[0]
    seeds = [load(tmp_path / name / "fine_tune" / "seed_0") for name in "ab"]
    (one,) = compare(seeds)
    assert one.difference.test.startswith("McNemar") and one.better == seeds[0].name


@pytest.fixture
def run(tmp_path: Path, small: dict[str, Any]) -> Run:
    """Trained on documents whose text holds a question of the task, and whose thoughts hold another. Of the others one
    is too short to be found."""
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()
    repeated, clean = [" ".join(words), " ".join(words[::-1])], " ".join(words[::2] + words[1::2])
    asked = [{"question": q, "answer": f"1\n#### {n}"} for n, q in enumerate([*repeated, "Who is it ?", clean])]
    data = benchmarks.write(
        tmp_path / "task", asked, [{"question": f"a {n}", "answer": f"{n}\n#### {n}"} for n in range(9)]
    )
    lines = [{"q": f"{repeated[0]} {n} ", "t": f"{repeated[1]} {n}", "a": "yes"} for n in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = benchmarks.save_model(tmp_path / "tokenizer", thinks=False)
    small["data"] = {"source": str(tmp_path / "corpus.jsonl"), "pieces": ["{q}", "{a}"], "thought": "{t}",
                     "held_out": 0.1, "warm_start": 0.5}  # fmt: skip
    small["model"]["tokenizer"] = str(tokenizer)
    small["model"]["base"]["max_position_embeddings"] = 2048
    small["sample"] |= {"max_thought_tokens": 8, "max_tokens": 256}
    small["train"] |= {"steps": 4, "sequence_length": 256}
    task = {"name": "gsm8k", "form": "latent", "data": data, "shots": 0, "max_tokens": 4}
    tuning = {"task": "gsm8k", "data": data, "seeds": 2, "train": {"steps": 3, "rows": 2, "sequence_length": 128}}
    asking_it = {"samples": 2, "max_tokens": 4, "pass_at": [1, 2]}
    small["evaluate"] = {"documents": 2, "tasks": [task], "fine_tune": {**tuning, "ask": asking_it}}
    made = Run(resolve(small), tmp_path / "run")
    made.prepare()
    made.synthesize()
    made.train_warm_start()
    return made


def test_tasks_in_the_chain(run: Run) -> None:
    """Asked as it is and fine-tuned over two seeds, with what the training data repeats beside the score."""
    asked, tuned = run.evaluate(run.warm_start).counts["tasks"]
    assert asked["contamination"] == {what: {"questions": 1, "of": 4} for what in ("text", "thoughts", "too_short")}
    assert asked["results"][0]["accuracy_clean"]["n"] == 1
    (result,) = tuned["results"]
    assert tuned["fine_tuned"] and tuned["seeds"] == [0, 1]
    assert (result["accuracy"]["seeds"], result["accuracy"]["n"]) == (2, 4)
    assert tuned["contamination"] == asked["contamination"] and result["accuracy_clean"]["n"] == 1
    assert set(result["pass_at"]) == {"1", "2"}
    folder = run.warm_start / "fine_tune"
    assert "| latent, samples 2, max tokens 4, fine-tuned |" in (folder / "results.md").read_text()
    documents = records.documents(folder / "documents", fine_tuning.SPLIT)
    first = documents[0]
    assert [c.text for c in first.chunks] == ["Question: a 0\nAnswer:", " #### 0"] and first.target == (False, True)
    assert len(first.thoughts[1]) == 1
    models = [folder / f"seed_{n}" / "train" for n in (0, 1)]
    assert all((m / "manifest.json").exists() for m in models)
    key = json.loads((models[0] / "manifest.json").read_text())["key"]
    assert key != json.loads((models[1] / "manifest.json").read_text())["key"]
    again = run.evaluate(run.warm_start).counts["tasks"]
    assert again == [asked, tuned]
    for path in folder.rglob("samples.parquet"):
        assert len(pq.read_table(path)) == 8
