"""The M-step: budgets, resumption to the bit, checkpoints, and what stops a run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from latent_thoughts import model as models
from latent_thoughts import stages
from latent_thoughts.config import Train, resolve
from latent_thoughts.data.corpus import Corpus, Source
from latent_thoughts.data.records import DOCUMENTS
from latent_thoughts.em import Run
from latent_thoughts.parallel import Ranks
from latent_thoughts.stages.train import checkpoint, corpus, loader, set_up
from latent_thoughts.stages.train.checkpoint import read_state
from latent_thoughts.stages.train.figures import multiplied
from latent_thoughts.stages.train.loop import learning_rate
from latent_thoughts.stages.train.trainer import Diverged, Trainer
from latent_thoughts.store import Stage, read_manifest
from latent_thoughts.types import Chunk, Interrupted, ThoughtDocument, UserError
from tests.conftest import tiny


@pytest.fixture
def run(tmp_path: Path, small: dict[str, Any]) -> Run:
    run = Run(resolve(small), tmp_path)
    run.prepare()
    run.synthesize()
    return run


def sources(run: Run) -> list[Source]:
    return [Source(run.warm_start / "synthesize", "warm_start")]


def trainer(run: Run, **settings: Any) -> Trainer:
    config = run.recipe.train.model_copy(update=settings)
    corpus.write(sources(run), run.folder / "documents.arrow")
    return set_up(config, run.recipe.model, run.base, run.folder, 0, Ranks())


def next_batch(t: Trainer) -> loader.Batch:
    return next(loader.load(t.batches, Ranks()))


def train(run: Run, folder: Path, **settings: Any) -> Any:
    config = Train.model_validate({**run.recipe.train.model_dump(exclude_unset=True), **settings})
    return run.train(config, sources(run), folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "train" / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def curve(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "train" / "metrics.jsonl").read_text().splitlines())
    clock = ("seconds", "tokens_per_second", "mfu", "memory_gb")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def killed_at(run: Run, folder: Path, *steps: int, **settings: Any) -> None:
    """Ends training with an error at these steps, one after the other."""

    class Killed(Exception):
        pass

    original = Trainer.step
    for step in steps:

        def step_or_die(self: Trainer, batch: Any, rate: float, step: int = step) -> Any:
            if self.counters.step == step:
                raise Killed
            return original(self, batch, rate)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "step", step_or_die)
            with pytest.raises(Killed):
                train(run, folder, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_rows": 3},
        {"ema": 0.9},
        {"held_out": 5, "export": "best"},
        {"optimizer": "adamw", "keep": 2},
        pytest.param({"compile": "whole", "dropout": 0.2}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_resumed_training_equals_uninterrupted_training(run: Run, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Interrupted right after a checkpoint and in between: same weights to the bit, same loss curve."""
    train(run, tmp_path / "whole", **settings)
    killed_at(run, tmp_path / "parts", 10, 17, **settings)
    train(run, tmp_path / "parts", **settings)
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert len([line for line in curve(tmp_path / "whole") if "loss" in line]) == 6


def test_the_number_of_workers_changes_nothing_also_on_resume(run: Run, tmp_path: Path) -> None:
    train(run, tmp_path / "whole")
    killed_at(run, tmp_path / "parts", 13, workers=2)
    killed_at(run, tmp_path / "parts", 24, workers=1)
    train(run, tmp_path / "parts", workers=3)
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")


def test_without_workers_no_process_is_started_for_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.resource_tracker, "ensure_running", None)
    assert next_batch(trainer(run)).documents


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_model_with_a_parameter_that_gets_no_gradient_is_resumed(
    run: Run, tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the tower for images of a model that also knows text."""
    load = models.load

    def with_idle(*given: Any, **named: Any) -> Any:
        model = load(*given, **named)
        model.register_parameter("idle", torch.nn.Parameter(torch.ones(3, 3)))
        return model

    monkeypatch.setattr(models, "load", with_idle)
    train(run, tmp_path / "whole", optimizer=optimizer)
    killed_at(run, tmp_path / "parts", 17, optimizer=optimizer)
    train(run, tmp_path / "parts", optimizer=optimizer)
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert torch.equal(weights(tmp_path / "parts")["idle"], torch.ones(3, 3))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_before_the_first_step_changes_nothing(run: Run, tmp_path: Path, optimizer: str) -> None:
    found = []
    for saves in (False, True):
        t = trainer(run, optimizer=optimizer)
        if saves:
            t.save(tmp_path / "first")
        batches = loader.load(t.batches, Ranks())
        for _ in range(3):
            t.step(next(batches), 1.0)
        found.append([p.detach() for p in t.objective.parameters()])
    assert all(map(torch.equal, *found))


@pytest.fixture
def command(run: Run, small: dict[str, Any]) -> tuple[list[str], Path]:
    """A warm start as a process of its own, in the run's folder; and its train stage."""
    recipe = run.folder / "mine.yaml"
    recipe.write_text(yaml.safe_dump(small))
    arguments = ["-m", "latent_thoughts.cli", "train", str(recipe), "--out", str(run.folder)]
    return [sys.executable, *arguments], run.warm_start / "train"


def wait_for_step(folder: Path, process: subprocess.Popen[Any], step: int) -> None:
    metrics = folder / "metrics.jsonl"
    while process.poll() is None:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.01)


