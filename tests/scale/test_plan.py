"""Plans against what the stages then count, and against the paper's own figures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
import torch

from latent_thoughts import model as models
from latent_thoughts.config import Data, load_recipe, resolve
from latent_thoughts.config import Plan as Settings
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.em import Loop, Run
from latent_thoughts.scale import measure
from latent_thoughts.scale.estimate import as_dict, estimate, show
from latent_thoughts.scale.plan import DEVICES, Shape, Work, works
from latent_thoughts.scale.survey import _rows, survey
from latent_thoughts.store import read_manifest
from latent_thoughts.types import UserError
from tests.conftest import tiny

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def run(small: dict[str, Any], tmp_path: Path) -> Run:
    made = Run(resolve(small), tmp_path)
    made.prepare()
    made.synthesize()
    return made


def stages(run: Run) -> dict[str, Any]:
    tokenizer, _ = models.load_tokenizer(run.base / "model")
    found = survey(run.recipe, Codec(tokenizer))
    return {w.stage: w for w in works(run.recipe, found, Shape.of(models.load(run.base / "model", run.recipe.model)))}


def test_a_survey_of_all_documents_counts_what_prepare_counts(run: Run) -> None:
    tokenizer, _ = models.load_tokenizer(run.base / "model")
    found, counts = survey(run.recipe, Codec(tokenizer)), run.prepare().counts
    for name, split in found.splits.items():
        assert split.documents == counts[f"{name}_documents"]
        assert split.raw_tokens == counts[f"{name}_tokens"]


def test_the_tokens_of_training_and_of_the_e_step_are_as_planned(run: Run) -> None:
    planned = stages(run)
    trained = run.train_warm_start().counts
    assert planned["iter_00/train"].train_tokens == pytest.approx(trained["tokens"], rel=0.15)
    share = planned["iter_00/train"].raw_tokens / planned["iter_00/train"].train_tokens
    assert share == pytest.approx(trained["raw_tokens"] / trained["tokens"], rel=0.05)  # BOS and EOS are not text
    sampled = Loop(run, "em", run.recipe.sample, run.folder).sample(1).counts
    most = sampled["draws"] * (run.recipe.sample.max_thought_tokens + 1)
    assert 0 < planned["iter_01/sample"].decode_tokens <= most
    assert sampled["chunks"] == run.prepare().counts["corpus_documents"]


def test_the_raw_model_of_a_run_is_planned_as_it_is_trained_and_once(run: Run) -> None:
    def planned(*overrides: str) -> list[Work]:
        tokenizer, _ = models.load_tokenizer(run.base / "model")
        recipe = resolve(run.recipe.model_dump(mode="json"), ["em.baselines=[]", *overrides])
        shape = Shape.of(models.load(run.base / "model", recipe.model))
        found = works(recipe, survey(recipe, Codec(tokenizer)), shape)
        return [w for w in found if w.stage == "baselines/raw/train"]

    trained = read_manifest(run.train_raw()).counts["tokens"]
    own = "em.variants={own: {sample: {raw_model: raw}}}"
    for overrides in (["em.baselines=[raw]"], ["sample.raw_model=raw"], [own], ["em.baselines=[raw]", own]):
        (work,) = planned(*overrides)
        assert work.train_tokens == pytest.approx(trained, rel=0.15)
    assert planned() == []


def planned_for(name: str, *overrides: str) -> dict[str, Work]:
    plan = estimate(load_recipe(RECIPES / f"{name}.yaml", ["plan.device=h100", *overrides]))
    names = [work.stage for work in plan.works]
    assert len(names) == len(set(names))
    return {work.stage: work for work in plan.works}


def test_paraphrases_cost_what_their_teacher_does() -> None:
    given = ["em.baselines=[wrap_cot]", "synthesize.teacher.model=m", "synthesize.prices={input: 1, output: 2}"]
    asked = planned_for("castle", *given)["baselines/wrap_cot/synthesize"]
    assert asked.asked_tokens > 0 and asked.replied_tokens > 0
    assert asked.money == pytest.approx((asked.asked_tokens + 2 * asked.replied_tokens) / 1e6, rel=1e-3)
    free = planned_for("castle", *given, "synthesize.teacher.kind=data")["baselines/wrap_cot/synthesize"]
    assert (free.asked_tokens, free.money) == (0, 0) and free.bytes == asked.bytes


def test_more_samples_are_planned_in_both_presets_and_none_twice() -> None:
    """The castle's own E-step has K = 16, the paper's 4."""
    given = ["em.iterations=1", "em.samples=[4, 16]", "sample.temperature=[3, 1]"]

    def more(*overrides: str) -> set[str]:
        return {name.split("/")[1] for name in planned_for("castle", *given, *overrides) if name.startswith("samples/")}

    assert more("em.baselines=[]") == {"em_4", "em_paper_4", "em_paper_16"}
    assert more("em.baselines=[em_paper]") == {"em_4", "em_paper_16"}
    assert more("em.baselines=[em_paper]", "sample.k=8", "sample.last_k=4") == {"em_4", "em_16", "em_paper_16"}
    done = planned_for("castle", *given, "em.baselines=[]")
    four, paper = (done[f"samples/{name}_4/iter_01/sample"] for name in ("em", "em_paper"))
    assert four.decode_tokens == paper.decode_tokens == done["iter_01/sample"].decode_tokens / 4
    assert four.encode_tokens > paper.encode_tokens  # draws from the prior are scored under the posterior too


def test_the_same_e_step_in_both_presets_is_planned_once() -> None:
    given = ["em.iterations=1", "em.samples=[2]", "sample={preset: paper, max_thought_tokens: 10, max_tokens: 64}"]
    done = planned_for("castle", *given, "em.baselines=[]")
    assert {name.split("/")[1] for name in done if name.startswith("samples/")} == {"em_2"}


def test_the_matched_warm_start_is_planned_by_steps() -> None:
    """Of its own batches, which may be smaller than EM's."""
    done = planned_for("castle", "em.iterations=2", "em.warm_start={steps: 100, rows: 2}", "train.rows=8")
    warm, matched = (done[name].train_tokens for name in ("iter_00/train", "baselines/warm_start_matched/train"))
    assert matched == pytest.approx(warm / 100 * (100 + 400 + 400))


