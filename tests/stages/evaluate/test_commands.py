"""`latent-thoughts evaluate` and `compare` from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from latent_thoughts import examine
from latent_thoughts.config import resolve
from latent_thoughts.store import write_json
from tests.stages.evaluate import benchmarks
from tests.test_cli import call

pytest.importorskip("lm_eval")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    task = {"name": "gsm8k", "form": "direct", "data": benchmarks.gsm8k(tmp_path / "data"), "shots": 1, "max_tokens": 5}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"threads": 1, "evaluate": {"tasks": [task, {**task, "form": "cot"}]}}))
    return path


def test_any_model_can_be_asked_and_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path
) -> None:
    model = benchmarks.save_model(tmp_path / "model", thinks=False)
    outs = [str(tmp_path / name) for name in ("a", "b")]
    for out in outs:
        assert call(monkeypatch, "evaluate", str(recipe), "--model", str(model), "--out", out) == 0
    shown = capsys.readouterr().out
    assert "gsm8k" in shown and "±" in shown
    first, second = (json.loads((Path(out) / "results.json").read_text()) for out in outs)
    (row,) = first["rows"]
    assert row["method"] == f"model {model}" and [t["form"] for t in row["tasks"]] == ["direct", "cot"]
    for mine, other in zip(row["tasks"], second["rows"][0]["tasks"], strict=True):
        assert mine["results"] == other["results"]
    assert call(monkeypatch, "evaluate", str(recipe), "--model", str(model), "--out", outs[0]) == 0
    assert json.loads((Path(outs[0]) / "results.json").read_text())["rows"] == [row]
    assert (Path(outs[0]) / "tasks" / "gsm8k-cot").exists() or list((Path(outs[0]) / "tasks").glob("gsm8k-cot-*"))
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "200")
    assert call(monkeypatch, "compare", *outs) == 0
    assert capsys.readouterr().out.count("no difference shown") == 2


def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path
) -> None:
    plain = benchmarks.save_model(tmp_path / "plain", thinks=False)
    (tmp_path / "nothing").mkdir()
    out = ["--out", str(tmp_path / "out")]
    cases: list[tuple[list[Any], str]] = [
        (["evaluate", str(recipe), "--model", str(tmp_path / "nothing"), *out], "is not a model folder"),
        (["evaluate", str(recipe), "evaluate.tasks=[]", "--model", str(plain), *out], "evaluate.tasks is empty"),
        (
            ["evaluate", str(recipe), "evaluate.tasks=[{name: gsm8k, data: nowhere}]", "--model", str(plain), *out],
            "nowhere does not exist",
        ),
        (
            ["evaluate", str(recipe), f"evaluate.tasks=[{{name: gsm8k, data: {tmp_path / 'data'}}}]",
             "--model", str(plain), *out],
            "the model has no thought tokens",
        ),
        (["evaluate", str(recipe), "evaluate.tasks=[{name: gsm8k, samples: 4}]", *out], "set a temperature"),
        (["compare", str(tmp_path)], "name two folders at least"),
        (["compare", str(tmp_path / "nothing"), str(tmp_path / "nothing")], "holds no evaluation"),
    ]  # fmt: skip
    for arguments, expected in cases:
        assert call(monkeypatch, *arguments) == 1, arguments
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latent-thoughts:")]
        assert len(said) == 1 and expected in said[0]


def test_a_row_takes_the_place_of_that_of_the_same_model_alone(tmp_path: Path) -> None:
    own = {"method": "em", "iteration": 1, "samples": 4, "seed": 0, "accuracy": 0.1}
    others = [{**own, "variant": "paper"}, {**own, "cell": "few"}, {**own, "seed": 1}, {**own, "samples": 16}]
    write_json(tmp_path / "results.json", {"run": {"seeds": [0]}, "rows": [own, *others]})
    examine.record(resolve({}), tmp_path, again := {**own, "accuracy": 0.2})
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == [*others, again]


def test_models_by_name_do_not_answer_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(model: str, tokenizer: None, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(model)

    monkeypatch.setattr(examine.models, "load_plain", lambda config: (config.base, None))
    monkeypatch.setattr(examine.models, "save", save)
    monkeypatch.setattr(examine, "complete", lambda folder: (folder / "config.json").exists())
    monkeypatch.setattr(examine, "ask", lambda _, model, folder: [{"by": (model / "config.json").read_text()}])
    recipe = resolve({"evaluate": {"tasks": [{"name": "gsm8k", "form": "cot"}]}})
    (file := tmp_path / "a.gguf").write_bytes(b"1")
    for model in ("org/a", "org/b", "org/a", str(file)):
        assert examine.evaluate_model(recipe, model, tmp_path / "out") == [{"by": model}]
    file.write_bytes(b"2")  # another model under the same name
    examine.evaluate_model(recipe, str(file), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*"))) == 4
