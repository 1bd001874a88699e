"""The page and the figures: hostile texts stay text, and runs that lack something get a report."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hand_made import add_texts, em_row, results, row, save

from latent_thoughts.stages.report import plots, summary, texts
from latent_thoughts.stages.report import report as write
from latent_thoughts.stages.report.page import script_json
from latent_thoughts.types import UserError

HOSTILE = (
    "</script><script>document.title='owned'</script></textarea><img src=x onerror=alert(1)> \u202eעברית 🏰 {{data}}"
)


class Page(HTMLParser):
    """Collects a page's elements, its text outside scripts, and the data it carries."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.data = ""
        self._inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = [tag if tag != "script" or dict(attrs).get("type") is None else "data"]

    def handle_data(self, data: str) -> None:
        inside = self._inside[-1] if self._inside else ""
        if inside == "data":
            self.data += data
        elif inside not in ("script", "style"):
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = []


def test_a_folder_without_results_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no results\.json") as error:
        write(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no rows"):
        write(tmp_path)


def test_identical_draws_are_one_entry(tmp_path: Path) -> None:
    run = save(tmp_path, [row("warm_start"), em_row(iteration=1), em_row(iteration=2)])
    add_texts(run)
    loop = texts.read(run, summary.load(run)).seeds[0]["loops"][0]
    assert loop["iterations"] == [1, 2]
    (text,) = loop["texts"]
    assert (text["question"], text["answer"], text["oracle"]) == ("where? in den .", "there in den .", "in den .")
    assert not any(draw["chosen"] for draw in text["steps"]["1"]["draws"])
    first, second, third = text["steps"]["2"]["draws"]
    assert (first["text"], first["from"], first["chosen"]) == ("in den .", {"posterior": 1, "prior": 1}, True)
    assert (first["share"], first["gain"], first["same"]) == (0.5, 1.5, True)
    assert (second["share"], second["same"]) == (0.5, False)
    assert (third["share"], third["gain"], third["finished"], third["same"]) == (0.0, None, False, False)


def test_continual_slices_share_the_sample(tmp_path: Path) -> None:
    """Iterations with different shards show texts of each."""
    run = save(tmp_path, [em_row(iteration=1), em_row(iteration=2)])
    add_texts(run)
    second = run / "iter_02" / "sample"
    (second / "posterior-00000.parquet").rename(second / "posterior-00001.parquet")
    shutil.copy(run / "prepare" / "corpus-00000.parquet", run / "prepare" / "corpus-00001.parquet")
    (loop,) = texts.read(run, summary.load(run)).seeds[0]["loops"]
    assert {n for text in loop["texts"] for n in text["steps"]} == {"2"}


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    rows = [row("warm_start"), row(HOSTILE), em_row(iteration=1), em_row(iteration=2)]
    run = save(tmp_path, rows, torch=HOSTILE)
    (run / "recipe.yaml").write_text(f"# {HOSTILE}\n", encoding="utf-8")
    add_texts(run, HOSTILE)
    write(run)
    page = Page(run / "report.html")
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert not [tag for tag, _ in page.tags if tag in ("img", "iframe", "textarea", "link", "object")]
    assert HOSTILE in page.text
    assert not re.search("[<>&\u2028\u2029]", page.data)
    seed = json.loads(page.data)["seeds"][0]
    assert seed["loops"][0]["texts"][0]["oracle"] == HOSTILE
    assert seed["answers"]["texts"][0]["by"]["0"] == {"thought": HOSTILE, "text": HOSTILE, "right": False, "same": True}


def test_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    run = save(tmp_path, [row("warm_start"), em_row()])
    write(run)
    page = Page(run / "report.html")
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert not [a for _, a in page.tags if "style" in a or any(name.startswith("on") for name in a)]
    assert not [a for _, a in page.tags if (a.get("src") or a.get("href") or "#")[0] != "#"]
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))


def test_script_json_round_trips() -> None:
    value = {"text": "</script>&\u2028\u2029<!--"}
    assert json.loads(script_json(value)) == value
    assert not re.search("[<>&\u2028\u2029]", script_json(value))


def test_figures_are_written_and_take_the_pages_colour(tmp_path: Path) -> None:
    rows = [row(m, seed=s, accuracy_known=0.9, accuracy_unknown=0.2) for s in (0, 1) for m in ("warm_start", "oracle")]
    rows += [em_row(s, n, k, accuracy_unknown=0.4) for s in (0, 1) for n in (1, 2) for k in (2, 4)]
    drawn = plots.write_figures(results(tmp_path, rows), tmp_path / "figures")
    names = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert names == {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert {
        "accuracy",
        "accuracy_known",
        "accuracy_unknown",
        "bound",
        "health_shares",
        "health_draws",
        "samples",
    } == names
    assert all("style=" not in figure.svg and "currentColor" in figure.svg for figure in drawn)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row("raw_tokens")],
        [row("warm_start", accuracy=None, accuracy_n=0, bound_per_token={"1": None}, nll_per_token=None)],
        [row("warm_start", accuracy=None), em_row(accuracy=None)],
        [em_row(iteration=1, ess=None, accepted=math.nan, seconds={}, train_tokens=None)],
        [{"method": "em"}],
    ],
)
def test_runs_that_lack_something_get_a_report(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    run = save(tmp_path, rows)
    (run / "recipe.yaml").unlink()
    write(run)
    assert "<h1>" in (run / "report.html").read_text(encoding="utf-8")


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    run = save(tmp_path, [em_row()])
    add_texts(run)
    (run / "prepare" / "corpus-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"corpus-00000\.parquet is damaged"):
        texts.read(run, summary.load(run))


def test_a_demo_shows_every_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [em_row(seed=s, iteration=n, accuracy=0.5 + s / 10) for s in (0, 1) for n in (1, 2)]
    save(tmp_path, rows, seeds=[0, 1])
    for seed in (0, 1):
        add_texts(tmp_path / f"seed_{seed}")
    add_texts(tmp_path / "seed_7")  # of an earlier demo, not of these results
    write(tmp_path)
    data = json.loads(Page(tmp_path / "report.html").data)
    assert [seed["name"] for seed in data["seeds"]] == ["seed 0", "seed 1"]
    shown = capsys.readouterr().out
    assert "55.0 ± 5.0 %" in shown and "report.html" in shown


@pytest.mark.browser
def test_a_browser_renders_it_without_violations(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser")
    run = save(tmp_path / "run", [row("warm_start"), em_row(iteration=1), em_row(iteration=2)])
    add_texts(run, HOSTILE)
    write(run)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
               "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
               "--enable-logging=stderr", "--dump-dom", (run / "report.html").as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr  # script errors and policy violations
    assert "<title>EM answers" in done.stdout
    assert 'class="list"' in done.stdout and "owned'&lt;/script&gt;" in done.stdout
