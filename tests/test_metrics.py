"""metrics.jsonl and trackers."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from latent_thoughts.metrics import Metrics


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
