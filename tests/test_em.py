"""The whole chain on a tiny castle: every stage, resumption, and the results' schema."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from latent_thoughts.config import resolve
from latent_thoughts.data import pieces, records
from latent_thoughts.em import Loop, Run, _more_samples, _went_through, em
from latent_thoughts.provenance import record_recipe, save_recipe
from latent_thoughts.stages.prepare import initialise
from latent_thoughts.stages.sample import corpus_shards
from latent_thoughts.store import read_manifest
from latent_thoughts.types import Manifest, UserError


def figures(folder: Path) -> list[dict[str, Any]]:
    """The results without the clock's."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    for row in rows:
        del row["seconds"]
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import SMALL

    folder = tmp_path_factory.mktemp("run")
    settings = json.loads(json.dumps(SMALL))
    settings["em"]["baselines"] = ["raw_tokens", "raw_flops", "warm_start_matched", "em_paper", "oracle"]
    settings["em"]["samples"] = [2]
    em(resolve(settings), folder)
    return folder


def test_one_row_for_every_evaluated_model(finished: Path) -> None:
    rows = figures(finished)
    assert [(r["method"], r["iteration"], r["samples"]) for r in rows] == [
        ("raw_tokens", 0, 0),
        ("raw_flops", 0, 0),
        ("warm_start", 0, 0),
        ("warm_start_matched", 0, 0),
        ("em_paper", 1, 2),
        ("em_paper", 2, 2),
        ("em_paper", 1, 4),
        ("em_paper", 2, 4),
        ("em", 1, 2),
        ("em", 2, 2),
        ("em", 1, 4),
        ("em", 2, 4),
        ("oracle", 0, 0),
    ]
    for row in rows:
        assert row["accuracy_n"] == 12
        assert 0 <= row["accuracy"] <= 1
        assert set(row["bound_per_token"]) == {"1", "4"}
        assert row["nll_per_token"] > 0


def test_baselines_are_matched(finished: Path) -> None:
    spent = {r["method"]: r for r in figures(finished) if r["iteration"] in (0, 2)}
    runs = [finished / f"iter_{n:02}" / "train" for n in range(3)]
    totals = [read_manifest(run).counts for run in runs]
    raw = read_manifest(finished / "baselines" / "raw_tokens" / "train").counts
    batch = 4 * 64  # the budget is met by whole batches
    assert 0 <= raw["raw_tokens"] - sum(c["raw_tokens"] for c in totals) < batch
    assert raw["thought_tokens"] == 0
    assert 0 <= spent["raw_flops"]["train_tokens"] - sum(c["tokens"] for c in totals) < batch
    assert spent["warm_start_matched"]["train_steps"] == 90
    assert all(c["thought_tokens"] > 0 for c in totals)


def test_raw_models_have_no_bound_of_their_own(finished: Path) -> None:
    row = figures(finished)[0]
    assert row["bound_per_token"]["1"] == row["bound_per_token"]["4"] == -row["nll_per_token"]


def test_posterior_shards_have_the_documented_columns(finished: Path) -> None:
    folder = finished / "iter_01" / "sample"
    manifest = read_manifest(folder)
    tables = [pq.read_table(folder / n) for n in manifest.shards if n.startswith("posterior-")]
    assert all(t.schema.remove_metadata() == records.POSTERIORS for t in tables)
    rows = [row for t in tables for row in t.to_pylist()]
    assert len(rows) == len({r["doc_id"] for r in rows}) == 40
    chosen = {r["doc_id"]: (tuple(r["draws"][r["chosen"]]["ids"]),) for r in rows if r["chosen"] >= 0}
    documents = [d for _, part in records.shards(folder, "corpus") for d in part]
    assert {d.id: d.thoughts[1] for d in documents} == chosen
    assert manifest.counts["accepted"] == len(chosen)
    for row in rows:
        assert len(row["draws"]) == len(row["log_weights"]) == len(row["gains"]) == 4
        if row["chosen"] >= 0:
            assert row["gains"][row["chosen"]] > 0


