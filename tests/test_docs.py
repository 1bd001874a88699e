"""What the documentation tells a reader to type: the quickstart is run in small, all else is checked to be possible.

A command is a line of a fenced block without a language (README, older pages) or marked `bash`. Those of a cluster or
of several GPUs say so in a comment (`# needs a ...`).
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import latent_thoughts
from latent_thoughts import cli
from latent_thoughts.config import Recipe, resolve

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
PROGRAMS = ("latent-thoughts", "make", "pip", "python", "torchrun", "sbatch", "cp")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Line(NamedTuple):
    page: str
    words: list[str]
    comment: str

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for _, language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def lines(page: Path) -> Iterator[Line]:
    for block in blocks(page, "", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            text = line.strip().removeprefix("$ ")
            if text.split(" ")[0] in PROGRAMS:
                command, _, comment = text.partition(" #")
                yield Line(page.relative_to(ROOT).as_posix(), shlex.split(command), comment)


LINES = [line for page in PAGES for line in lines(page)]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_pages_have_commands() -> None:
    assert len(LINES) > 60
    assert {line.page for line in LINES} >= {"README.md", "docs/quickstart.md", "docs/guides/scale.md"}


@pytest.mark.parametrize("line", LINES, ids=str)
def test_a_command_is_possible(line: Line) -> None:
    """It parses, and names settings, extras, targets and files that there are."""
    program, *words = line.words
    if program == "torchrun":
        assert "needs" in line.comment and words[2:4] == ["-m", "latent_thoughts.cli"]
        program, words = "latent-thoughts", words[4:]
    if program == "latent-thoughts":
        parses(words)
    elif program == "make":
        (target, *_), makefile = words, (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    elif program == "pip":
        wanted = [extra for word in words for extra in re.findall(r"\[([\w,-]+)\]$", word)]
        assert set(wanted) <= set(PROJECT["optional-dependencies"])
        named = [word for word in words[1:] if not word.startswith((".", "-")) and word.endswith((".lock", ".txt"))]
        assert all((ROOT / name).exists() for name in named)
    elif program == "python":
        script = words[0] if words[0] != "-m" else ""
        assert not script or (ROOT / script).exists()
    elif program == "sbatch":
        assert "needs" in line.comment
        assert any((ROOT / word).exists() for word in words)
    else:
        assert program == "cp" and (ROOT / words[0]).exists()


def parses(words: list[str]) -> None:
    """The command line takes them, and the recipe takes the overrides among them."""
    if words[-1] == "--help":
        return
    _, bound, _ = cli.app.parse_args(words, exit_on_error=False, print_error=False)
    recipe = bound.arguments.get("recipe")
    there = [p for p in (ROOT / str(recipe), ROOT / "recipes" / f"{recipe}.yaml") if p.is_file()]  # demo takes a name
    assert there or recipe in (None, "mine.yaml", Path("mine.yaml")) or str(recipe).isupper()
    values = yaml.safe_load(there[0].read_text(encoding="utf-8")) if there else {}
    given = [override for name in ("overrides", "set_") for override in bound.arguments.get(name) or []]
    resolve({"synthesize": {"teacher": {"model": "m"}}} | values, given)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_recipes_and_programs_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        found = yaml.safe_load(block)
        if found.keys() <= Recipe.model_fields.keys():
            resolve(found)
        else:
            assert set(found) <= {"name", "version", "messages", "nothing"}, f"neither recipe nor prompt: {set(found)}"
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "latent_thoughts":
                assert {alias.name for alias in node.names} <= set(latent_thoughts.__all__)


SMALL = [
    "train.steps=4", "train.rows=4", "em.iterations=1", "em.baselines=[]", "sample.k=2", "evaluate.documents=8",
    "data.world={documents: 30, teacher_documents: 20, held_out_share: 0.02}",
]  # fmt: skip


def test_the_quickstart_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of the page but `demo` (tests/test_demo.py runs it), in order, in small; what is done to the demo's
    folder is done to this run's, at the end."""
    monkeypatch.chdir(tmp_path)
    commands = [line.words for line in lines(ROOT / "docs" / "quickstart.md")]
    names = [words[1] for words in commands if words[0] == "latent-thoughts"]
    assert set(names) >= {
        "prepare",
        "synthesize",
        "train",
        "sample",
        "evaluate",
        "compare",
        "em",
        "ask",
        "export",
        "plan",
    }
    late = [words for words in commands if "runs/demo" in words and words[1] != "demo"]
    assert [words[1] for words in late] == ["watch", "report"]
    for program, *words in [words for words in commands if words not in late] + late:
        if program == "cp":
            shutil.copy(ROOT / words[0], words[1])
        elif program == "latent-thoughts" and words[0] not in ("demo", "--help"):
            small = SMALL if "mine.yaml" in words else []
            if words[0] == "plan":
                small = [*small, "plan.device=h100"]  # without measuring this machine
            words = ["runs/mine" if word == "runs/demo" else word for word in words]
            monkeypatch.setattr(sys, "argv", ["latent-thoughts", *words[:2], *small, *words[2:]])
            with pytest.raises(SystemExit) as end:
                cli.main()
            assert not end.value.code, words
    said = capsys.readouterr().out
    assert "documents in thoughts.jsonl" in said
    assert (tmp_path / "runs" / "mine" / "report.html").exists() and (tmp_path / "thoughts.jsonl").read_text()


def strings() -> set[str]:
    """What the package may say: every string in its source; those with parts filled in, part by part."""
    found = set()
    for path in (ROOT / "latent_thoughts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(" ".join(node.value.split()))
    return found


def test_troubleshooting_names_messages_that_there_are() -> None:
    text, known = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), strings()
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) > 35
    for message, remedy in rows:
        assert remedy.strip()
        for part in filter(None, (part.strip() for part in message.split("…"))):
            assert any(part in string for string in known), f"no message has {part!r}"


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["dynamic"]
    assert f"## {latent_thoughts.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation: Any = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == PROJECT["license"] and "version" not in citation


def test_dependencies_are_bounded() -> None:
    """Every requirement has an upper bound, or is pinned."""
    extras = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *(r for extra in extras.values() for r in extra)]:
        if not requirement.startswith("latent-thoughts["):
            assert "<" in requirement or "==" in requirement, requirement
    own = next(r for r in extras["dev"] if r.startswith("latent-thoughts["))
    assert set(re.findall(r"[\w-]+", own.partition("[")[2])) <= set(extras)


def test_the_lock_file_fits_the_project() -> None:
    """It pins every requirement of the tests, within its range, and names no place to get it from."""
    from packaging.requirements import Requirement

    text = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8")
    pinned = dict(line.split("==") for line in text.lower().splitlines() if line and not line.startswith("#"))
    assert not re.search(r"://|--(extra-)?index|@", text)
    extras = PROJECT["optional-dependencies"]
    own = next(Requirement(r) for r in extras["dev"] if r.startswith("latent-thoughts["))
    wanted = [*PROJECT["dependencies"], *extras["dev"], *(r for extra in own.extras for r in extras[extra])]
    for requirement in map(Requirement, wanted):
        if requirement.name not in ("latent-thoughts", "torch"):
            name = requirement.name.lower().replace(".", "-")
            assert requirement.specifier.contains(pinned.get(name, pinned.get(name.replace("-", "_"))) or ""), (
                requirement
            )
