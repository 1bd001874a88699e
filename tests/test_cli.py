"""The command line: every verb on a tiny run, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from latent_thoughts import cli
from latent_thoughts.cli import stages
from latent_thoughts.cli.made import table
from latent_thoughts.data.tokenizer import word_tokenizer
from latent_thoughts.seeds import recipe_path
from latent_thoughts.terminal import output


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the command as `main` does; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["latent-thoughts", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def recipe(tmp_path: Path, small: dict[str, Any]) -> Path:
    small["train"]["steps"] = 8
    small["em"] = {"iterations": 1, "baselines": []}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small))
    return path


VERBS = "demo experiment prepare synthesize prompts sample train evaluate compare em plan".split()
VERBS += "report watch doctor export ask".split()


@pytest.mark.parametrize("verb", VERBS)
def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert call(monkeypatch, verb, "--help") == 0
    said = capsys.readouterr().out
    assert f"latent-thoughts {verb}" in said and "ANYWHERE" not in said.upper()
    assert "--empty-" not in said and "--no-" not in said
    for name in cli.app[verb].assemble_argument_collection():
        assert name.parameter.help, f"{verb} does not say what {name.name} is"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out of memory"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
    ],
)
def test_the_machines_limits_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    def app() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    assert call(monkeypatch, "em") == 1
    line = capsys.readouterr().err
    assert said in line and "run the same command again" in line and line.count("\n") == 1


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "run_of", stopped)
    assert call(monkeypatch, "prepare", "r.yaml", "--out", str(tmp_path / "run")) == 130
    assert "run the same command again to go on" in capsys.readouterr().err


def test_libraries_show_no_bars_of_their_own() -> None:
    """Such as that of transformers for a GGUF file, which is tqdm's as it is."""
    program = "import contextlib; from latent_thoughts.cli import main\n"
    program += "with contextlib.suppress(SystemExit): main()\n"
    program += "from tqdm.auto import tqdm; list(tqdm(range(3)))"
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    command = [sys.executable, "-c", program, "--version"]
    assert subprocess.run(command, env=environment, check=True, capture_output=True).stderr == b""


def test_help_names_every_experiment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "experiment", "--help") == 0
    said = capsys.readouterr().out
    for path in recipe_path("experiments").glob("*.yaml"):
        assert path.stem in said


def test_stage_by_stage_equals_em(monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path) -> None:
    one, whole, name = str(tmp_path / "one"), str(tmp_path / "whole"), str(recipe)
    for command in (
        ["prepare"], ["synthesize"], ["train"], ["evaluate"],
        ["sample", "--iteration", "1"], ["train", "--iteration", "1"], ["evaluate", "--iteration", "1"],
    ):  # fmt: skip
        assert call(monkeypatch, command[0], name, "--out", one, *command[1:]) == 0
    assert call(monkeypatch, "em", name, "--out", whole) == 0
    for stage in ("iter_00/train", "iter_00/evaluate", "iter_01/sample", "iter_01/train", "iter_01/evaluate"):
        a, b = (json.loads((Path(run) / stage / "manifest.json").read_text()) for run in (one, whole))
        assert a["key"] == b["key"]
        assert {**a["counts"], "seconds": 0} == {**b["counts"], "seconds": 0}
    saved = (tmp_path / "one" / "recipe.yaml").read_text()
    assert call(monkeypatch, "evaluate", name, "train.lr=3e-4", "evaluate.documents=4", "--out", one) == 0
    assert (tmp_path / "one" / "recipe.yaml").read_text() == saved  # its models were made with that
    assert "documents: 4" in (tmp_path / "one" / "recipe.iter_00.evaluate.yaml").read_text()
    assert (tmp_path / "whole" / "report.html").exists()
    assert call(monkeypatch, "report", whole) == 0


