"""The experiments: their grids, their claims, and that a killed one ends with the same verdict."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from latent_thoughts import cli, seeds
from latent_thoughts.config.base import parse
from latent_thoughts.experiment import Claim, Experiment, budget, line_of, named, verdict
from latent_thoughts.stages.report.summary import Results
from latent_thoughts.types import UserError

NAMES = sorted(path.stem for path in seeds.recipe_path("experiments").glob("*.yaml"))
SMALL = [
    "train.steps=20", "train.rows=4", "em.iterations=1", "sample.k=2", "evaluate.documents=8", "evaluate.bound=[1,2]",
    "data.world={documents: 30, teacher_documents: 20, held_out_share: 0.02}",
]  # fmt: skip
VARIANTS = "em.variants={accept_all: {sample: {accept: all}}, three: {sample: {preset: paper, k: 3}}}"


def results(**rows: list[float]) -> Results:
    """Accuracies of methods, one a seed; `em_2` is EM's second iteration, `own` a variant."""
    found: list[dict[str, Any]] = []
    for name, values in rows.items():
        method, _, number = name.partition("_")
        told = {"method": "em", "iteration": int(number), "samples": 16} if method == "em" else {"method": name}
        told = {"method": "em", "iteration": 2, "samples": 16, "variant": name} if name == "own" else told
        found += [{**told, "seed": seed, "accuracy": value} for seed, value in enumerate(values)]
    return Results({}, found, {"sample": {"k": 16}}, "")


def claim(first: str, second: str) -> dict[str, Claim]:
    return {"it": Claim(first=first, second=second)}


def test_a_claim_holds_where_the_paired_interval_is_above_zero() -> None:
    """Differences 0.1, 0.2, 0.3: mean 0.2, standard error 0.1 / sqrt 3, Student's t of two degrees 4.303."""
    there = results(em_1=[0.1, 0.1, 0.1], em_2=[0.6, 0.5, 0.9], oracle=[0.5, 0.3, 0.6], own=[0.6, 0.4, 1.0])
    (found,) = verdict(claim("em", "oracle"), there).values()
    assert found["difference"] == pytest.approx(0.2)
    assert found["ci95"] == pytest.approx([0.2 - 4.3027 * 0.1 / 3**0.5, 0.2 + 4.3027 * 0.1 / 3**0.5], abs=1e-4)
    assert not found["holds"]
    assert found["n_seeds"] == 3
    assert verdict(claim("em", "em 1"), there)["it"]["holds"]
    assert not verdict(claim("em 1", "em"), there)["it"]["holds"]
    assert not verdict(claim("em", "variant own"), there)["it"]["holds"]
    assert verdict(claim("em K=16", "em 1 K=16"), there) == verdict(claim("em", "em 1"), there) | {
        "it": {**verdict(claim("em", "em 1"), there)["it"], "first": "em K=16", "second": "em 1 K=16"}
    }


def test_what_was_not_run_has_no_verdict() -> None:
    there = results(em_1=[0.1, 0.2], oracle=[0.5, 0.6])
    for pair in (("em", "warm_start"), ("em K=4", "oracle"), ("variant own", "oracle"), ("em 2", "oracle")):
        assert verdict(claim(*pair), there) == {}
    assert verdict(claim("em", "oracle"), results(em_1=[0.1], oracle=[0.5])) == {}


def test_seeds_that_happen_to_agree_are_no_proof() -> None:
    """Each gains one of 32 answers. With the answers there is an interval, of 33 and 31 of 64 (Newcombe's); without
    them there is none, and no verdict."""
    there = results(em_1=[0.53125, 0.5], oracle=[0.5, 0.46875])
    assert verdict(claim("em", "oracle"), there) == {}
    for row in there.rows:
        row["accuracy_n"] = 32
    found = verdict(claim("em", "oracle"), there)["it"]
    assert not found["holds"]
    assert found["ci95"] == pytest.approx([-0.13819, 0.19818], abs=1e-4)


