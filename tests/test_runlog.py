"""What a run leaves behind and what it shows."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from latent_thoughts import runlog
from latent_thoughts.config import load_recipe, resolve
from latent_thoughts.runlog import Event, Metrics, record_recipe, save_recipe, sent_to, track
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
    assert "(data.limit)" in record("iter_00/train", train={"lr": 0.2}, data={"limit": 3})
    assert not record("iter_01/train", train={"lr": 0.2}, evaluate={"documents": 9})
    assert not (tmp_path / "recipe.iter_01.train.yaml").exists()
    (tmp_path / "recipe.yaml").write_text("train: {no: 1}")  # perhaps another version's
    assert "(seed, data, chunking, model, train" in record("iter_01/sample", contamination={"n": 9})
    assert (tmp_path / "recipe.yaml").read_text() == "train: {no: 1}"


def test_metrics_drop_what_came_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.write({"step": step, "loss": step / 2})
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    resumed = Metrics(tmp_path, 2)
    resumed.write({"step": 3, "loss": 9.0})
    resumed.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.write({"step": 1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1}
    metrics.close()


def test_progress_goes_to_the_sink_and_ends_at_the_total() -> None:
    events: list[Event] = []
    with sent_to(events.append), track("work", 3, "chunks") as advance:
        for _ in range(3):
            advance(1, loss=2.0)
    assert (events[-1].work, events[-1].done, events[-1].total, events[-1].unit) == ("work", 3, 3, "chunks")
    assert events[-1].figures == "loss 2"


@pytest.mark.parametrize("total", [2.0, float("inf")])
def test_a_terminal_shows_work_with_and_without_an_end(monkeypatch: pytest.MonkeyPatch, total: float) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(runlog, "console", Console(file=screen, force_terminal=True, width=120))
    with track("prepare", total, "documents") as advance:
        advance(1)
        advance(1)
    assert "prepare" in screen.getvalue()


def test_without_a_terminal_one_plain_line_a_piece_of_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runlog, "console", Console(file=io.StringIO(), force_terminal=False))
    with track("train", 2, "steps") as advance:
        advance(1)
        advance(1, loss=1.5)
    assert capsys.readouterr().err == "train: 2 steps loss 1.5\n"


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_resumed_training_goes_on_with_its_tracker_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = pytest.importorskip(kind)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)
    began, init = [], tracker.init
    monkeypatch.setattr(tracker, "init", lambda **settings: began.append(settings) or init(**settings))
    for start in (0, 2):
        with contextlib.closing(Metrics(tmp_path, start, kind)) as metrics:
            for step in (start + 1, start + 2):
                metrics.write({"step": step, "loss": 1 / step})
    assert began[0] == began[1]
    if kind == "trackio":
        run = began[0]["name"]
        logged = tracker.Api().runs("latent-thoughts")
        assert [r.name for r in logged] == [run]
    else:
        assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2  # synced, they are one run: one id
        assert {f.stem for f in tmp_path.glob("wandb/*/run-*.wandb")} == {f"run-{began[0]['id']}"}