def test_what_a_stage_says_of_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In words, with units; sums that are no news stay in the manifest."""
    counts: dict[str, Any] = {
        "chunks": 400.0, "draws": 6400.0, "draw_tokens": 41155.0, "ess": 900.2, "mean_ess": 2.2504, "mean_gap": 6e-7,
        "accepted_share": 0.46, "gain_per_token": -0.13704, "seconds": 75.2, "repeated": {},
    }  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    output().print(table(tmp_path / "sample", counts))
    said = {line.strip() for line in capsys.readouterr().out.splitlines()}
    for name, value in (
        ("chunks", "400"), ("thoughts drawn", "6,400"), ("effective sample size", "2.25 thoughts a chunk"),
        ("chunks with an accepted thought", "46.0 %"), ("gain of accepted thoughts", "−0.137 nats a token"),
        ("time", "1:15"),
    ):  # fmt: skip
        assert any(line.split("  ")[0] == name and line.endswith(f"  {value}") for line in said)
    assert not any("draw_tokens" in line or "900" in line for line in said)
    marks = {"bound_4_per_token": -0.5, "bound_16_per_token": -0.4, "accuracy": 0.12, "accuracy_se": 0.0327}
    rows = dict(table(tmp_path / "evaluate", marks).rows)
    assert rows == {"right answers": "12.0 ± 3.3 %", "bound L₁₆": "−0.400 nats a token"}
    rows = table(tmp_path / "prepare", {"corpus_documents": 1200, "repeated": {}}).rows
    assert rows == [("corpus documents", "1,200")]


def test_ask_shows_thought_and_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    for verb in ("prepare", "synthesize", "train"):
        assert call(monkeypatch, verb, str(recipe), "--out", run) == 0
    capsys.readouterr()
    question = "dee starts in cellar . 1 east 2 west . "
    limits = ["--max-thought-tokens", "6", "--max-answer-tokens", "6"]
    assert call(monkeypatch, "ask", f"{run}/iter_00/train", question, *limits) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", ["m[lr=3]", "m[/x]"])
def test_brackets_in_a_path_are_no_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path, name: str
) -> None:
    assert call(monkeypatch, "prepare", str(recipe), "--out", str(tmp_path / name)) == 0
    assert f"{name}/prepare" in "".join(capsys.readouterr().out.split("\n")[:4])  # a long path takes several lines


def test_a_terminal_is_not_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Neither by a model's text nor by a corpus that an error quotes."""
    hostile = "a\tb\n\x1b]0;owned\x07\x1b[2J\x9b2J\x7f\rc"
    monkeypatch.setattr("latent_thoughts.ask.ask", lambda *_: (hostile, hostile))
    assert call(monkeypatch, "ask", str(tmp_path), "why?") == 0
    assert capsys.readouterr().out == "a       b\n]0;owned[2J2Jc\n" * 2  # rich sets a tab as spaces
    assert call(monkeypatch, "report", str(tmp_path / hostile)) == 1
    assert not set(capsys.readouterr().err) & set("\x1b\x07\x9b\x7f\r")


def mistakes(tmp_path: Path, small: dict[str, Any]) -> dict[str, tuple[dict[str, Any], list[str], str]]:
    """Name: (recipe, arguments, what the line says)."""
    lines = tmp_path / "bad.jsonl"
    lines.write_text('{"text": ""}\n{"text": \n')
    long = {**small, "sample": {**small["sample"], "max_tokens": 20}}
    word_tokenizer(["so "]).save_pretrained(tmp_path / "tokenizer")
    model = {**small["model"], "tokenizer": str(tmp_path / "tokenizer")}
    corpus = {**small, "chunking": {}, "model": model}
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "llama"}')
    return {
        "unknown key": (small, ["train.stepz=3"], "unknown key train.stepz (did you mean train.steps?)"),
        "bad value": (small, ["train.lr=fast"], "train.lr"),
        "override without value": (small, ["train.lr"], "must look like section.key=value"),
        "missing file": (corpus, ["data.source=nowhere.jsonl"], "nowhere.jsonl does not exist"),
        "malformed line": (corpus, [f"data.source={lines}"], f"{lines}:2: not valid JSON"),
        "no tokenizer": (small, [f"model.base={bare}", "model.tokenizer=null"], "cannot load a tokenizer"),
        "chunk too long": (long, [], "do not fit in 20"),
        "unknown world": (small, ["data.source=world:forest"], "no built-in world 'forest'"),
    }


NAMES = ["unknown key", "bad value", "override without value", "missing file", "malformed line", "no tokenizer",
         "chunk too long", "unknown world"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    small: dict[str, Any],
    name: str,
) -> None:
    settings, overrides, expected = mistakes(tmp_path, small)[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**settings, "em": {"iterations": 1}, "train": {**small["train"], "steps": 1}}))
    assert call(monkeypatch, "em", str(path), *overrides, "--out", str(tmp_path / "run")) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latent-thoughts:")]
    assert len(said) == 1
    assert expected in said[0]


def test_other_mistakes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, expected in (
        (["em", str(tmp_path / "no.yaml"), "--out", str(tmp_path)], "no.yaml does not exist"),
        (["demo", "--seeds", "0,x", "--out", str(tmp_path)], "--seeds must be whole numbers"),
        (["ask", str(tmp_path), "why?"], "is not a model folder"),
        (["experiment", "bootstrap"], "--out is missing"),
        (["demo", "--seeds", "0,1,0", "--out", str(tmp_path)], "--seeds has 0 more than once"),
        (["report", str(tmp_path)], "results.json"),
    ):
        assert call(monkeypatch, *arguments) == 1
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "iteration", "expected"),
    [
        ("sample", "0", "iteration 0 is the warm start, which has no E-step"),
        ("sample", "2", "iteration 2 is beyond em.iterations, which is 1"),
        ("train", "-1", "there is no iteration -1: 0 is the warm start"),
        ("evaluate", "-1", "there is no iteration -1: 0 is the warm start"),
    ],
)
def test_an_iteration_that_there_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path,
    verb: str, iteration: str, expected: str,
) -> None:  # fmt: skip
    assert call(monkeypatch, verb, str(recipe), "--out", str(tmp_path / "run"), f"--iteration={iteration}") == 1
    assert expected in capsys.readouterr().err


def test_a_stage_without_its_input_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path
) -> None:
    assert call(monkeypatch, "sample", str(recipe), "--out", str(tmp_path / "run")) == 1
    assert "run that stage first" in capsys.readouterr().err
