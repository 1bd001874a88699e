"""What strangers may hand over: hostile run folders, checkpoints and models. Nothing of it leads out, or runs."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from latent_thoughts import model as models
from latent_thoughts import transfer
from latent_thoughts.config import Model, resolve
from latent_thoughts.config.base import read_yaml
from latent_thoughts.em import Loop, Run
from latent_thoughts.places import write
from latent_thoughts.seals import hashes, read_sealed, write_sealed
from latent_thoughts.stages.train import checkpoint
from latent_thoughts.store import Stage, read_manifest
from latent_thoughts.types import UserError

OUTSIDE = ["../stolen.parquet", "/etc/passwd", "a/../../b.parquet", "..", "", "s3://other/x.parquet", "..\\x.parquet"]


@pytest.fixture
def run(small: dict[str, Any], tmp_path: Path) -> Run:
    small["train"]["steps"] = 12
    made = Run(resolve(small), tmp_path / "run")
    made.prepare()
    made.synthesize()
    return made


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_hostile_manifest_leads_nowhere(run: Run, name: str) -> None:
    """A shard's name is read from `prepare` and written by `sample`: neither may leave its folder."""
    run.train_warm_start()
    path = run.prepared / "manifest.json"
    manifest = read_sealed(path)
    good = next(iter(manifest["shards"].values()))
    before = sorted(p for p in run.folder.parent.rglob("*"))
    for shards in ({name: good}, {**manifest["shards"], f"corpus-{name}/../../x": good}):
        write_sealed(path, {**manifest, "shards": shards})  # a seal is no signature: whoever wants to hurt makes one
        for stage in (
            lambda: read_manifest(run.prepared),
            run.synthesize,
            lambda: Loop(run, "em", run.recipe.sample, run.folder).sample(1),
            lambda: run.evaluate(run.warm_start),
        ):
            with pytest.raises(UserError, match="does not lie in it: do not use this folder"):
                stage()
    assert sorted(p for p in run.folder.parent.rglob("*")) == before


def test_other_names_in_a_run_folder_lead_nowhere(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "run" / "prepare", "prepare", "k")
    (tmp_path / "secret").write_bytes(b"x")
    for reach in (stage.remove, stage.rows, stage.done, stage.describe):
        with pytest.raises(UserError, match="does not lie in it"):
            reach("../../secret")
    assert (tmp_path / "secret").exists()
    (stage.folder / "stage.json").write_text(json.dumps({"stage": "prepare", "key": "../../../x"}))
    with pytest.raises(UserError, match="does not lie in it"):
        Stage(stage.folder, "prepare", "k")


def test_names_in_a_store_lead_nowhere(bucket: Path, tmp_path: Path) -> None:
    """In a store `..` is a name like any other, which a copy on this machine would follow."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    transfer.put(tmp_path / "model", bucket / "model")
    client: Any = bucket
    client.fs.pipe_file(f"{client.path}/model/../../up.json", b"{}")
    try:
        copy = transfer.local(bucket / "model")
    except UserError as refused:
        assert "would lie elsewhere" in str(refused)
    else:  # it was no part of what had been put
        assert [p.name for p in copy.rglob("*")] == ["config.json"]
    write(bucket / ".train.moving.json", json.dumps({"from": "model", "to": ".."}).encode())
    with pytest.raises(UserError, match="names folders elsewhere"):
        transfer.settle(bucket / ".train.moving.json", "manifest.json")


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_hostile_checkpoint_runs_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both pickles of torch's checkpoints: the description, and values that are no tensors."""
    folder, mark = run.warm_start / "train", tmp_path / "exploded"
    real = checkpoint.prune

    def stop(stage: Path, keep: int) -> None:
        real(stage, keep)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "prune", stop)
    with pytest.raises(KeyboardInterrupt):
        run.train_warm_start()
    monkeypatch.undo()
    (saved,) = checkpoint.found(folder)
    description, (data,) = saved / ".metadata", list(saved.glob("*.distcp"))
    good, stored = description.read_bytes(), data.read_bytes()

    def plant(description_: bytes, data_: bytes = stored) -> None:
        """With the hashes that belong to them: whoever wants to hurt makes them too."""
        description.write_bytes(description_)
        data.write_bytes(data_)
        state = read_sealed(saved / "state.json")
        del state["files"]
        (saved / "state.json").unlink()
        write_sealed(saved / "state.json", {**state, "files": hashes(saved)})

    for bad in (pickle.dumps(Bomb(mark)), b"", b"nonsense", pickle.dumps({"no": "description"})):
        plant(bad)
        with pytest.raises(UserError, match="is not to be trusted"):
            run.train_warm_start()
    found = pickle.loads(good)
    plain = next(i for index, i in found.storage_data.items() if index.fqn.endswith(".lr"))
    buffer = io.BytesIO()
    torch.save(Bomb(mark), buffer)
    plain.offset, plain.length = len(stored), len(buffer.getvalue())
    plant(pickle.dumps(found), stored + buffer.getvalue())
    with pytest.raises(UserError, match=r"is not to be trusted .*\.lr"):
        run.train_warm_start()
    plain.relative_path = "../../../../secret"
    plant(pickle.dumps(found), stored + buffer.getvalue())
    with pytest.raises(UserError, match="it names"):
        run.train_warm_start()
    assert not mark.exists()
    plant(good)
    assert run.train_warm_start().counts["step"] == 12  # as it was, it is gone on from


@pytest.fixture
def base(run: Run) -> Path:
    return run.base / "model"


def test_pickled_weights_need_a_flag(base: Path, tmp_path: Path) -> None:
    weights = models.load(base, Model(device="cpu")).state_dict()
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot load model .* set model.allow_pickle=true"):
        models.load_base(Model(base=str(base)), "x", 0, 0)
    loaded, _, _ = models.load_base(Model(base=str(base), allow_pickle=True), "x", 0, 0)
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises((UserError, pickle.UnpicklingError)):  # with the flag too no code runs
        models.load_base(Model(base=str(base), allow_pickle=True), "x", 0, 0)
    assert not (tmp_path / "exploded").exists()


def test_a_models_own_code_is_not_run_and_the_setting_is_named(base: Path, tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    (base / "strange.py").write_text(
        "import os\nfrom transformers import PretrainedConfig\n"
        f"os.mkdir({str(mark)!r})\nclass Strange(PretrainedConfig):\n    model_type = 'strange'\n"
    )
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Strange"}}
    (base / "config.json").write_text(json.dumps(config))
    for load in (
        lambda: models.load_base(Model(base=str(base)), "x", 0, 0),
        lambda: models.outline(Model(base=str(base)), 30),
    ):
        with pytest.raises(UserError, match=r"brings code of its own, .* model.trust_remote_code=true"):
            load()
    assert not mark.exists()


def test_yaml_makes_no_objects() -> None:
    for text in ("!!python/object/apply:os.mkdir [/tmp/never]", "!!python/name:os.system"):
        with pytest.raises(yaml.YAMLError):
            read_yaml(text)
        with pytest.raises(UserError, match="is not valid YAML"):
            resolve({}, [f"data.source={text}"])