def test_models_of_raw_text_do_not_think() -> None:
    done = planned_for("castle", "em.baselines=[raw_tokens, oracle]")
    raw, oracle = (done[f"baselines/{name}/evaluate"] for name in ("raw_tokens", "oracle"))
    assert 0 < raw.decode_tokens < oracle.decode_tokens / 4  # the answers alone
    assert 0 < raw.encode_tokens < oracle.encode_tokens
    scored = planned_for("castle", "em.baselines=[]", "evaluate.bound=[1]")["iter_00/evaluate"].encode_tokens
    one = planned_for("castle", "em.baselines=[]", "evaluate.bound=[2]")["iter_00/evaluate"].encode_tokens - scored
    assert scored - one > 3 * raw.encode_tokens  # three likelihoods, and the prompts of the draws
    without = planned_for("castle", "em.baselines=[raw_tokens]", "evaluate.answer=null")[
        "baselines/raw_tokens/evaluate"
    ]
    assert without.decode_tokens == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "deepseek_v3"])
def test_a_shape_counts_every_parameter(kind: str) -> None:
    model = tiny(kind)
    assert Shape.of(model).parameters == sum(p.numel() for p in model.parameters())


def test_a_token_is_multiplied_with_the_experts_that_it_is_sent_to() -> None:
    """Two of four, of 32 x 32 and 32 x 16 weights each."""
    shape = Shape.of(tiny("deepseek_v3"))
    all_of_them = dataclasses.replace(shape, idle=0.0)
    assert all_of_them.forward(1, 0, True) - shape.forward(1, 0, True) == 2 * 2 * (32 * 32 + 32 * 16)


@pytest.mark.parametrize(
    "settings",
    [{"raw_share": 1.0}, {"raw_share": 0.5}, {"raw_chunks": 0.5}, {"layout": "thoughts"}, {"layout": "raw"}],
    ids=str,
)
def test_what_is_seen_raw_is_planned_so(run: Run, settings: dict[str, Any]) -> None:
    recipe = resolve(
        run.recipe.model_dump(mode="json") | {"train": {"epochs": 20, "rows": 2, "sequence_length": 64} | settings}
    )
    changed = Run(recipe, run.folder)
    planned = stages(changed)["iter_00/train"]
    trained = changed.train_warm_start(run.folder / "changed").counts
    assert planned.train_tokens == pytest.approx(trained["tokens"], rel=0.12)
    assert planned.raw_tokens == pytest.approx(trained["raw_tokens"], rel=0.12, abs=1)


