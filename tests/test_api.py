"""The library: what stands in `latent_thoughts`, and the examples that show it."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import latent_thoughts
from latent_thoughts import RunFolder, Sample, Thinker, UserError, api, load_corpus, load_recipe, weigh
from latent_thoughts.config import resolve
from latent_thoughts.store import read_manifest, run_lock

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_every_name_is_there_and_documented() -> None:
    assert set(latent_thoughts.__all__) == {*api.__all__, "__version__"}
    for name in latent_thoughts.__all__:
        assert hasattr(latent_thoughts, name) and name in dir(latent_thoughts)
        assert name == "__version__" or getattr(api, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = latent_thoughts.nothing
    assert (Path(latent_thoughts.__file__).parent / "py.typed").exists()


def test_the_command_and_the_package_import_nothing_heavy() -> None:
    """What `latent-thoughts --help` waits for. Seconds depend on the machine; what is imported does not."""
    code = (
        "import sys; sys.argv = ['latent-thoughts', '--help']\n"
        "from latent_thoughts import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted(m for m in sys.modules if '.' not in m))"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    heavy = {"torch", "transformers", "pyarrow", "scipy", "matplotlib", "pydantic", "fsspec", "datasets"}
    assert "Train language models" in said
    assert not heavy & set(eval(said.splitlines()[-1]))


def test_weigh_agrees_with_arithmetic() -> None:
    found = weigh(np.log([0.02, 0.01, 0.5]), np.log([0.1, 0.1, 0.1]), [True, True, False])
    assert np.allclose(found.shares, [2 / 3, 1 / 3, 0])
    assert found.log_weights[2] == -np.inf
    assert found.bound == pytest.approx(np.log((0.2 + 0.1) / 3))  # the unfinished draw counts in K
    assert found.effective_sample_size == pytest.approx(0.3**2 / (0.2**2 + 0.1**2))
    assert weigh([-1.0], [-1.0]).bound == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([-1.0, -2.0], [-1.0]), "one entry a draw"),
        (([], []), "one entry a draw"),
        (([float("nan")], [-1.0]), "no finite score: give it one, or mark the draw as unfinished"),
    ],
)
def test_weigh_refuses(arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        weigh(*arguments)


def test_load_corpus(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"title": "A", "body": "one."}\n{"title": "B"}\n')
    wanted = {"text": "{title}: {body}", "malformed": "skip"}
    (found,) = load_corpus(str(tmp_path / "rows.jsonl"), **wanted)
    assert found.text == "A: one."
    with pytest.raises(UserError, match=r"rows.jsonl:2: no column body"):
        list(load_corpus(str(tmp_path / "rows.jsonl"), text="{title}: {body}"))
    with pytest.raises(UserError, match=r"unknown key txt \(did you mean text\?\)"):
        load_corpus("x", txt="y")


def test_a_run_folder_does_what_the_commands_do(small: dict[str, Any], tmp_path: Path) -> None:
    """Stage by stage, in the commands' files: the same keys, so that one goes on where the other stopped."""
    small["train"]["steps"], small["em"] = 4, {"iterations": 1, "baselines": []}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small))
    recipe = load_recipe(path)
    run = RunFolder(recipe, tmp_path / "run")
    with pytest.raises(UserError, match="run that stage first"):
        run.sample(1)
    run.prepare()
    run.synthesize()
    run.train()
    counts = run.sample(1).counts
    run.train(1)
    rows = [run.evaluate(n) for n in (0, 1)]
    assert [row["method"] for row in rows] == ["warm_start", "em"]
    assert json.loads((run.folder / "results.json").read_text())["rows"] == rows
    saved = (run.folder / "recipe.yaml").read_text()
    with pytest.warns(UserWarning, match=r"other settings \(train.lr, evaluate.documents\): its recipe.yaml stays"):
        RunFolder(load_recipe(path, ["train.lr=3e-4", "evaluate.documents=4"]), run.folder).evaluate(0)
    assert (run.folder / "recipe.yaml").read_text() == saved  # its models were made with that
    whole = RunFolder(recipe, tmp_path / "whole")
    assert [{**row, "seconds": 0} for row in whole.em()] == [{**row, "seconds": 0} for row in rows]
    assert read_manifest(whole.model(1)).key == read_manifest(run.model(1)).key
    kept = list(run.documents("corpus", iteration=1))
    assert sum(len(t) for d in kept for t in d.thoughts) == counts["kept"] or len(kept) < counts["accepted"]
    assert {d.source for d in run.documents("warm_start", iteration=0)} == {"oracle"}
    assert {d.source for d in run.documents("held_out")} == {"raw"}
    for wrong in ({"split": "corpse"}, {"iteration": 0}):  # its documents are the warm start's
        with pytest.raises(UserError, match="no documents of split corp"):
            list(run.documents(**wrong))  # type: ignore[arg-type]
    for iteration, told in ((0, "is the warm start, which has no E-step"), (2, "beyond em.iterations, which is 1")):
        with pytest.raises(UserError, match=told):
            run.sample(iteration)
    with pytest.raises(UserError, match="no iteration -1"):
        run.train(-1)
    with run_lock(run.folder), pytest.raises(UserError, match="is in use by process"):
        run.prepare()
    thinker, (document,) = Thinker(run.model(1), seed=3), [next(load_corpus("world:castle", limit=1))]
    settings = Sample(k=4, max_thought_tokens=6, max_tokens=64)
    once, again = (thinker.infer([document], settings, recipe.chunking) for _ in range(2))
    assert [d.draw for d in once[0].draws] == [d.draw for d in again[0].draws]
    assert len(once) == 1 and thinker.text(once[0].chunk.ids) == (document.pieces or ("",))[-1]
    assert len(thinker.answer(document.text.split("so ")[0], max_thought_tokens=4, max_answer_tokens=4)) == 2
    for wrong in ({"temperature": -1.0}, {"temperature": np.nan}, {"max_thought_tokens": 0}, {"max_answer_tokens": -1}):
        with pytest.raises(UserError, match="temperature and seed are 0 or more"):
            thinker.answer("dee starts in ", **wrong)
    with pytest.raises(UserError, match="dtype"):
        Thinker(run.model(1), dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is not a model folder"):
        Thinker(tmp_path)
    with pytest.raises(UserError, match="a temperature above 0, not 0"):
        thinker.infer([document], settings, recipe.chunking, temperature=0.0)
    with pytest.raises(UserError, match=r"sample\.raw_model is for runs"):
        thinker.infer([document], Sample(raw_model="raw"))


PROGRAM = """
from latent_thoughts import RunFolder, load_recipe
print("begins")
run = RunFolder(load_recipe("recipe.yaml", ["executor.workers=2", "train.workers=1"]), "run")
run.prepare()
run.synthesize()
print(run.train().counts["step"])
"""


@pytest.mark.parametrize("piped", [False, True], ids=["file", "standard input"])
def test_a_program_needs_no_guard(small: dict[str, Any], tmp_path: Path, piped: bool) -> None:
    """Workers, of either kind, do not import it anew."""
    small["train"]["steps"] = 4
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small))
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-" if piped else "program.py"]
    given = {"input": PROGRAM} if piped else {}
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=240, **given)
    assert done.stdout.split() == ["begins", "4"]


def test_trainings_in_threads_wait_for_each_other(small: dict[str, Any], tmp_path: Path) -> None:
    """They seed torch's generator, of which a process has one; what it held before is there again."""
    small["train"]["steps"] = 6
    recipe = resolve(small)

    def made(name: str) -> bytes:
        run = RunFolder(recipe, tmp_path / name)
        run.prepare()
        run.synthesize()
        run.train()
        return (run.model(0) / "model" / "model.safetensors").read_bytes()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    alone = made("alone")
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(made, ["a", "b"])) == [alone, alone]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(path.read_text().splitlines()) < 60
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path / "here")])
    runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out
    if path.stem == "weigh_thoughts":
        assert said.count("effective sample size") == 5
    elif path.stem == "em_by_hand":
        assert "M_1: accuracy" in said and "kept, the thought in brackets: " in said
    else:
        assert path.stem == "own_corpus"
        assert "2 plus 3 plus 4 ?  [" in said
        held_out = read_manifest(tmp_path / "here" / "run" / "iter_00" / "evaluate").counts
        assert held_out["accuracy"] > 0.3  # of 16 answers; it has learnt to add