def test_no_stage_takes_the_documents_of_another_base_model(tmp_path: Path, small: dict[str, Any]) -> None:
    small["train"]["steps"] = 2
    run = Run(resolve(small), tmp_path)
    run.prepare()
    run.synthesize()
    run.train_warm_start()
    other = Run(run.recipe.model_copy(update={"seed": 9}), tmp_path)
    initialise(other.recipe, other.base)  # and then prepare was stopped
    for work in (other.synthesize, other.train_warm_start):
        with pytest.raises(UserError, match="are of another base model: run .* again"):
            work()
    other.prepare()
    for work in (
        lambda: Loop(other, "em", other.recipe.sample, tmp_path).sample(1),
        lambda: other.evaluate(other.warm_start),
    ):
        with pytest.raises(UserError, match="are of another base model: run prepare again"):
            work()


def test_running_again_computes_nothing(finished: Path, small: dict[str, Any]) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name == "manifest.json"}
    small["em"]["baselines"] = []
    em(resolve(small), finished)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_changed_setting_recomputes_what_depends_on_it(tmp_path: Path, small: dict[str, Any]) -> None:
    small["em"] = {"iterations": 1, "baselines": []}
    small["train"]["steps"] = 5
    em(resolve(small), tmp_path)
    keys = {name: read_manifest(tmp_path / name).key for name in ("iter_00/train", "iter_01/sample", "iter_01/train")}
    small["sample"]["k"] = 2
    em(resolve(small), tmp_path)
    assert read_manifest(tmp_path / "iter_00/train").key == keys["iter_00/train"]
    for name in ("iter_01/sample", "iter_01/train"):
        assert read_manifest(tmp_path / name).key != keys[name]
        assert (tmp_path / f"{name}.{keys[name][:12]}" / "manifest.json").exists()  # set aside, not lost


@pytest.mark.parametrize(
    ("made", "so"),
    [
        ("prepare", True), ("iter_02/train", True), ("iter_03/sample", False),
        ("baselines/oracle/train", True), ("baselines/wrap_cot/synthesize", False),
        ("samples/em_8/iter_01/train", True), ("samples/em_9/iter_01/train", False),
        ("variants/a/iter_01/train", True), ("variants/b/iter_01/train", False),
    ],
)  # fmt: skip
def test_em_settles_the_recipes_of_what_it_went_through(made: str, so: bool) -> None:
    settings = {"iterations": 2, "baselines": ["oracle"], "samples": [8], "variants": {"a": {}}}
    assert _went_through(resolve({"em": settings}), made) == so


def test_what_failed_before_it_prepared_is_not_taken_for_what_did(tmp_path: Path, small: dict[str, Any]) -> None:
    """The recipe of a command that came to nothing has nothing to do with the documents that are there."""
    run = Run(resolve(small), tmp_path)
    record_recipe(run.recipe, tmp_path, run.prepared)
    run.prepare()
    with pytest.raises(UserError, match="does not exist"):
        em(resolve(small, ["contamination.sets={x: /nowhere.jsonl}"]), tmp_path)
    record_recipe(run.recipe, tmp_path, run.warm_start / "synthesize")
    with pytest.raises(UserError, match="prepared with other settings"):
        record_recipe(resolve(small, ["data.world.known_share=0.5"]), tmp_path, run.warm_start / "train")


@pytest.mark.parametrize("steps", [10, 4], ids=["", "its rate has no time to fall"])
def test_continual_regime_goes_on_from_the_last_model(tmp_path: Path, small: dict[str, Any], steps: int) -> None:
    small["em"] = {"iterations": 2, "baselines": [], "regime": "continual", "mix": {"raw": 0.5}}
    small["train"] |= {"steps": steps, "warmup_steps": 2, "log_steps": 1}
    em(resolve(small), tmp_path)
    assert (tmp_path / "iter_01/train/stable/state.json").exists()
    shards = [set(read_manifest(tmp_path / f"iter_0{n}/sample").shards) for n in (1, 2)]
    assert shards[0] and shards[1] and not shards[0] & shards[1]  # fresh slices
    seen = ["iter_00/synthesize warm_start", "iter_01/sample corpus", "iter_02/sample corpus"]
    for number in (0, 1, 2):  # what is searched for the questions of tasks
        found = Run(resolve(small), tmp_path)._trained_on(tmp_path / f"iter_{number:02}")
        assert sorted(found.keys() - {"warm_start", "corpus"}) == seen[: number + 1]
    written = [(tmp_path / f"iter_0{n}/train/metrics.jsonl").read_text().splitlines() for n in (1, 2)]
    rates = [[json.loads(line)["lr"] for line in lines] for lines in written]
    assert rates[0][0] < rates[0][1] and rates[1][0] == max(rates[1])  # it is warmed up once


