"""The demo's EM run in miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from latent_thoughts.store import read_manifest


@pytest.fixture
def recipe(small: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(miniature(small)))
    return path


def miniature(small: dict[str, Any]) -> dict[str, Any]:
    small["em"] = {"iterations": 1, "baselines": ["raw_tokens"]}
    small["data"]["world"] |= {"documents": 24, "teacher_documents": 12}
    small["train"] |= {"steps": 8, "checkpoint_steps": 3}
    return small


def outcome(run: Path) -> dict[str, Any]:
    """All that a run comes to but the time it took: its results, the keys of its stages, and the weights of its models
    to the bit."""
    rows = json.loads((run / "results.json").read_text())["rows"]
    for row in rows:
        del row["seconds"]
    folders = [path.parent.relative_to(run) for path in run.rglob("manifest.json")]
    manifests = {str(name): read_manifest(run / name) for name in folders if "damaged" not in name.parts}
    weights = {name: found.files.get("model/model.safetensors") for name, found in manifests.items()}
    return {"rows": rows, "keys": {name: found.key for name, found in manifests.items()}, "weights": weights}