def test_a_continual_iteration_mixes_in_its_own_part_of_the_corpus() -> None:
    settings = ["em.regime=continual", "em.iterations=4", "em.baselines=[]", "train.steps=null", "train.epochs=1"]
    with_raw = planned_for("castle", *settings, "em.mix={warm_start: 1, thoughts: 1, raw: 1}")
    without = planned_for("castle", *settings, "em.mix={warm_start: 1, thoughts: 1, raw: 0}")
    added = [with_raw[f"iter_0{n}/train"].train_tokens - without[f"iter_0{n}/train"].train_tokens for n in range(1, 5)]
    raw = planned_for("castle", "em.baselines=[raw]", "train.steps=null", "train.epochs=1")["baselines/raw/train"]
    assert sum(added) < raw.train_tokens  # all parts together are the corpus, without the warm start's documents


@pytest.mark.parametrize("name", ["paper/warm_start", "paper/bootstrap"])
def test_plans_of_the_paper_agree_with_it(name: str) -> None:
    """480 M raw tokens for the warm start, of which 240 M are seen in 0.8 B; 1.92 B for EM, seen twice in 13 B."""
    plan = as_dict(estimate(load_recipe(RECIPES / f"{name}.yaml")))
    done: Any = {w["stage"]: w for w in plan["stages"]}  # pyright: ignore
    raw: Any = plan["raw_tokens"]
    assert plan["parameters"] == pytest.approx(1.1e9, rel=0.1)
    assert raw["warm_start"] == pytest.approx(480e6, rel=0.1)
    assert done["iter_00/synthesize"]["replied_tokens"] == pytest.approx(2.3 * 480e6, rel=0.1)
    assert done["iter_00/synthesize"]["money"] > 100
    assert done["iter_00/train"]["raw_tokens"] == pytest.approx(240e6, rel=0.1)
    if name == "paper/bootstrap":
        assert raw["corpus"] == pytest.approx(1.92e9, rel=0.1)
        assert done["iter_01/train"]["train_tokens"] == 13e9
        assert done["iter_01/train"]["raw_tokens"] == pytest.approx(3.84e9, rel=0.1)
        assert done["iter_01/sample"]["decode_tokens"] == pytest.approx(4 * 2.3 * 1.92e9, rel=0.1)


def test_the_plan_of_the_castle_measures_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    few = ["em.baselines=[]", "data.world.documents=60", "data.world.teacher_documents=40", "evaluate.documents=20"]
    plan = estimate(load_recipe(RECIPES / "castle.yaml", few))
    show(plan, tmp_path / "plan.json")
    out = capsys.readouterr().out
    assert "measured now" in out and "longest pole" in out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["device"]["train"] > 0 and [w["stage"] for w in written["stages"]][:2] == [
        "prepare",
        "iter_00/train",
    ]


def test_brackets_in_a_teachers_name_are_no_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    show(estimate(load_recipe(RECIPES / "paper/warm_start.yaml", ["synthesize.teacher.model='a[/b]'"])))
    said = capsys.readouterr().out
    assert "Teacher: a[/b] reads" in said and "for 465 USD (synthesize.prices)" in said


@pytest.mark.parametrize(("width", "heads"), [
    (50, ["Stage", "Trained", "Time", "USD"]),
    (60, ["Stage", "Trained", "Hours", "Time", "USD", "Disk"]),
    (80, ["Stage", "Trained", "Encoded", "Drawn", "Hours", "Time", "USD", "Disk"]),
])  # fmt: skip
def test_narrow_terminals_cut_no_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, heads: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    show(estimate(load_recipe(RECIPES / "paper/warm_start.yaml")))
    said = capsys.readouterr().out
    assert said.splitlines()[2].split() == heads
    assert "1.84 B" in said and "63.2 min" in said and "…" not in said


def test_small_amounts_and_single_iterations_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["em.baselines=[]", "em.iterations=1", "plan.device=h100", "plan.devices=2", "data.world.documents=60"]
    show(estimate(load_recipe(RECIPES / "castle.yaml", few)))
    said = capsys.readouterr().out
    assert "EM 1 train" in said and "1-1" not in said
    assert "<0.01" in said and "e-0" not in said