def test_more_iterations_than_slices_are_refused_by_the_first(tmp_path: Path, small: dict[str, Any]) -> None:
    small["em"] = {"iterations": 9, "baselines": [], "regime": "continual"}
    small["train"]["steps"] = 2
    with pytest.raises(UserError, match="holds 4 corpus shards, too few for 9 iterations"):
        em(resolve(small), tmp_path)
    assert not (tmp_path / "iter_01/train").exists()


def test_an_iteration_of_the_continual_regime_has_its_own_documents_forms_and_start(
    tmp_path: Path, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small["em"] = {"iterations": 2, "baselines": [], "regime": "continual", "mix": {"raw": 1.0}}
    loop = Loop(run := Run(resolve(small), tmp_path), "em", resolve(small).sample, tmp_path)
    asked = []
    monkeypatch.setattr(Run, "train", lambda self, config, sources, folder, **how: asked.append((sources, how)))
    loop.train(1)
    loop.train(2)
    run.prepare()
    manifest = read_manifest(run.prepared)
    raw = [[n for s in sources if s.folder == run.prepared for n in s.names(manifest)] for sources, _ in asked]
    assert raw[0] and raw[1] and not set(raw[0]) & set(raw[1])  # fresh slices of raw text too
    assert asked[0][1]["base"] == tmp_path / "iter_00/train"
    assert asked[1][1]["continue_from"] == tmp_path / "iter_01/train"
    assert len({how["seed"] for _, how in asked} | {run.recipe.seed}) == 3


def test_a_sweep_over_k_changes_k_alone_and_does_nothing_twice(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small["sample"] |= {"temperature": [1.5, 1.2], "k": 4}
    small["em"] = {"baselines": ["em_paper"], "samples": [2, 4, 8]}
    made: list[tuple[str, Any]] = []
    monkeypatch.setattr(Loop, "rows", lambda self: made.append((self.method, self.config)) or iter(()))
    list(_more_samples(Run(recipe := resolve(small), tmp_path)))
    assert [(m, c.k) for m, c in made] == [("em", 2), ("em_paper", 2), ("em", 8), ("em_paper", 8)]
    assert all(c == recipe.sample.model_copy(update={"k": c.k}) for m, c in made if m == "em")


STAGES = ["base", "prepare", "iter_00/synthesize", "iter_01/sample"]
TRAINED = ["iter_00", "iter_01", "baselines/raw_tokens"]


def test_killed_at_every_commit_equals_undisturbed(tmp_path: Path, small: dict[str, Any]) -> None:
    """SIGKILL in the middle of every stage, again and again; the same command gives the same results."""
    small["em"] = {"iterations": 1, "baselines": ["raw_tokens"]}
    small["data"]["shard_documents"] = 24
    small["train"] |= {"steps": 8, "checkpoint_steps": 5}
    em(resolve(json.loads(json.dumps(small))), tmp_path / "undisturbed")
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "killed"
    recipe.write_text(yaml.safe_dump(small))
    script, deaths = Path(__file__).with_name("killing.py"), tmp_path / "deaths"
    command = [sys.executable, str(script), str(deaths), "em", str(recipe), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    killed = {Path(line).relative_to(out) for line in deaths.read_text().splitlines() if line.startswith(str(out))}
    stages = [*STAGES, *(f"{folder}/{stage}" for folder in TRAINED for stage in ("train", "evaluate"))]
    assert {str(path.parent) for path in killed} >= set(stages)
    assert {Path("iter_01/sample/posterior-00001.parquet"), Path("iter_01/train/checkpoint_000005")} <= killed
    assert {Path("results.json"), Path("report.html")} <= killed
    assert figures(out) == figures(tmp_path / "undisturbed")


@pytest.mark.slow
def test_killed_by_the_clock_equals_undisturbed(tmp_path: Path, small: dict[str, Any]) -> None:
    """Another process ends it by SIGKILL at moments nobody chose."""
    small["em"] = {"iterations": 1, "baselines": []}
    em(resolve(json.loads(json.dumps(small))), tmp_path / "undisturbed")
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "killed"
    recipe.write_text(yaml.safe_dump(small))
    command = [sys.executable, "-m", "latent_thoughts.cli", "em", str(recipe), "--out", str(out)]
    for more in (0.4, 0.9):  # seconds after the run folder has moved on
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        before = len(list(out.rglob("*.json")))
        while len(list(out.rglob("*.json"))) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(more)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert figures(out) == figures(tmp_path / "undisturbed")


def test_an_m_step_is_packed_of_pieces_made_while_the_e_step_ran(
    tmp_path: Path, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(resolve(small), tmp_path)
    run.prepare()
    run.synthesize()
    run.train_warm_start()
    loop = Loop(run, "em", run.recipe.sample, tmp_path)
    thoughts = {n: told["sha256"] for n, told in loop.sample(1).shards.items() if n.startswith("corpus-")}
    assert {path.name for path in loop.ahead(1).iterdir()} == set(thoughts.values())
    read, original = list[str](), pieces.checked_table

    def checked(folder: Path, manifest: Any, name: str) -> Any:
        read.append(f"{folder.name}/{name}")
        return original(folder, manifest, name)

    monkeypatch.setattr(pieces, "checked_table", checked)
    loop.train(1)
    assert read and not {f"sample/{name}" for name in thoughts} & set(read)
    assert not loop.ahead(1).exists()


def test_an_m_step_is_mixed_of_what_the_recipe_says(tmp_path: Path, small: dict[str, Any]) -> None:
    """Thoughts left out, raw text mixed in: the model sees no thought but the warm start's."""
    small["em"] = {"iterations": 1, "baselines": [], "mix": {"warm_start": 0, "thoughts": 0, "raw": 0.5}}
    small["train"] |= {"steps": 5}
    em(resolve(small), tmp_path)
    counts = read_manifest(tmp_path / "iter_01" / "train").counts
    assert counts["thought_tokens"] == 0 and counts["raw_tokens"] > 0
    assert read_manifest(tmp_path / "iter_00" / "train").counts["thought_tokens"] > 0


def test_an_e_step_without_a_finished_thought_ends_the_run(tmp_path: Path, small: dict[str, Any]) -> None:
    small["em"] |= {"baselines": [], "warm_start": {"steps": 90}}
    small["sample"] |= {"preset": "paper", "max_thought_tokens": 1}
    for _ in range(2):  # the same command says the same
        with pytest.raises(UserError, match="iter_01.*none of 160 thoughts came to an end"):
            em(resolve(small), tmp_path)
        assert not (tmp_path / "iter_01" / "train").exists()


def test_a_corpus_without_documents_is_told_by_the_settings_that_left_none(tmp_path: Path) -> None:
    manifest = Manifest("prepare", "k", {"warm_start-00000.parquet": {"rows": 3, "sha256": ""}}, {})
    with pytest.raises(UserError, match=r"holds no corpus: .* lower data\.warm_start or data\.held_out"):
        corpus_shards(manifest, tmp_path, 1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"evaluate": {"answer": "reply is (.*)"}}, "evaluate.answer does not match"),
        (
            {"data": {"world": {"documents": 40, "teacher_documents": 20, "held_out_share": 0}}},
            "no document is held out",
        ),
        ({"sample": {"max_tokens": 20}}, "do not fit in 20"),
        ({"em": {"variants": {"on": {"em": {"regime": "continual", "iterations": 9}}}}}, "too few for 9 iterations"),
        ({"em": {"variants": {"short": {"sample": {"max_tokens": 20}}}}}, "do not fit in 20"),
    ],
    ids=str,
)
def test_what_a_later_stage_would_refuse_is_told_before_anything_is_trained(
    tmp_path: Path, small: dict[str, Any], changes: dict[str, Any], told: str
) -> None:
    for section, values in changes.items():
        small[section] |= values
    with pytest.raises(UserError, match=told):
        em(resolve(small), tmp_path / "run")
    assert not list((tmp_path / "run").glob("iter_*/train"))


def test_an_em_run_beside_the_main_one_that_comes_to_nothing_leaves_the_others(
    tmp_path: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {
        "short": {"sample": {"preset": "paper", "max_thought_tokens": 1}},
        "strict": {"sample": {"margin": 1e6}, "em": {"mix": {"warm_start": 0}}},
        "sound": {"sample": {"accept": "all"}},
    }
    small["em"] |= {"iterations": 1, "baselines": [], "warm_start": {"steps": 90}, "variants": variants}
    small["train"]["steps"] = 5
    for _ in range(2):  # the same command says the same
        rows = em(resolve(small), tmp_path)
        assert [(r["method"], r.get("variant")) for r in rows] == [("warm_start", None), ("em", None), ("em", "sound")]
        told = json.loads((tmp_path / "results.json").read_text())["run"]["ended"]
        assert "short" in told[0] and "none of 160 thoughts came to an end" in told[0]
        assert "strict" in told[1] and "none of 160 thoughts was accepted" in told[1] and len(told) == 2
        said = capsys.readouterr().err
        assert all(reason in said for reason in told)


def test_gains_against_a_raw_model_that_the_run_trains(tmp_path: Path, small: dict[str, Any]) -> None:
    """Draws are the same; what they are measured against is what the raw model gives the text, and nothing else."""
    small["train"]["steps"] = 15
    run = Run(resolve(small), tmp_path / "run")
    run.prepare()
    run.synthesize()
    run.train_warm_start()
    own = Loop(run, "em", run.recipe.sample, tmp_path / "own")
    raw = Loop(run, "em", run.recipe.sample.model_copy(update={"raw_model": "raw"}), tmp_path / "raw")
    told = [loop.sample(1).counts for loop in (own, raw)]
    assert told[0]["ess"] == told[1]["ess"]
    assert told[0]["raw_logprob"] != told[1]["raw_logprob"]
    trained = run.baseline("raw") / "train"
    given = run.recipe.sample.model_copy(update={"raw_model": str(trained)})
    assert Loop(run, "em", given, tmp_path / "given").sample(1).counts["raw_logprob"] == told[1]["raw_logprob"]
    assert read_manifest(trained).counts["thought_tokens"] == 0


def test_a_variants_raw_model_leaves_the_runs_own_in_place(tmp_path: Path, small: dict[str, Any]) -> None:
    small["train"]["steps"] = 5
    small["em"] |= {"iterations": 1, "baselines": [], "raw": {"steps": 3}}
    small["sample"] |= {"raw_model": "raw", "accept": "all", "rejected": "raw"}
    small["em"]["variants"] = {"same": {"sample": {"k": 2}}, "hot": {"train": {"lr": 1e-3}}}
    em(resolve(small), tmp_path)
    own = [path.relative_to(tmp_path) for path in tmp_path.glob("**/baselines/raw/train/manifest.json")]
    assert sorted(map(str, own)) == [f"{home}baselines/raw/train/manifest.json" for home in ("", "variants/hot/")]
    assert not list(tmp_path.glob("baselines/raw/train.*"))


def test_a_whole_run_leaves_no_recipe_of_a_single_stage(tmp_path: Path, small: dict[str, Any]) -> None:
    """What a stage command was given once would else be taken for what documents and thoughts were made with."""
    small["em"] |= {"iterations": 0, "baselines": []}
    small["train"]["steps"] = 3
    other = resolve(small, ["data.limit=70", "chunking.max_tokens=300"])
    for stage in ("prepare", "iter_00.synthesize"):
        save_recipe(other, tmp_path, f"recipe.{stage}.yaml")
    recipe = resolve(small)
    em(recipe, tmp_path)
    assert [path.name for path in tmp_path.glob("recipe*")] == ["recipe.yaml"]
    assert not record_recipe(recipe, tmp_path, tmp_path / "iter_01" / "sample")


def test_no_m_step_is_beyond_the_iterations(tmp_path: Path, small: dict[str, Any]) -> None:
    run = Run(resolve(small), tmp_path / "run")
    loop = Loop(run, "em", run.recipe.sample, run.folder)
    with pytest.raises(UserError, match="is beyond em.iterations"):
        loop.train(run.recipe.em.iterations + 1)
