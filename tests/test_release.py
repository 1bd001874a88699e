"""What is released: an sdist and a wheel that install in a fresh environment and run the demo."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import latent_thoughts

ROOT = Path(__file__).parent.parent
RECIPES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run([*map(str, command)], cwd=cwd, env=plain, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel made from it."""
    pytest.importorskip("build", reason="pip install -e '.[release]'")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return {path.suffix: path for path in folder.iterdir()}


def test_both_hold_what_they_should(built: dict[str, Path]) -> None:
    version = latent_thoughts.__version__
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = set(wheel.namelist())
    assert {f"latent_thoughts/{name}" for name in RECIPES} <= names
    assert {"latent_thoughts/py.typed", "latent_thoughts/stages/report/page/page.html"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.split("/")[0] in ("tests", "docs", "benchmarks")]
    with tarfile.open(built[".gz"]) as sdist:
        inside = {name.removeprefix(f"latent_thoughts-{version}/") for name in sdist.getnames()}
    assert inside >= RECIPES
    assert {"LICENSE", "CHANGELOG.md", "CITATION.cff", "docs/index.md", "tests/test_release.py", "mkdocs.yml"} <= inside


def test_the_wheel_runs_the_demo_in_a_fresh_environment(built: dict[str, Path], tmp_path: Path) -> None:
    """The dependencies are those of the environment that runs the tests, whose own copy of the package is not seen."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", built[".whl"], cwd=tmp_path)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    packages = Path(pytest.__file__).parent.parent
    # as a plain entry: path files of that folder, which an editable installation leaves, are not read
    (site / "dependencies.pth").write_text(f"{packages}\n")
    where = run(python, "-c", "import latent_thoughts; print(latent_thoughts.__file__)", cwd=tmp_path)
    assert where.startswith(str(site))
    command = tmp_path / "env" / "bin" / "latent-thoughts"
    assert latent_thoughts.__version__ in run(command, "--version", cwd=tmp_path)
    small = ["train.steps=4", "em.iterations=1", "em.baselines=[]", "sample.k=2", "evaluate.documents=8"]
    small += ["data.world={documents: 30, teacher_documents: 20, held_out_share: 0.02}"]
    settings = [word for setting in small for word in ("--set", setting)]
    run(command, "demo", "--out", "runs/demo", "--seeds", "0", *settings, cwd=tmp_path)
    assert (tmp_path / "runs" / "demo" / "report.html").exists()
    for example in ("em_by_hand.py",):
        shutil.copy(ROOT / "examples" / example, tmp_path)
        assert "M_1: accuracy" in run(python, example, "there", cwd=tmp_path)