def test_a_claim_that_names_no_model() -> None:
    with pytest.raises(UserError, match="'em, K of 4' names no model"):
        line_of("em, K of 4", results(em_1=[0.1]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", ["tiny", "small", "paper"])
def test_what_an_experiment_claims_is_what_it_runs(name: str, size: Any) -> None:
    """Every model that a claim names would be there after the run."""
    found = named(name)
    recipe = found.recipe(size, [])
    last = recipe.em.iterations
    rows: list[dict[str, Any]] = [{"method": m, "iteration": 0} for m in ("warm_start", *recipe.em.baselines)]
    loops = [("em", recipe.sample.k), ("em_paper", 4), *((m, k) for m in ("em", "em_paper") for k in recipe.em.samples)]
    rows += [{"method": m, "samples": k, "iteration": n} for m, k in loops for n in range(1, last + 1)]
    rows += [
        {"method": "em", "samples": 16, "variant": v, "iteration": n}
        for v in recipe.em.variants
        for n in range(1, last + 1)
    ]
    rows += [{"method": "raw", "cell": cell} for cell in found.cells.get(size, {})]
    there = Results({}, [{**row, "seed": 0, "accuracy": 0.5} for row in rows], recipe.model_dump(), "")
    left_out = {
        "tiny": set(),
        "small": {"wrap_baseline", "wrap_cot", "em_paper", "cell raw_8000", "cell raw_32000"},
    }.get(size)
    for told in found.claims.values():
        for text in (told.first, told.second):
            assert line_of(text, there) or left_out is None or text in left_out, text


def test_tokens_are_equalled_in_the_mean_over_seeds() -> None:
    there = results(oracle=[0.5, 0.5])
    for row, tokens in zip(there.rows, (1000, 1003), strict=True):
        row["train_tokens"] = tokens
    assert budget("oracle", there) == ["em.raw.tokens=1002"]
    with pytest.raises(UserError, match="raw_flops was not run, so that no tokens can be equalled"):
        budget("raw_flops", there)


def test_mistakes_are_one_line_each() -> None:
    with pytest.raises(UserError, match="no experiment boostrap .there are ablations, bootstrap"):
        named("boostrap")
    values = {"about": "", "recipes": {"tiny": "castle.yaml"}, "claims": {}}
    with pytest.raises(UserError, match="no size small .it has tiny"):
        parse(Experiment, values, "mine").recipe("small", [])
    with pytest.raises(UserError, match=r"em\.variants\.a: .*unknown key sample\.kk"):
        named("bootstrap").recipe("tiny", ["em.variants={a: {sample: {kk: 3}}}"])
    with pytest.raises(UserError, match=r"em\.variants\.a may change sample, train, em, engine"):
        named("bootstrap").recipe("tiny", ["em.variants={a: {data: {limit: 3}}}"])
    with pytest.raises(UserError, match="becomes a folder's name"):
        named("bootstrap").recipe("tiny", ["em.variants={'../a': {sample: {k: 3}}}"])
    with pytest.raises(UserError, match="becomes a folder's name"):
        named("bootstrap").recipe("tiny", ["em.variants={'..': {sample: {k: 3}}}"])


@pytest.mark.parametrize("setting", ["warm_start: {lr: 1}", "baselines: [raw]", "samples: [2]", "variants: {}"])
def test_a_variant_cannot_change_what_it_shares_with_the_run(setting: str) -> None:
    with pytest.raises(UserError, match=rf"em\.variants\.a cannot change em\.{setting.partition(':')[0]}"):
        named("bootstrap").recipe("tiny", ["em.variants={a: {em: {" + setting + "}}}"])


def test_a_variant_changes_what_it_names_and_nothing_beside_it() -> None:
    recipe = named("ablations").recipe("paper", [])
    changed = recipe.variant("raw_documents_beside").em.mix
    assert recipe.em.mix.warm_start == 0 and changed == recipe.em.mix.model_copy(update={"raw": 0.5})


def test_a_presets_values_replace_those_of_the_recipe() -> None:
    recipe = named("bootstrap").recipe("tiny", [VARIANTS, "sample.temperature=[3, 1]"])
    paper, other = recipe.variant("three").sample, recipe.variant("accept_all").sample
    assert (paper.k, paper.posterior_share, paper.temperature) == (3, 1.0, (1.0, 1.0))
    assert (other.k, other.accept, other.temperature) == (16, "all", (3.0, 1.0))
    assert paper.max_thought_tokens == recipe.sample.max_thought_tokens


def arguments(out: Path) -> list[str]:
    baselines = "em.baselines=[raw_repeat, raw_fresh, wrap_baseline, wrap_cot, warm_start_matched]"
    given = ["synthesize.teacher.kind=data", baselines, VARIANTS, "train.checkpoint_steps=6"]
    return ["experiment", "ablations", *SMALL, *given, "--seeds", "3,4", "--out", str(out)]


def figures(out: Path) -> tuple[Any, Any]:
    rows = json.loads((out / "results.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows], (out / "verdict.json").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("experiment") / "out"
    subprocess.run([sys.executable, "-m", "latent_thoughts.cli", *arguments(out)], check=True, capture_output=True)
    return out


def test_an_experiment_ends_with_rows_a_verdict_and_a_page(finished: Path) -> None:
    rows, told = figures(finished)
    assert [(r["method"], r.get("variant"), r["samples"]) for r in rows if r["seed"] == 3] == [
        ("raw_repeat", None, 0),
        ("raw_fresh", None, 0),
        ("wrap_baseline", None, 0),
        ("wrap_cot", None, 0),
        ("warm_start", None, 0),
        ("warm_start_matched", None, 0),
        ("em", None, 2),
        ("em", "accept_all", 2),
        ("em", "three", 3),
    ]
    claims = json.loads(told)["claims"]
    assert set(claims) == {"em_beats_the_warm_start_trained_as_long", "acceptance_by_gain_helps"}
    assert all(c["n_seeds"] == 2 and c["ci95"][0] <= c["difference"] <= c["ci95"][1] for c in claims.values())
    page = (finished / "report.html").read_text()
    assert "Acceptance by gain helps" in page
    assert "accept all" in page
    assert (finished / "figures" / "variants.svg").exists()


def test_raw_text_and_paraphrases_get_the_tokens_of_the_warm_start(finished: Path) -> None:
    """Budgets are met by whole batches, and no thought is in them."""
    from latent_thoughts.store import read_manifest

    run = finished / "seed_3"
    whole = read_manifest(run / "iter_00" / "train").counts["tokens"]
    for name in ("raw_repeat", "raw_fresh", "wrap_baseline", "wrap_cot"):
        counts = read_manifest(run / "baselines" / name / "train").counts
        assert 0 <= counts["tokens"] - whole < 4 * 64
        assert counts["thought_tokens"] == 0


def test_the_size_of_the_paper_is_planned_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in ([], ["--out", "out"]):
        cli.app(["experiment", "bootstrap", "--size", "paper", *out], result_action="return_value")
        assert "EM 1-3 sample" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_cells_are_runs_on_other_documents(tmp_path: Path) -> None:
    """Of them the baselines' rows are kept, and EM stands beside them in table and page."""
    out, mine = tmp_path / "out", tmp_path / "mine.yaml"
    few = {"em.iterations": 0, "em.baselines": ["raw"]}
    values = {
        "about": "",
        "recipes": {"tiny": "castle.yaml"},
        "equal_tokens": "em",
        "cells": {"tiny": {"few": {**few, "data.world.documents": 20}, "more": {**few, "data.world.documents": 60}}},
        "claims": {"it": {"first": "em", "second": "cell more"}},
    }
    mine.write_text(yaml.safe_dump(values))
    words = ["experiment", str(mine), *SMALL, "em.baselines=[]", "train.steps=5", "--seeds", "3,4", "--out", str(out)]
    words.remove(SMALL[-1])
    words.insert(2, "data.world.documents=30")
    words[3:3] = ["data.world.teacher_documents=20", "data.world.held_out_share=0.02"]
    said = subprocess.run([sys.executable, "-m", "latent_thoughts.cli", *words], check=True, capture_output=True).stdout
    rows, told = figures(out)
    assert [(r["method"], r.get("cell"), r["documents"]) for r in rows if r["seed"] == 3] == [
        ("warm_start", None, 50),
        ("em", None, 50),
        ("raw", "few", 40),
        ("raw", "more", 80),
    ]
    whole = round(sum(r["train_tokens"] for r in rows if r["method"] in ("warm_start", "em")) / 2)
    assert all(0 <= r["train_tokens"] - whole < 4 * 64 for r in rows if r["method"] == "raw")
    assert json.loads(told)["claims"]["it"]["n_seeds"] == 2
    assert b"Raw text" in said
    assert "More raw text" in (out / "report.html").read_text()
    assert (out / "figures" / "accuracy_by_documents.svg").exists()


@pytest.mark.slow
def test_an_experiment_that_is_killed_five_times_gives_the_same_table(finished: Path, tmp_path: Path) -> None:
    chance, out = random.Random(7), tmp_path / "out"
    command = [sys.executable, "-m", "latent_thoughts.cli", *arguments(out)]
    for _ in range(5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(5, 20))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1)  # its workers look for it twice a second
    subprocess.run(command, check=True, capture_output=True)
    assert figures(out) == figures(finished)


def test_a_paraphrase_that_repeats_an_evaluation_set_is_counted_and_removed(tmp_path: Path) -> None:
    from latent_thoughts.config import resolve
    from latent_thoughts.data import records
    from latent_thoughts.em import Run
    from latent_thoughts.store import read_manifest, read_rows
    from tests.conftest import SMALL as RECIPE

    def documents(folder: Path) -> dict[str, Any]:
        manifest = read_manifest(folder)
        rows = [row for name in manifest.shards if "warm" in name for row in read_rows(folder, manifest, name)]
        return {d.id: d for d in map(records.document_of, rows)}

    taken = ["synthesize.teacher.kind=data", f"contamination.sets={{exam: {tmp_path / 'exam.jsonl'}}}"]
    run = Run(
        resolve(json.loads(json.dumps(RECIPE)), [*taken, "contamination.n=9", "contamination.remove=true"]), tmp_path
    )
    (tmp_path / "exam.jsonl").write_text('{"text": "nothing of it"}\n')
    run.prepare()
    before = documents(run.prepared)
    name, text = next((n, d.meta["paraphrases"]["wrap_baseline"]) for n, d in before.items())
    (tmp_path / "exam.jsonl").write_text(json.dumps({"text": text}) + "\n")
    counts = run.synthesize("wrap_baseline").counts
    after = documents(run.synthesized("wrap_baseline"))
    assert after[name] == before[name]
    assert sum(after[n].source == "wrap_baseline" for n in after) > 0
    assert counts["contaminated_thoughts_exam"] >= 1
