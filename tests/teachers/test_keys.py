"""A teacher's key comes from the environment and stays there."""

from __future__ import annotations

import sqlite3
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from loopback import Body, Loopback, error, plain_reply

from latent_thoughts import cli
from latent_thoughts.config import load_recipe, resolve
from latent_thoughts.types import UserError

KEY = "sk-planted-0f9e8d7c6b5a"


def everything(folder: Path) -> dict[str, str]:
    """All that a folder's files say, by name: also what is compressed in Parquet and SQLite."""
    found = {}
    for path in (p for p in folder.rglob("*") if p.is_file()):
        found[str(path)] = path.read_bytes().decode("latin-1")
        if path.suffix == ".parquet":
            found[f"{path} (rows)"] = str(pq.read_table(path).to_pylist()) + str(pq.read_schema(path).metadata)
        if path.suffix == ".sqlite":
            with sqlite3.connect(path) as store:
                for (table,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                    rows = store.execute(f"SELECT * FROM {table}").fetchall()
                    cells = [
                        zlib.decompress(c) if isinstance(c, bytes) and c[:1] == b"\x78" else c for r in rows for c in r
                    ]
                    found[f"{path} {table}"] = str(cells)
    return found


@pytest.mark.parametrize(
    "teacher",
    [
        {"key_env": KEY},
        {"key_env": "hf_planted0f9e8d7c6b5a"},
        {"parameters": {"api_key": KEY}},
        {"parameters": {"extra": [{"Authorization": KEY}]}},
        {"base_url": f"https://h/v1?sig={KEY}"},
        {"base_url": f"https://h/v1?code={KEY}"},
        {"base_url": f"  https://me:{KEY}@h/v1"},
        {"base_url": f"https://h/v1;token={KEY}"},
    ],
)
def test_a_key_in_a_recipe_is_refused_and_not_repeated(teacher: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"synthesize\.teacher\.(key_env|parameters|base_url)") as caught:
        resolve({"synthesize": {"teacher": teacher}})
    assert "planted" not in str(caught.value)


def test_what_only_resembles_a_key_is_taken() -> None:
    parameters = {"top_p": 0.9, "stop_token_ids": [1], "prompt_cache_key": "a", "skip_special_tokens": True}
    teacher = {"parameters": parameters, "key_env": "MY_KEY_2", "base_url": "http://127.0.0.1:8000/v1?design=1"}
    assert resolve({"synthesize": {"teacher": teacher}}).synthesize.teacher.parameters == parameters


def test_a_key_is_nowhere(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A whole run, with an endpoint that repeats the key in its errors, and one that refuses it: neither a file of the
    run folder nor a line that was shown has it."""
    values["data"] |= {"held_out": 0.2, "warm_start": 0.5}
    values["synthesize"] |= {"failed": "raw"}
    values["synthesize"]["teacher"] |= {"retries": 0}
    values |= {
        "train": {"steps": 2, "rows": 2, "sequence_length": 256},
        "sample": {"k": 2, "max_thought_tokens": 4, "max_tokens": 400},
        "evaluate": {"documents": 2, "bound": [1]},
        "em": {"iterations": 1, "baselines": [], "mix": {"thoughts": 0, "raw": 1}},
    }
    recipe, run, asked = tmp_path / "recipe.yaml", tmp_path / "run", []
    recipe.write_text(yaml.safe_dump(values))

    def reply(body: Body) -> Body:
        asked.append(body)
        return plain_reply(body) if len(asked) % 4 else error(f"the key {KEY} may not ask this")

    def em(key: str, url: str, *overrides: str) -> int:
        monkeypatch.setenv("TEST_KEY", key)
        command = ["em", str(recipe), f"synthesize.teacher.base_url={url}", *overrides, "--out", str(run), "--yes"]
        monkeypatch.setattr(sys, "argv", ["latent-thoughts", *command])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    with Loopback(reply, key=KEY) as server:
        assert em(KEY, server.url) == 0
        assert len(asked) > 8
        assert em(f"{KEY}x", server.url, "synthesize.temperature=0.1") == 1
    shown = "".join(capfd.readouterr())
    assert "refuses the key in TEST_KEY" in shown
    said = {**everything(run), "shown": shown}
    assert any(name.endswith("report.html") for name in said)
    assert any("It follows, step by step" in text for name, text in said.items() if name.endswith(" replies"))
    assert any("(the key in TEST_KEY) may not ask this" in text for text in said.values())  # told without the key
    assert [name for name, text in said.items() if KEY in text] == []
    assert load_recipe(run / "recipe.yaml").synthesize.teacher.key_env == "TEST_KEY"
