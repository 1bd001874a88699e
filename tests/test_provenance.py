"""What a run says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latent_thoughts.config import Model, Train, load_recipe, resolve
from latent_thoughts.provenance import model_card, record_recipe, save_recipe, unplaced
from latent_thoughts.store import write_json
from latent_thoughts.types import UserError


@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "seed": 7,
            "data": {
                "source": "x/*.jsonl",
                "extract": {"answer": "(?s)^(?P<a>.*)\n#### \"ä'\\d: #"},
                "pieces": ["{q}\n", " {a}: 'x'"],
                "thought": "{a}",
            },
            "model": {"base": {"hidden_size": 8, "rms_norm_eps": 1e-5, "rope": None, "name": "1e-5"}},
            "sample": {"preset": "paper", "k": 2, "margin": -1.5},
            "train": {"steps": 5, "lr": 3e-4},
            "em": {"warm_start": {"epochs": 2.5, "lr": 1e-5}, "baselines": []},
        },
    ],
)
def test_the_saved_recipe_is_the_recipe(tmp_path: Path, values: dict[str, Any]) -> None:
    recipe = resolve(values)
    save_recipe(recipe, tmp_path / "run")
    saved = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert saved == recipe
    assert saved.warm_start_train == recipe.warm_start_train
    assert saved.model_dump() == recipe.model_dump()
    text = (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8")
    assert f"# seed: {recipe.seed}\n" in text
    assert "# torch: " in text
    save_recipe(recipe, tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text("seed: 3  # my own\n")
    with pytest.raises(UserError, match="keep your own recipe outside the run folder"):
        save_recipe(recipe, tmp_path / "run")


def test_a_single_stages_recipe_replaces_none_that_others_were_made_with(tmp_path: Path) -> None:
    def record(made: str, **values: Any) -> str:
        return record_recipe(resolve(values), tmp_path, tmp_path / made)

    def finished(stage: str) -> None:
        write_json(tmp_path / stage / "manifest.json", {})

    def saved(name: str = "recipe.yaml") -> float:
        return load_recipe(tmp_path / name).train.lr

    assert not record("prepare")
    finished("prepare")
    assert not record("iter_00/train", train={"lr": 0.1}, engine={"sequences": 8})  # which prepare does not depend on
    assert saved() == 0.1
    finished("iter_00/train")
    assert not record("iter_00/train", train={"lr": 0.2})  # is made anew
    assert saved() == 0.2
    told = record("iter_01/train", train={"lr": 0.3}, sample={"k": 2})
    assert "(train.lr)" in told and "recipe.iter_01.train.yaml" in told  # no E-step is finished yet
    assert (saved(), saved("recipe.iter_01.train.yaml")) == (0.2, 0.3)
    assert "(data.limit)" in record("iter_00/train", train={"lr": 0.2}, data={"limit": 3})  # a part, for a trial
    assert not record("iter_00/train", train={"lr": 0.2}, em={"baselines": ["oracle"]})  # which no stage depends on
    for wrong in ({"data": {"text": "{body}"}}, {"model": {"base": "other"}}, {"chunking": {"max": 9}}):
        with pytest.raises(UserError, match=r"was prepared with other settings \((data|model|chunking)\.\w+\)"):
            record("iter_00/train", train={"lr": 0.2}, **wrong)
    assert "recipe.tasks.yaml" in record("tasks", model={"base": "other"})  # which asks a model that is no stage's
    (tmp_path / "prepare" / "settings.yaml").write_text("data: {text: '{body}'}")  # prepared anew since
    record("iter_00/train", train={"lr": 0.2}, data={"text": "{body}"})
    with pytest.raises(UserError, match=r"or give .*prepare/settings.yaml"):
        record("iter_00/train", train={"lr": 0.2})
    (tmp_path / "prepare" / "settings.yaml").unlink()
    with pytest.raises(UserError, match=r"other settings \(model.new_tokens\)"):
        record("iter_00/train", train={"lr": 0.2}, model={"new_tokens": "mean"})
    free = {"train": {"lr": 0.2, "skip": [3], "micro_rows": 1}, "model": {"device": "cpu"}}  # no result depends on it
    assert not record("iter_01/sample", **free)
    finished("iter_00/evaluate")
    assert not record("iter_01/sample", **free, sample={"k": 8})  # by which nothing finished was made
    told = record("iter_01/sample", **free, engine={"kind": "vllm"}, sample={"context_chunks": 1})
    assert "(engine.kind, sample.context_chunks)" in told
    (tmp_path / "iter_00/evaluate/manifest.json").unlink()
    assert not record("iter_01/train", train={"lr": 0.2}, evaluate={"documents": 9})
    assert not (tmp_path / "recipe.iter_01.train.yaml").exists()
    (tmp_path / "recipe.yaml").write_text("train: {no: 1}")  # perhaps another version's
    assert "(seed, data, chunking, model, train" in record("iter_01/sample", contamination={"n": 9})
    assert (tmp_path / "recipe.yaml").read_text() == "train: {no: 1}"


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("/home/me/models/tiny", "tiny"),
        ("s3://bucket/models/tiny/", "tiny"),
        ("~/tiny", "tiny"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ({"model_type": "gpt2"}, "gpt2 from scratch"),
    ],
)
def test_a_models_card_does_not_tell_where_its_base_lies(base: Any, shown: str) -> None:
    card = model_card(Train(), Model(base=base, tokenizer="world"), {}, 0)
    assert f"Continued pretraining of `{shown}` on" in card
    assert "/home" not in card and "bucket" not in card


def test_a_name_that_is_a_folder_here_is_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert unplaced("models/tiny") == "models/tiny" and unplaced("models/tiny", is_place=True) == "tiny"
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert unplaced("models/tiny") == "tiny"
    assert unplaced("corpus/part-?.jsonl", is_place=True) == "part-?.jsonl"
    assert unplaced("é" * 200) == "é" * 200  # too long for a file's name, in bytes
    assert unplaced("hub:a/b", is_place=True) == "hub:a/b" and unplaced("disk:/data/set") == "set"
