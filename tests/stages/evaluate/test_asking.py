"""Asking a model: the harness's own figures, samples, budgets, and going on after a death."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from latent_thoughts import model as models
from latent_thoughts.config import Benchmark, Engine, FineTune, Model, Recipe, resolve
from latent_thoughts.data import format
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.stages.evaluate import asking, fine_tuning, statistics, tasks
from latent_thoughts.store import Stage
from latent_thoughts.types import UserError
from tests.stages.evaluate import benchmarks

pytest.importorskip("lm_eval")
RECIPE = {"threads": 1, "engine": {"sequences": 8}, "sample": {"max_thought_tokens": 9}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmarks.save_model(tmp_path_factory.mktemp("model"))


def recipe() -> Recipe:
    return resolve(RECIPE)


def benchmark(folder: Path, **settings: Any) -> Benchmark:
    values = {"name": "gsm8k", "form": "cot", "data": benchmarks.gsm8k(folder / "data"), "shots": 2, "max_tokens": 12}
    return Benchmark(**(values | settings))


def rows(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "samples.parquet").to_pylist()


@pytest.mark.parametrize("chat", [None, "turns", "one message"])
@pytest.mark.parametrize("form", ["direct", "cot"])
def test_answers_and_figures_are_those_of_the_harness_hf_model(
    model: Path, tmp_path: Path, form: Any, chat: str | None
) -> None:
    asked = benchmark(tmp_path, form=form, chat_template=chat is not None, multiturn=chat == "turns")
    texts = benchmarks.as_through_hf(recipe(), asked, model, tmp_path / "out")
    assert len(texts) == 8 and len(set(texts.values())) > 1
    turns = {None: 0, "turns": 6, "one message": 2}[chat]  # two examples
    assert all(prompt.count("<bos>") == turns for prompt in texts)


def test_choices_are_scored_as_by_the_harness_hf_model(model: Path, tmp_path: Path) -> None:
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    from latent_thoughts.stages.evaluate.harness import EngineLM

    asked = Benchmark(name="mmlu_stem", form="direct", data=benchmarks.write(tmp_path, benchmarks.MMLU), shots=0)
    loaded, short = models.load(model, Model()), models.config_of(model)
    short.max_position_embeddings = 100
    ours = EngineLM(engine=TorchEngine(loaded, Engine()), tokenizer=models.plain_tokenizer(model), config=short)
    theirs = HFLM(pretrained=str(model), dtype="float32", device="cpu", max_length=100)
    scores = []
    for lm in (ours, theirs):
        made = {name: task for name, (_, task) in tasks.build(asked).items()}
        given: Any = {"tasks": made, "groups": {}, "group_map": {}}
        found: Any = evaluator.evaluate(lm, given, bootstrap_iters=0)
        scores.append([r[0] for s in found["samples"]["mmlu_astronomy"] for r in s["resps"]])
    for mine, other in zip(*scores, strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == other[1]
    texts = [("Ann has", " figs"), ("", "Bob"), ("Ann has ", "figs and")]
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, text, 0, ("", n, 1)) for n, text in enumerate(texts)]
    for mine, other in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert mine == (pytest.approx(other[0], abs=1e-4), other[1])
    whole = [Instance("loglikelihood_rolling", {}, ("Ann has figs. " * 20,), 0, ("", 0, 1))]
    assert ours.loglikelihood_rolling(whole)[0] == pytest.approx(theirs.loglikelihood_rolling(whole)[0], rel=1e-5)


def test_a_thought_is_drawn_once_and_cut_at_every_budget(model: Path, tmp_path: Path) -> None:
    """Answers at a budget are those of a model that thinks no further; the curve has them all."""
    whole = benchmark(tmp_path, form="latent", budgets=[0, 3, 9])
    found = asking.ask_task(recipe(), whole, model, tmp_path / "out").counts["results"]
    assert [r["budget"] for r in found] == [0, 3, 9]
    assert "<svg" in (tmp_path / "out" / "budget.svg").read_text()
    assert found[0]["thought_tokens"] == 0 < found[1]["thought_tokens"] <= 3 < found[2]["thought_tokens"] <= 9
    by_budget = {b: {r["question_id"]: r for r in rows(tmp_path / "out") if r["budget"] == b} for b in (0, 3, 9)}
    for question, long in by_budget[9].items():
        short = by_budget[3][question]
        assert long["thought"].startswith(short["thought"])
        assert by_budget[0][question]["thought"] == ""
    asking.ask_task(recipe(), benchmark(tmp_path, form="latent", budgets=[3]), model, tmp_path / "three")
    alone = {r["question_id"]: r for r in rows(tmp_path / "three")}
    assert {q: (r["thought"], r["text"]) for q, r in alone.items()} == {
        q: (r["thought"], r["text"]) for q, r in by_budget[3].items()
    }


def test_a_thinking_prompt_is_laid_out_as_in_training(model: Path, tmp_path: Path) -> None:
    """The greedy thought and answer equal those of plain forward passes over BOS ... S P z E ..."""
    asking.ask_task(recipe(), benchmark(tmp_path, form="latent", limit=2), model, tmp_path / "out")
    loaded, (tokenizer, controls) = models.load(model, Model()).eval(), models.load_tokenizer(model)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def greedy(prompt: list[int], limit: int, stops: set[int]) -> list[int]:
        found: list[int] = []
        while len(found) < limit:
            with torch.no_grad():
                token = int(loaded(torch.tensor([prompt + found])).logits[0, -1].argmax())
            if token in stops:
                break
            found.append(token)
        return found

    for row, asked in zip(rows(tmp_path / "out"), benchmarks.GSM8K, strict=False):
        prompt = [controls.bos]
        for shot in benchmarks.GSM8K[8:10]:
            reasoning, final = shot["answer"].split("\n")
            prompt += [*ids(f"Question: {shot['question']}\nAnswer:"), controls.start, controls.prior]
            prompt += [*ids(f" {reasoning}"), controls.end, *ids(f" {final}\n\n")]
        prompt += [*ids(f"Question: {asked['question']}\nAnswer:"), controls.start, controls.prior]
        thought = greedy(prompt, 9, {controls.end, *controls.never_in_thoughts})
        assert row["thought"] == tokenizer.decode(thought)
        answer = greedy([*prompt, *thought, controls.end], 12, {controls.end, *controls.never_in_thoughts})
        assert row["text"] == tokenizer.decode(answer).split("\n\n")[0].split("Question:")[0]


@pytest.mark.parametrize("form", ["direct", "cot"])
def test_a_fine_tuned_model_is_asked_behind_the_bos_that_it_was_trained_with(
    model: Path, tmp_path: Path, form: Any
) -> None:
    """Of a tokenizer that adds none by itself, too; a text that begins with it does not get another."""
    from latent_thoughts.stages.evaluate.harness import EngineLM

    config = FineTune(form=form, data=benchmarks.gsm8k(tmp_path / "data"))
    asked, (tokenizer, controls) = config.asked, models.load_tokenizer(model)
    (parts, *_), engine = tasks.solved(asked, 1), TorchEngine(models.load(model, Model()), Engine())
    trained = fine_tuning.document(Codec(tokenizer), 0, parts, form)
    ids = format.lay_out(trained, [format.Form.RAW] * 2, controls).ids
    assert tokenizer.encode("a")[0] != controls.bos
    lm = EngineLM(engine=engine, tokenizer=models.plain_tokenizer(model), config=models.config_of(model), bos=asked.bos)
    question = lm.tok_encode(parts.question)
    assert question == list(ids[: len(question)]) and question[0] == controls.bos
    assert lm.tok_encode(f"<bos>{parts.question}") == question
    lm.bos = None
    assert lm.tok_encode(parts.question) == question[1:]


def test_models_that_skipped_other_batches_are_asked_apart(tmp_path: Path) -> None:
    skips: list[list[int]] = [[], [3], [3, 4]]
    for n, skipped in enumerate(skips):
        Stage(tmp_path / str(n), "train", "k" * 64).close([], {"skipped": skipped} if skipped else {})
    keys = [asking._model_key(tmp_path / str(n)) for n in range(len(skips))]
    assert keys == ["k" * 64, ["k" * 64, [3]], ["k" * 64, [3, 4]]]


def test_samples_vote_and_are_the_same_when_asked_again(model: Path, tmp_path: Path) -> None:
    asked = benchmark(tmp_path, form="latent", samples=3, temperature=1.0, top_p=0.9, pass_at=[1, 3])
    first = asking.ask_task(recipe(), asked, model, tmp_path / "a").counts
    second = asking.ask_task(recipe(), asked, model, tmp_path / "b").counts
    assert first["results"] == second["results"] and rows(tmp_path / "a") == rows(tmp_path / "b")
    assert first["asked"] == 8
    found = rows(tmp_path / "a")
    assert len(found) == 24 and len({(r["question_id"], r["sample"]) for r in found}) == 24
    assert len({(r["thought"], r["text"]) for r in found}) > 16
    (result,) = first["results"]
    assert result["pass_at"]["1"]["value"] == pytest.approx(result["accuracy"]["value"])
    assert result["accuracy"]["n"] == 8


def test_votes_and_pass_at_k() -> None:
    def row(question: str, sample: int, extracted: str, grade: float) -> dict[str, Any]:
        return {"question_id": question, "sample": sample, "extracted": extracted, "grade": grade, "budget": None,
                "grades": [("m,f", grade)]}  # fmt: skip

    votes = {
        "a": [("4", 0), ("5", 1), ("5", 1)],
        "b": [("[invalid]", 0), ("[invalid]", 0), ("7", 1)],
        "c": [("1", 0), ("2", 1), ("3", 0)],
    }
    given = [row(q, n, *vote) for q, samples in votes.items() for n, vote in enumerate(samples)]
    asked = Benchmark(name="gsm8k", samples=3, temperature=1.0, pass_at=[1, 2, 3])
    (found,) = asking.figures(asked, [given])
    assert found["majority"]["value"] == pytest.approx(2 / 3)  # of equals the first: c is lost
    assert found["accuracy"]["value"] == pytest.approx(np.mean([2 / 3, 1 / 3, 1 / 3]))
    assert found["pass_at"]["2"]["value"] == pytest.approx(np.mean([1, 2 / 3, 2 / 3]))
    assert found["pass_at"]["3"]["value"] == 1
    assert found["accuracy"]["se"] == pytest.approx(statistics.mean([2 / 3, 1 / 3, 1 / 3])[1])


@pytest.mark.parametrize("form", ["cot", "latent"])
def test_what_is_killed_goes_on_and_asks_nothing_twice(model: Path, tmp_path: Path, form: Any) -> None:
    asked, run = benchmark(tmp_path, form=form), TorchEngine.run
    whole = asking.ask_task(recipe(), asked, model, tmp_path / "whole").counts

    def dying(self: TorchEngine, jobs: Any) -> Any:
        for n, result in enumerate(run(self, jobs)):
            if n == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield result

    if (child := os.fork()) == 0:
        TorchEngine.run = dying
        asking.ask_task(recipe(), asked, model, tmp_path / "killed")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with (tmp_path / "killed" / "answered.jsonl").open("ab") as file:
        file.write(b'["gsm8k 5 0 ')  # the line that it was writing
    resumed = asking.ask_task(recipe(), asked, model, tmp_path / "killed").counts
    assert (whole["asked"], resumed["asked"]) == (8, 5)
    assert resumed["results"] == whole["results"]
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert asking.ask_task(recipe(), asked, model, tmp_path / "killed").counts == resumed
    assert not (tmp_path / "killed" / "answered.jsonl").exists()


def test_a_model_without_thought_tokens_is_refused_the_latent_form(tmp_path: Path) -> None:
    plain = benchmarks.save_model(tmp_path / "plain", thinks=False)
    with pytest.raises(UserError, match="the model has no thought tokens"):
        asking.ask_task(recipe(), benchmark(tmp_path, form="latent"), plain, tmp_path / "out")
    found = asking.ask_task(recipe(), benchmark(tmp_path, form="direct"), plain, tmp_path / "direct").counts
    assert found["results"][0]["accuracy"]["n"] == 8


def test_a_chat_template_must_be_there_and_is_for_plain_forms(tmp_path: Path) -> None:
    folder = benchmarks.save_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template: take chat_template from task gsm8k"):
        asking.ask_task(recipe(), benchmark(tmp_path, chat_template=True), folder, tmp_path / "out")
    with pytest.raises(UserError, match="chat_template needs form: direct or cot"):
        resolve({"evaluate": {"tasks": [{"name": "gsm8k", "form": "latent", "chat_template": True}]}})


def test_a_prompt_that_leaves_no_room_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves no room to answer in the model's 4096"):
        asking.ask_task(recipe(), benchmark(tmp_path, max_tokens=4090), model, tmp_path / "out")