def test_documents_are_counted_where_they_are_too_many_to_read(tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    rooms = ("cellar", "den", "attic", "hall", "tower", "gallery", "library")
    texts = [" . ".join(f"dee starts in {room}" for room in walk) for walk in itertools.product(rooms, repeat=5)][:3000]
    file.write_text("".join(json.dumps({"text": f"{text} ."}) + "\n" for text in texts))
    values = {"data": {"source": str(file), "held_out": 0.1, "warm_start": 0.2}, "model": {"base": {}}}
    found = survey(
        resolve(values), Codec(models.base_tokenizer(load_recipe(RECIPES / "castle.yaml").model, "world:castle", 0))
    )
    assert sum(split.documents for split in found.splits.values()) == pytest.approx(3000, rel=0.05)
    assert found.splits["corpus"].read < 1000
    apart = tmp_path / "apart.jsonl"
    apart.write_text(file.read_text().replace("dee starts", "dee ends"))
    values["data"] |= {"held_out_source": str(apart), "limit": 500}  # type: ignore[index]
    apart = survey(
        resolve(values), Codec(models.base_tokenizer(load_recipe(RECIPES / "castle.yaml").model, "world:castle", 0))
    ).splits
    assert (apart["held_out"].documents, apart["corpus"].documents + apart["warm_start"].documents) == (3000, 500)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("count", [40, 1000, 60_000, 200_000])
def test_rows_of_a_packed_file_are_counted(tmp_path: Path, suffix: str, count: int) -> None:
    """By its first 4 MB where there are more, else to its end."""
    rng, path = random.Random(0), tmp_path / f"many.jsonl{suffix}"
    with pa.CompressedOutputStream(str(path), {".gz": "gzip", ".zst": "zstd"}[suffix]) as file:
        file.write("".join(json.dumps({"text": rng.randbytes(40).hex()}) + "\n" for _ in range(count)).encode())
    assert _rows(Data(source=str(path)), path) == pytest.approx(count, rel=0.05 if count == 200_000 else 0)


def test_what_prepare_leaves_out_as_malformed_is_not_planned(tmp_path: Path) -> None:
    """A word that the tokenizer does not know."""
    texts = [f"dee starts in {room} ." for room in ("cellar", "den", "attic", "hall", "tower")]
    lines = [json.dumps({"text": text}) + "\n" for text in (*texts, "xyzzy", *texts)]  # and those that repeat others
    (tmp_path / "few.jsonl").write_text("".join(lines))
    codec = Codec(models.base_tokenizer(load_recipe(RECIPES / "castle.yaml").model, "world:castle", 0))
    data = {"source": str(tmp_path / "few.jsonl"), "held_out": 0.1, "warm_start": 0.2}
    found = survey(resolve({"data": {**data, "malformed": "skip"}, "model": {"base": {}}}), codec)
    assert sum(split.documents for split in found.splits.values()) == 5
    with pytest.raises(UserError, match="xyzzy"):
        survey(resolve({"data": data, "model": {"base": {}}}), codec)


def test_a_question_with_two_solutions_is_two_documents_of_the_warm_start(tmp_path: Path) -> None:
    """As in prepare, which drops what repeats text and thought."""
    walk = {"q": "dee starts in cellar . ", "a": "so dee ends in den ."}
    lines = [{**walk, "z": thought} for thought in ("east den ", "west den ", "east den ")]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"source": str(tmp_path / "few.jsonl"), "pieces": ["{q}", "{a}"], "thought": "{z}", "held_out": 0}
    codec = Codec(models.base_tokenizer(load_recipe(RECIPES / "castle.yaml").model, "world:castle", 0))
    found = survey(resolve({"data": {**data, "warm_start": 1.0}, "model": {"base": {}}}), codec)
    assert found.splits["warm_start"].documents == 2


def test_what_is_not_at_hand_must_be_told(tmp_path: Path) -> None:
    told = {"plan": {"documents": 10, "tokens": 100}, "model": {"base": str(tmp_path / "nothing")}}
    with pytest.raises(UserError, match=r"nothing.*plan\.model"):
        estimate(resolve(told))


def test_every_device_that_may_be_named_is_known() -> None:
    assert {"auto", *DEVICES} == set(get_args(Settings.model_fields["device"].annotation))
    recipe = load_recipe(RECIPES / "paper/warm_start.yaml", ["plan.price=7"])
    plan = estimate(recipe)
    assert measure.device(recipe, plan.found, plan.shape).price == 7


@pytest.mark.parametrize(("half", "train"), [(440e9, 220e9), (2300e9, 414e9)])  # an EPYC's, and with a matrix unit
def test_a_cpu_with_a_matrix_unit_is_not_expected_to_reach_half_of_it(
    half: float, train: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "matmul_peak", lambda _, dtype: half if dtype == torch.bfloat16 else 200e9)
    recipe = load_recipe(RECIPES / "paper/warm_start.yaml", ["plan.device=auto", "model.device=cpu"])
    plan = estimate(recipe)
    assert measure.device(recipe, plan.found, plan.shape).train == pytest.approx(train)


def test_a_peak_is_in_flops() -> None:
    found = models.matmul_peak(torch.device("cpu"), torch.float32)
    assert 1e9 < found < 1e13  # FLOP/s, not GFLOP/s