def test_sigkill_and_sigterm_and_the_same_command_again(
    run: Run, command: tuple[list[str], Path], tmp_path: Path
) -> None:
    """SIGTERM saves, exits 0 and says how to go on; after SIGKILL the last checkpoint is gone on from."""
    arguments, folder = command
    settings = ["train.steps=300", "train.log_steps=1", "train.checkpoint_steps=40"]
    for number, step in ((signal.SIGTERM, 50), (signal.SIGKILL, 130)):
        process = subprocess.Popen(
            [*arguments, *settings], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        wait_for_step(folder, process, step)
        os.kill(process.pid, number)
        error = process.communicate()[1]
        if number == signal.SIGTERM:
            assert process.returncode == 0, error
            assert "training stopped at step" in error
            assert "resume with: latent-thoughts train " in error and "train.steps=300" in error
            assert checkpoint.found(folder)
    subprocess.run([*arguments, *settings], check=True, capture_output=True)
    train(run, tmp_path / "whole", steps=300, log_steps=1, checkpoint_steps=40)
    assert same(run.warm_start, tmp_path / "whole")
    assert curve(run.warm_start) == curve(tmp_path / "whole")


def test_sigterm_to_all_processes_of_a_job(run: Run, command: tuple[list[str], Path]) -> None:
    """As `timeout` and schedulers send it: the workers that lay batches out get it too."""
    arguments, folder = command
    settings = ["train.steps=3000", "train.log_steps=1", "train.checkpoint_steps=5000", "train.workers=2"]
    process = subprocess.Popen(
        [*arguments, *settings], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    wait_for_step(folder, process, 20)
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    (left,) = checkpoint.found(folder)
    assert f"training stopped at step {int(left.name.rpartition('_')[2])}; resume with" in error


def test_sigterm_before_the_first_step_and_behind_the_last(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sends_first(function: Any) -> Any:
        def sends(*given: Any, **named: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return function(*given, **named)

        return sends

    before = signal.getsignal(signal.SIGTERM)
    train(run, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "write", sends_first(corpus.write))
        with pytest.raises(Interrupted, match="training stopped at step 0"):
            train(run, tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(models, "save", sends_first(models.save))
        with pytest.raises(Interrupted, match="stopped when training was done"):
            train(run, tmp_path / "parts")
    assert (tmp_path / "parts" / "train" / "manifest.json").exists()
    assert same(tmp_path / "whole", tmp_path / "parts") and signal.getsignal(signal.SIGTERM) == before


def test_an_export_that_fails_costs_no_step(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(run, tmp_path / "whole", held_out=5, checkpoint_steps=7)
    with monkeypatch.context() as patch:
        patch.setattr(models, "save", None)
        with pytest.raises(TypeError):
            train(run, tmp_path / "parts", held_out=5, checkpoint_steps=7)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", None)
        train(run, tmp_path / "parts", held_out=5, checkpoint_steps=7)
    assert same(tmp_path / "whole", tmp_path / "parts") and curve(tmp_path / "whole") == curve(tmp_path / "parts")


def test_sigterm_in_the_last_step_does_not_change_which_checkpoint_is_best(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"held_out": 5, "export": "best", "checkpoint_steps": 7, "optimizer": "adamw", "lr": 0.003}
    train(run, tmp_path / "whole", **settings)
    step = Trainer.step

    def sends_in_the_last(self: Trainer, batch: Any, rate: float) -> Any:
        if self.counters.step == 29:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, rate)

    monkeypatch.setattr(Trainer, "step", sends_in_the_last)
    with pytest.raises(Interrupted):
        train(run, tmp_path / "parts", **settings)
    train(run, tmp_path / "parts", **settings)
    assert same(tmp_path / "whole", tmp_path / "parts") and curve(tmp_path / "whole") == curve(tmp_path / "parts")


def processes(nodes: int, script: list[str], arguments: list[str]) -> str:
    """Two processes by torchrun, on one machine or on two; what they wrote to standard error."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        str(nodes),
        "--nproc-per-node",
        str(2 // nodes),
    ]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", *script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # two, whatever GPUs there are
    started = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(nodes)
    ]
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert all(process.returncode == 0 for process in started), errors[0][-3000:]
    return "".join(errors)


@pytest.mark.parametrize(
    "nodes", [pytest.param(1, id="full"), pytest.param(2, id="hybrid over two machines", marks=pytest.mark.slow)]
)
def test_two_processes_equal_one(run: Run, tmp_path: Path, small: dict[str, Any], nodes: int) -> None:
    """torchrun, gloo, FSDP2: the same losses over 50 steps, with either optimizer; and the same averages looked at."""
    small["train"] |= {
        "dropout": 0.0,
        "steps": 50,
        "log_steps": 1,
        "checkpoint_steps": 20,
        "micro_rows": 1,
        "lr": 0.003,
    }
    small["train"] |= (
        {"shard": "full", "optimizer": "muon", "ema": 0.9, "held_out": 5}
        if nodes == 1
        else {"shard": "hybrid", "optimizer": "adamw"}
    )
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(small))
    processes(nodes, ["-m", "latent_thoughts.cli"], ["train", str(recipe), "--out", str(tmp_path)])
    run.train(resolve(small).train, sources(run), tmp_path / "one")
    ours, theirs = curve(tmp_path / "one"), curve(run.warm_start)
    held_out = [[line["held_out_loss"] for line in lines if "held_out_loss" in line] for lines in (ours, theirs)]
    assert len(held_out[0]) == (3 if nodes == 1 else 0) and held_out[0] == pytest.approx(held_out[1], abs=1e-4)
    ours, theirs = ([line for line in lines if "loss" in line] for lines in (ours, theirs))
    assert len(ours) == len(theirs) == 50
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-3)
        assert (a["tokens"], a["epoch"], a["fill"]) == (b["tokens"], b["epoch"], pytest.approx(b["fill"]))
    one, other = weights(tmp_path / "one"), weights(run.warm_start)
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [None, "blocks"], ids=["plain", "compiled"])
def test_two_processes_equal_one_in_half_precision(tmp_path: Path, small: dict[str, Any], compiled: str | None) -> None:
    small["train"] |= {
        "optimizer": "adamw",
        "dropout": 0.0,
        "steps": 20,
        "log_steps": 1,
        "checkpoint_activations": True,
    }
    small["train"] |= {"compile": compiled}
    small["model"] |= {"dtype": "bfloat16"}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(small))
    for out in ("one", "two"):
        made = Run(resolve(small), tmp_path / out)
        made.prepare()
        made.synthesize()
    Run(resolve(small), tmp_path / "one").train_warm_start()
    processes(1, ["-m", "latent_thoughts.cli"], ["train", str(recipe), "--out", str(tmp_path / "two")])
    one, two = (curve(Run(resolve(small), tmp_path / out).warm_start) for out in ("one", "two"))
    assert len(one) == len(two) == 20 and one[-1]["loss"] < one[0]["loss"] - 0.3
    assert all(a["loss"] == pytest.approx(b["loss"], abs=0.03) for a, b in zip(one, two, strict=True))


def test_a_checkpoint_of_two_processes_is_read_by_one_and_by_two(
    run: Run, tmp_path: Path, small: dict[str, Any]
) -> None:
    """Two stop at step 12, one goes on to step 21, two finish; the losses are those of one process undisturbed.

    Only the main process looks for checkpoints, and the last batch has passes without a row.
    """
    del small["train"]["steps"]
    small["train"] |= {"optimizer": "adamw", "dropout": 0.0, "epochs": 11, "log_steps": 1, "checkpoint_steps": 10}
    small["train"] |= {"micro_rows": 1, "schedule": "wsd", "held_out": 5, "export": "best"}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(small))
    run.train(resolve(small).train, sources(run), tmp_path / "whole")
    script, arguments = str(Path(__file__).with_name("stopping.py")), ["train", str(recipe), "--out", str(tmp_path)]
    assert "stopped at step 12; resume with" in processes(1, [script, "12"], arguments)
    assert checkpoint.found(run.warm_start / "train")[-1].name == "checkpoint_000012"
    done = subprocess.run([sys.executable, script, "21", *arguments], check=True, capture_output=True, text=True)
    assert "stopped at step 21; resume with" in done.stderr
    processes(1, [script, "999"], arguments)
    for a, b in zip(curve(tmp_path / "whole"), curve(run.warm_start), strict=True):
        figure = "loss" if "loss" in a else "held_out_loss"
        assert a["step"] == b["step"] and a[figure] == pytest.approx(b[figure], abs=1e-5)
    counts = read_manifest(run.warm_start / "train").counts
    assert counts["epoch"] == 11 and counts["exported_step"]


@pytest.mark.slow
def test_a_run_in_a_store_trains_on_two_machines_and_goes_on_with_one(
    bucket: Path, tmp_path: Path, small: dict[str, Any]
) -> None:
    """Each machine puts its part of a checkpoint; another number of processes goes on from there."""
    small["train"] |= {"optimizer": "adamw", "dropout": 0.0, "steps": 20, "log_steps": 1, "checkpoint_steps": 10}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(small))
    for folder in (tmp_path / "whole", bucket):
        made = Run(resolve(small), folder)
        made.prepare()
        made.synthesize()
    whole, run = (Run(resolve(small), folder) for folder in (tmp_path / "whole", bucket))
    whole.train_warm_start()
    script, arguments = str(Path(__file__).with_name("stopping.py")), ["train", str(recipe), "--out", str(bucket)]
    assert "stopped at step 12; resume with" in processes(2, [script, "12"], arguments)
    last = checkpoint.found(run.warm_start / "train")[-1]
    assert last.name == "checkpoint_000012"
    assert len(list(last.glob("*.distcp"))) == 2
    run.train_warm_start()
    for a, b in zip(curve(whole.warm_start), curve(run.warm_start), strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert checkpoint.found(run.warm_start / "train") == []


def test_the_last_checkpoints_and_the_best_are_kept(run: Run, tmp_path: Path) -> None:
    settings = {"held_out": 5, "checkpoint_steps": 5, "keep": 2}
    killed_at(run, tmp_path / "a", 28, **settings)
    kept = checkpoint.found(tmp_path / "a" / "train")
    losses = {line["step"]: line["held_out_loss"] for line in curve(tmp_path / "a") if "held_out_loss" in line}
    assert sorted(losses) == [5, 10, 15, 20, 25]
    best = min(losses, key=lambda step: losses[step])
    assert {path.name for path in kept} == {f"checkpoint_{step:06}" for step in {best, 20, 25}}


def test_the_best_checkpoint_is_exported(run: Run, tmp_path: Path) -> None:
    """A rate that ruins the model later on: the best is not the last, and equals a run that ended there."""
    settings = {"held_out": 5, "checkpoint_steps": 5, "schedule": "constant", "optimizer": "adamw", "lr": 0.02}
    train(run, tmp_path / "best", export="best", **settings)
    losses = {line["step"]: line["held_out_loss"] for line in curve(tmp_path / "best") if "held_out_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    counts = read_manifest(tmp_path / "best" / "train").counts
    assert (counts["step"], counts["exported_step"]) == (30, best)
    assert f"exported_step: {best}\n" in (tmp_path / "best" / "train" / "model" / "README.md").read_text()
    train(run, tmp_path / "there", steps=best, **{**settings, "held_out": 0})
    assert same(tmp_path / "best", tmp_path / "there")


def test_averaged_weights_are_exported(run: Run, tmp_path: Path) -> None:
    train(run, tmp_path / "plain", steps=2, dropout=0.0)
    train(run, tmp_path / "averaged", steps=2, dropout=0.0, ema=0.75)
    start = load_file(run.base / "model" / "model.safetensors")
    plain, averaged = (weights(tmp_path / name) for name in ("plain", "averaged"))
    name = next(n for n in start if "q_proj" in n)
    moved = (averaged[name] - start[name]).norm() / (plain[name] - start[name]).norm()
    assert 0.2 < moved < 0.5  # after two steps of decay 3/4: about 1/4 of the way, and a bit


def test_the_best_averages_are_exported(run: Run, tmp_path: Path) -> None:
    """What is compared is what becomes the model; and looking at it changes nothing."""
    settings = {"held_out": 5, "checkpoint_steps": 3, "schedule": "constant", "optimizer": "adamw", "ema": 0.9}
    settings |= {"lr": 0.02, "dropout": 0.0}
    train(run, tmp_path / "best", export="best", **settings)
    t, found = trainer(run), {}
    held_out = Corpus.of(t.batches.documents[n] for n in range(5))
    for step in range(3, 31, 3):
        train(run, tmp_path / str(step), steps=step, **{**settings, "held_out": 0})
        t.objective.model.load_state_dict(weights(tmp_path / str(step)))
        found[step] = t.held_out_loss(held_out)
    best = min(found, key=lambda step: found[step])
    assert same(tmp_path / "best", tmp_path / str(best)) and 3 < best < 30
    assert not same(tmp_path / "best", tmp_path / "30")


@pytest.mark.parametrize(("unit", "amount"), [("steps", 7), ("tokens", 1500), ("raw_tokens", 800), ("epochs", 2.5)])
def test_budgets(run: Run, tmp_path: Path, unit: str, amount: float) -> None:
    config = run.recipe.train.with_budget(unit, amount)
    counts = run.train(config, sources(run), tmp_path / unit).counts
    spent = {**counts, "steps": counts["step"], "epochs": counts["epoch"]}[unit]
    assert amount <= spent < amount + {"steps": 1, "tokens": 256, "raw_tokens": 256, "epochs": 1}[unit]
    assert 0.5 < counts["fill"] <= 1


@pytest.fixture
def earlier(run: Run, tmp_path: Path) -> Path:
    """A stage that another may go on from."""
    train(run, tmp_path / "earlier", optimizer="adamw", schedule="wsd", steps=10)
    return tmp_path / "earlier" / "train"


def test_a_stage_that_goes_on_from_another_has_its_own_settings(
    run: Run, earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier one's weights and moments alone; averages begin at its weights where it had none."""
    ours = {"lr": 0.0001, "weight_decay": 0.5, "betas": (0.8, 0.9)}
    t = trainer(run, optimizer="adamw", schedule="wsd", ema=0.9, **ours)
    t.load(earlier / "stable", optimizer_only=True)
    (adamw,) = t.optimizers
    (group,) = adamw.param_groups
    assert {name: group[name] for name in ours} == ours and group["peak_lr"] == 0.0001
    assert all(adamw.state[p]["step"] == 8 and adamw.state[p]["exp_avg"].any() for p in t.objective.parameters())
    for name, parameter in t.objective.model.named_parameters():
        assert torch.equal(t.averages[name], parameter)


def test_what_a_stage_cannot_go_on_from_is_named(run: Run, earlier: Path, tmp_path: Path) -> None:
    config = Train.model_validate({**run.recipe.train.model_dump(exclude_unset=True), "schedule": "wsd"})
    with pytest.raises(UserError, match="stable is of another model or optimizer .*momentum_buffer"):
        run.train(config, sources(run), tmp_path / "later", continue_from=earlier)
    train(run, tmp_path / "cosine", steps=2)
    with pytest.raises(UserError, match="cosine/train has no weights from before a decay"):
        run.train(config, sources(run), tmp_path / "other", continue_from=tmp_path / "cosine" / "train")


def test_schedules() -> None:
    cosine = Train(schedule="cosine", warmup_steps=10, steps=100)
    assert learning_rate(cosine, 4, 0.04) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.04)))
    assert learning_rate(cosine, 99, 1.0) == pytest.approx(0)
    wsd = Train(schedule="wsd", decay_share=0.2, steps=100)
    assert [learning_rate(wsd, 50, p) for p in (0.5, 0.8, 0.9, 1.0)] == pytest.approx([1, 1, 0.5, 0])
    assert learning_rate(Train(schedule="constant"), 3, 0.9) == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"lr": 1e18, "clip": 1e30}, "(nan|inf)"), ({"lr": 3.0, "spike": 0.5, "schedule": "constant"}, "of late")],
    ids=["not finite", "spike"],
)
def test_divergence_is_named_with_step_and_documents(
    run: Run, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    ways = r"train.skip=\[\d+\] goes on without this batch"
    ways += r", train.spike above [\d.]+ with it" if "spike" in settings else ""
    ways = rf"{reason}.*; {ways}; a lower train.lr starts this training anew"
    with pytest.raises(UserError, match=rf"diverged at step \d+: loss .*{ways}"):
        train(run, tmp_path / "bad", **{"optimizer": "adamw", "checkpoint_steps": 1, "keep": 50, **settings})
    (left,) = (tmp_path / "bad" / "train").glob("diverged_step_*.json")
    saved = json.loads(left.read_text())
    known = {f"teacher-{n:05}" for n in range(20)}
    assert saved["documents"] and set(saved["documents"]) <= known
    assert sum(len(micro["ids"]) for micro in saved["micro_batches"]) > 0
    # the weights in the checkpoints are those from before the batch that failed
    last = checkpoint.found(tmp_path / "bad" / "train")[-1]
    assert int(last.name.rpartition("_")[2]) == saved["step"]


def test_after_a_divergence_the_batch_can_be_skipped(run: Run, tmp_path: Path, capsys: Any) -> None:
    """By the same training from its checkpoint on; it ends as one that skipped from the start does, and tells of it."""
    step = Trainer.step

    def diverges_at_17(self: Trainer, batch: Any, rate: float) -> Any:
        if self.counters.step == 17 and 17 not in self.config.skip:
            raise Diverged("as many do", 17, batch)
        return step(self, batch, rate)

    plain = train(run, tmp_path / "plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", diverges_at_17)
        with pytest.raises(Diverged):
            train(run, tmp_path / "parts", ema=0.9)
        found = train(run, tmp_path / "parts", ema=0.9, skip=[3, 17, 99])
    assert "train.skip=[3] comes too late" in capsys.readouterr().err
    train(run, tmp_path / "whole", ema=0.9, skip=[17])
    killed_at(run, tmp_path / "killed", 22, ema=0.9, skip=[17])
    train(run, tmp_path / "killed", ema=0.9, skip=[17])
    for other in ("parts", "killed"):
        assert same(tmp_path / "whole", tmp_path / other) and curve(tmp_path / "whole") == curve(tmp_path / other)
    assert found.counts["skipped"] == [17] and found.counts["step"] == 30
    assert "skipped" not in plain.counts and not same(tmp_path / "plain", tmp_path / "whole")


def test_a_training_that_is_done_has_nothing_to_skip(run: Run, tmp_path: Path, capsys: Any) -> None:
    """In `em` the setting is every training's, and another's step may be meant."""
    done = train(run, tmp_path / "a", steps=4, skip=[1])
    assert train(run, tmp_path / "a", steps=4, skip=[1, 2, 8]) == done
    assert "too late" not in capsys.readouterr().err


@pytest.mark.parametrize("amount", [1 / 3, 2 / 3, 4 / 3])
def test_a_third_of_an_epoch_ends(amount: float, run: Run, tmp_path: Path) -> None:
    done = train(run, tmp_path / "a", steps=None, epochs=amount)
    assert done.counts["epoch"] == pytest.approx(amount, abs=0.06)


def test_steps_skipped_before_the_decay_are_not_in_what_is_left_of_it(run: Run, tmp_path: Path) -> None:
    """A training that stopped within its decay, before a checkpoint, resumes before it with other steps to skip."""
    settings = {"schedule": "wsd", "checkpoint_steps": 10, "optimizer": "adamw"}
    killed_at(run, tmp_path / "a", 27, **settings)  # stable is of step 24, the checkpoint of 20
    train(run, tmp_path / "a", **settings, skip=[22])
    train(run, tmp_path / "b", **settings, skip=[22])
    one, other = (checkpoint.check(tmp_path / name / "train" / "stable") for name in "ab")
    assert one["skipped"] == other["skipped"] == [22] and one["counters"]["step"] == 24
    assert one["files"]["__0_0.distcp"] == other["files"]["__0_0.distcp"]


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_weights_from_before_a_decay_are_never_those_of_a_later_step(run: Run, tmp_path: Path, damage: str) -> None:
    settings = {"schedule": "wsd", "checkpoint_steps": 13, "optimizer": "adamw"}
    folder = tmp_path / "a" / "train"
    killed_at(run, tmp_path / "a", 28, **settings)
    assert read_state(folder / "stable")["counters"]["step"] == 24
    (last,) = checkpoint.found(folder)
    if damage == "missing":
        shutil.rmtree(folder / "stable")
        told = rf"stable, the weights from before the decay, is missing, and .*{last.name} is from within it: remove"
    else:
        file = next((folder / "stable").glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        told = "stable.* is damaged"
    with pytest.raises(UserError, match=told):
        train(run, tmp_path / "a", **settings)
    shutil.rmtree(last)
    train(run, tmp_path / "a", **settings)
    assert checkpoint.check(folder / "stable")["counters"]["step"] == 24
    train(run, tmp_path / "whole", **settings)
    assert same(tmp_path / "whole", tmp_path / "a")


def test_a_training_asks_once_for_the_weights_from_before_its_decay(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, there = [], checkpoint.there
    monkeypatch.setattr(checkpoint, "there", lambda path: asked.append(path.name) or there(path))
    train(run, tmp_path / "a", schedule="wsd", decay_share=0.9)
    assert asked.count("stable") <= 1


@pytest.mark.parametrize(("steps", "told"), [(3, True), (4, False)])
def test_a_training_that_ends_within_its_warm_up_says_so(
    run: Run, tmp_path: Path, capsys: Any, steps: int, told: bool
) -> None:
    train(run, tmp_path / "a", steps=steps, warmup_steps=4)
    line = "the training ended within its warm-up (3 of 4 steps): the learning rate never reached train.lr"
    assert (line in capsys.readouterr().err) == told


@pytest.mark.parametrize("asked", [True, False])
def test_a_router_loss_that_the_model_asks_for_is_said_to_be_left_out(
    small: dict[str, Any], tmp_path: Path, capsys: Any, asked: bool
) -> None:
    small["model"]["base"] |= {"model_type": "mixtral", "num_local_experts": 2, "output_router_logits": asked}
    small["train"] |= {"steps": 1}
    made = Run(resolve(small), tmp_path)
    made.prepare()
    made.synthesize()
    made.train_warm_start()
    assert ("the router's load-balancing loss" in capsys.readouterr().err) == asked


def test_epochs_train_on_every_document_and_no_other_visit(run: Run, tmp_path: Path) -> None:
    """Also where a batch is larger than an epoch; and interrupted in the last batches as without."""
    counts = train(run, tmp_path / "a", steps=None, epochs=1, rows=64).counts
    assert (counts["step"], counts["epoch"]) == (1, 1.0)
    tokens = counts["tokens"]
    counts = train(run, tmp_path / "whole", steps=None, epochs=3, checkpoint_steps=2).counts
    assert counts["epoch"] == 3.0
    killed_at(run, tmp_path / "parts", counts["step"] - 1, steps=None, epochs=3, checkpoint_steps=2)
    assert (
        train(run, tmp_path / "parts", steps=None, epochs=3, checkpoint_steps=2, workers=1).counts["tokens"]
        == (counts["tokens"])
    )
    assert same(tmp_path / "whole", tmp_path / "parts") and 2 * tokens < counts["tokens"] < 4 * tokens


def test_missing_input_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not complete .* run that stage first"):
        run.train(run.recipe.train, [Source(tmp_path / "nowhere", "corpus")], tmp_path / "bad")


def test_rows_longer_than_a_table_of_positions_are_refused(small: dict[str, Any], tmp_path: Path) -> None:
    small["model"]["base"] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    made = Run(resolve(small), tmp_path)
    made.prepare()
    made.synthesize()
    with pytest.raises(UserError, match="train.sequence_length = 64 is more than the model's 16 positions"):
        made.train_warm_start()


def test_a_batch_of_context_alone_is_passed_over(run: Run, tmp_path: Path) -> None:
    """Short rows that hold nothing but the beginning of a document."""
    settings = {"rows": 1, "sequence_length": 4, "layout": "raw", "log_steps": 1}
    train(run, tmp_path / "whole", **settings)
    lines = curve(tmp_path / "whole")
    without = [line["step"] for line in lines if "loss" not in line]
    assert [line["step"] for line in lines] == list(range(1, 31)) and 0 < len(without) < 30
    killed_at(run, tmp_path / "parts", 17, **settings)
    train(run, tmp_path / "parts", **settings)
    assert same(tmp_path / "whole", tmp_path / "parts") and curve(tmp_path / "parts") == lines


def test_documents_without_anything_that_carries_loss_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = Chunk("d", 0, 0, "", (5, 6))
    context = Corpus.of([ThoughtDocument("d", (chunk,), ((),), (False,), "raw")])
    monkeypatch.setattr(Corpus, "open", lambda path: context)
    with pytest.raises(UserError, match="train.loss_on: targets, but thoughts are meant for none"):
        trainer(run)
    assert trainer(run, loss_on="all").batches.documents is context


def test_a_budget_that_cannot_be_spent_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where thoughts are trained on alone, there is no raw token."""
    chunks = tuple(Chunk("d", n, 0, "", (5, 6)) for n in range(2))
    with_thoughts, some_without = (
        Corpus.of([ThoughtDocument("d", chunks, (((7,),), second), (True, True), "em")]) for second in (((8,),), ())
    )
    settings = {"layout": "thoughts", "raw_tokens": 9, "steps": None}
    monkeypatch.setattr(Corpus, "open", lambda path: with_thoughts)
    with pytest.raises(UserError, match="layout: thoughts spends no raw_tokens"):
        trainer(run, **settings)
    assert trainer(run, **settings, raw_share=0.5) and trainer(run, layout="thoughts")
    monkeypatch.setattr(Corpus, "open", lambda path: some_without)
    assert trainer(run, **settings)


def test_an_e_step_that_accepted_nothing_leaves_the_warm_start(run: Run, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "sample", "sample", "k")
    stage.write("corpus-00000.parquet", [], DOCUMENTS, {})
    stage.close(["corpus-00000.parquet"], {})
    empty = [Source(tmp_path / "sample", "corpus")]
    config = run.recipe.train.with_budget("steps", 2)
    assert run.train(config, sources(run) + empty, tmp_path / "some").counts["step"] == 2
    with pytest.raises(UserError, match="the E-step accepted no thought"):
        run.train(config, empty, tmp_path / "none")


def test_a_finished_stage_leaves_model_card_and_counts_alone(run: Run, tmp_path: Path) -> None:
    train(run, tmp_path / "a", held_out=5)
    folder = tmp_path / "a" / "train"
    assert {p.name for p in folder.iterdir()} == {"stage.json", "manifest.json", "metrics.jsonl", "model"}
    card = (folder / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert yaml.safe_load(card.split("```yaml")[1].split("```")[0])["train"]["steps"] == 30


def test_what_changes_no_result_is_not_in_the_key(run: Run, tmp_path: Path) -> None:
    settings = {"micro_rows": 2, "workers": 1, "keep": 3, "logits": 500, "log_steps": 3, "checkpoint_steps": 7}
    assert train(run, tmp_path / "a").key == train(run, tmp_path / "b", **settings).key
    assert train(run, tmp_path / "a").key != train(run, tmp_path / "c", lr=0.002).key


def test_the_best_of_other_checkpoints_is_another_result(run: Run, tmp_path: Path) -> None:
    best = {"held_out": 5, "export": "best", "steps": 4}
    one, other = (train(run, tmp_path / str(n), **best, checkpoint_steps=n).key for n in (2, 3))
    assert one != other


def test_the_best_of_what_nothing_tells_is_refused(run: Run, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "held_out", "prepare", "k")
    stage.write("held_out-00000.parquet", [], DOCUMENTS, {})
    stage.close(["held_out-00000.parquet"], {})
    config = run.recipe.train.model_copy(update={"held_out": 5, "export": "best"})
    empty = Source(tmp_path / "held_out", "held_out")
    with pytest.raises(UserError, match="train.export: best, but there are no held-out documents"):
        stages.train.train(
            config, run.recipe.model, run.base, sources(run), tmp_path / "a" / "train", 0, held_out=empty
        )


def test_tensorboard_gets_what_metrics_get(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(run, tmp_path / "a", tracker="tensorboard")
    killed_at(run, tmp_path / "b", 17, tracker="tensorboard")  # after it told of step 15, and goes on from 10
    train(run, tmp_path / "b", tracker="tensorboard")
    for name in ("a", "b"):
        events = EventAccumulator(str(tmp_path / name / "train" / "tensorboard")).Reload()
        assert [e.step for e in events.Scalars("loss")] == [5, 10, 15, 20, 25, 30]


def test_a_tracker_that_is_not_installed_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        with pytest.raises(UserError, match="pip install wandb"):
            train(run, tmp_path / "a", tracker="wandb")


def test_of_experts_those_count_that_a_token_is_sent_to() -> None:
    """gpt_oss in small: of two experts each token takes one."""
    model = tiny("gpt_oss")
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3)
    all_but = sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n) - experts
    assert experts > 0 and multiplied(model) == all_but + experts / 2
    llama = tiny("llama")
    assert multiplied(llama) == sum(p.numel() for n, p in llama.named_parameters() if p.ndim > 1 and "embed" not in n)


def test_held_out_loss_is_that_of_every_document_once(run: Run) -> None:
    t = trainer(run, dropout=0.0)
    held_out = Corpus.of(t.batches.documents[n] for n in range(7))
    total = count = 0.0
    for n in range(7):
        config = t.config.model_copy(update={"layout": "raw", "loss_on": "all", "rows": 1, "sequence_length": 64})
        alone = type(t.batches)(Corpus.of([held_out[n]]), t.batches.controls, config, 0)
        piece = alone._next_visit()
        _, losses, _ = t.objective(alone.lay_out([piece]))
        total, count = total + float(losses.sum()), count + len(losses)
    assert t.held_out_loss(held_out) == pytest.approx(total / count, rel=1e-5)


def test_interrupted_is_no_user_error() -> None:
    assert not issubclass(Interrupted, UserError)
