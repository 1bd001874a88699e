"""The page and the figures: hostile texts stay text, and runs that lack something get a report."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hand_made import add_many, add_texts, em_row, results, row, save

from latent_thoughts import em
from latent_thoughts.stages.report import claims, pack, parts, plots, summary, table, texts
from latent_thoughts.stages.report import report as write
from latent_thoughts.stages.report.methods import METHODS
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
        self.text = ""
        self.scripts: dict[str, str] = {}
        self._inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = [tag if tag != "script" else f"#{dict(attrs).get('id', '')}"]

    def handle_data(self, data: str) -> None:
        inside = self._inside[-1] if self._inside else ""
        if inside.startswith("#"):
            self.scripts[inside[1:]] = self.scripts.get(inside[1:], "") + data
        elif inside != "style":
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = []

    @property
    def seeds(self) -> list[dict[str, Any]]:
        """What the page reads first, with its blocks put in their places."""
        seeds = json.loads(self.scripts["overview"])["seeds"]
        for seed in seeds:
            seed["answers"] = None if seed["answers"] is None else self.block(seed["answers"])
            for loop in seed["loops"]:
                loop["index"] = self.block(loop["index"])
        return seeds

    def block(self, number: int) -> Any:
        return json.loads(gzip.decompress(base64.b64decode(self.scripts[f"block-{number}"])))


def test_a_folder_without_results_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no results\.json") as error:
        write(tmp_path)
    assert "\n" not in str(error.value) and "latent-thoughts evaluate" in str(error.value)
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no rows"):
        write(tmp_path)


def test_identical_draws_are_one_entry(tmp_path: Path) -> None:
    run = save(tmp_path, [row("warm_start"), em_row(iteration=1), em_row(iteration=2)])
    add_texts(run)
    loop = texts.read(run, summary.load(run))[0].loops[0]
    assert list(loop.steps) == [1, 2]
    (document,) = loop.documents("corpus-00000.parquet")
    question, text = document["chunks"]
    assert (question["text"], question["steps"]) == ("where? in den .", {})
    assert (text["text"], text["oracle"]) == ("there in den .", "in den .")
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
    add_many(run / "other", 30)
    shutil.copy(run / "other" / "iter_01" / "sample" / "posterior-00000.parquet", run / "iter_01" / "sample")
    shutil.copy(run / "other" / "prepare" / "corpus-00000.parquet", run / "prepare")
    write(run, 20)
    (loop,) = Page(run / "report.html").seeds[0]["loops"]
    steps = loop["index"]["steps"]
    assert [n is not None for n in steps["2"]["ess"]] == [False] * 12 + [True]
    assert [n is not None for n in steps["1"]["ess"]] == [True] * 12 + [False]


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    rows = [row("warm_start"), row(HOSTILE), em_row(iteration=1), em_row(iteration=2)]
    run = save(tmp_path, rows, torch=HOSTILE)
    (run / "recipe.yaml").write_text(f"# {HOSTILE}\n", encoding="utf-8")
    add_texts(run, HOSTILE)
    write(run)
    page = Page(run / "report.html")
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [script.get("type") for script in scripts if script] == ["application/json", *["text/plain"] * 3]
    assert len([script for script in scripts if not script]) == 1
    assert not [tag for tag, _ in page.tags if tag in ("img", "iframe", "textarea", "link", "object")]
    assert HOSTILE in page.text
    assert not re.search("[<>&]", "".join(text for name, text in page.scripts.items() if name))
    seed = page.seeds[0]
    (documents,) = [page.block(n) for n in set(seed["loops"][0]["index"]["documents"]["block"])]
    assert documents[0]["chunks"][1]["oracle"] == HOSTILE
    assert seed["answers"]["texts"][0]["by"]["0"] == {"thought": HOSTILE, "text": HOSTILE, "right": False, "same": True}


def test_the_index_tells_what_the_list_shows(tmp_path: Path) -> None:
    run = save(tmp_path, [em_row(iteration=n) for n in (1, 2)])
    add_many(run, 40, iterations=2)
    write(run)
    (loop,) = (page := Page(run / "report.html")).seeds[0]["loops"]
    index = loop["index"]
    assert len(index["texts"]["text"]) == 160
    assert len(set(index["documents"]["block"])) > 1
    number = index["texts"]["document"].index(5) + 1  # the second of its chunks
    assert index["texts"]["before"][number].endswith(index["texts"]["text"][number - 1])
    document = page.block(index["documents"]["block"][5])[index["documents"]["place"][5]]
    chunk = document["chunks"][index["texts"]["at"][number]]
    assert (document["id"], chunk["text"]) == ("document-5", index["texts"]["text"][number])
    step = {name: column[number] for name, column in index["steps"]["2"].items()}
    # no thought was accepted for document 5; n % 11 - 5 = 0 nats for 10 tokens; every draw has the same weight
    assert step == {"thought": "thought 5.2 0 0", "accepted": False, "same": None, "gain": 0.0, "ess": 2.0, "length": 2}


def test_the_page_tells_of_how_much_it_carries_a_part(tmp_path: Path) -> None:
    run = save(tmp_path, [row("warm_start"), *(em_row(iteration=n) for n in (1, 2))])
    add_texts(run)
    add_many(run, 40, iterations=2)
    write(run, 20)
    (seed,) = Page(run / "report.html").seeds
    assert len(seed["loops"][0]["index"]["texts"]["text"]) == 20
    assert seed["loops"][0]["totals"] == {"1": 160, "2": 160}
    assert seed["answers"]["total"] == len(seed["answers"]["texts"]) == 1


def test_tiles_are_no_rounder_than_their_errors(tmp_path: Path) -> None:
    run = save(tmp_path, [em_row(seed=s, accuracy=a) for s, a in ((0, 0.11), (1, 0.12))], seeds=[0, 1], seed=0)
    write(run)
    said = Page(run / "report.html").text
    assert "EM, iteration 111.5 ± 0.5 %" in said
    assert "seeds0, 1" in said and "seed0" not in said


def test_the_page_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save(tmp_path, [em_row(iteration=n) for n in (1, 2)])
    add_many(run, 60, iterations=2)
    monkeypatch.setattr(pack, "BYTES", 2000)
    write(run)
    few = Page(run / "report.html").seeds[0]["loops"][0]["index"]["texts"]["text"]
    assert len(few) == pack.BLOCK  # the first block, after which there is no room
    write(run, 0)
    assert "</html>" in (run / "report.html").read_text(encoding="utf-8")


def verdict(folder: Path, **claim: Any) -> None:
    of = {"metric": "accuracy", "first": "em", "second": "cell <b>"}
    values = {"holds": True, "difference": 0.41, "ci95": [0.3, 0.52], "n_seeds": 5} | of | claim
    (folder / "verdict.json").write_text(json.dumps({"claims": {"thoughts_<beat>_raw": values}}), encoding="utf-8")


def test_claims_stand_on_the_page_with_their_verdicts(tmp_path: Path) -> None:
    run = save(tmp_path, [em_row()])
    write(run)
    assert 'class="claims"' not in (run / "report.html").read_text(encoding="utf-8")
    verdict(run)
    write(run)
    said = Page(run / "report.html").text
    assert "Thoughts <beat> rawholds+41.0 points" in said
    assert "Accuracy: EM − <b>95 % interval +30.0 to +52.0 · 5 seeds" in said
    verdict(run, holds=False, difference=-0.1, ci95=[-0.3, 0.1], metric="bound_per_token.4")
    write(run)
    said = Page(run / "report.html").text
    assert "Thoughts <beat> rawnot shown−0.100 nats per token" in said
    assert "L₄: EM − <b>95 % interval −0.300 to +0.100" in said


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("em_beats_the_papers_e_step", "EM beats the paper’s E-step"),
        ("the_last_iteration_beats_the_first", "The last iteration beats the first"),
    ],
)
def test_claims_are_spelt_as_words(tmp_path: Path, name: str, shown: str) -> None:
    claim = {"holds": True, "difference": 0.4, "ci95": [0.3, 0.5], "n_seeds": 2, "metric": "accuracy"}
    models = {"first": "em K=16", "second": "variant accept_all"}
    (tmp_path / "verdict.json").write_text(json.dumps({"claims": {name: claim | models}}), encoding="utf-8")
    (found,) = claims.read(tmp_path)
    assert (found.name, found.first, found.second) == (shown, "EM K=16", "accept all")


def test_claims_in_one_unit_share_an_axis() -> None:
    """Shares beside nats, on one axis, would be a dot in the middle."""
    made = [
        claims.Claim("a", "em", "raw", m, True, d, 0.9 * d, 1.1 * d, 3) for m, d in (("accuracy", 0.1), ("nll", 9.0))
    ]
    drawn = re.findall(r'circle cx="([\d.]+)%"', claims.cards(made))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("claim", [{"ci95": [0.1]}, {"ci95": None}, {"difference": "much"}, {"difference": math.nan}])
def test_a_verdict_that_is_none_is_named(tmp_path: Path, claim: dict[str, Any]) -> None:
    verdict(save(tmp_path, [em_row()]), **claim)
    with pytest.raises(UserError, match=r"verdict\.json is no verdict"):
        write(tmp_path)


def task(value: float, budget: int | None = None, **more: Any) -> dict[str, Any]:
    accuracy = {"value": value, "se": 0.05, "n": 100, "seeds": 1}
    result = {"budget": budget, "accuracy": accuracy, "thought_tokens": None if budget is None else budget / 2}
    return {"name": "gsm8k", "form": "cot", "shots": 5, "results": [result], **more}


def test_tasks_are_shown(tmp_path: Path) -> None:
    budgets = task(0.2, 0, form="latent")
    budgets["results"] += task(0.6, 64)["results"]
    rows = [row("warm_start", tasks=[task(0.25)]), em_row(tasks=[task(0.5), budgets])]
    run = save(tmp_path, rows)
    write(run)
    said = Page(run / "report.html").text
    assert "gsm8kcot, shots 5100 questions25.0 ± 5.0 %" in said
    assert "gsm8klatent, shots 5≤ 64 (32)100 questions60.0 ± 5.0 %" in said
    drawn = {path.stem for path in (run / "figures").glob("*.svg")}
    assert {"tasks", "budget_1_gsm8k_latent_shots_5"} <= drawn
    assert "budget_0_gsm8k_cot_shots_5" not in drawn


def test_tasks_over_seeds(tmp_path: Path) -> None:
    rows = [em_row(seed=s, tasks=[task(v)]) for s, v in ((0, 0.4), (1, 0.6))]
    shown = table.tasks_table(results(tmp_path, rows))
    assert shown is not None
    assert shown.lines[0][2][-2:] == ["2 seeds", "50.0 ± 10.0 %"]


def test_tasks_that_were_asked_otherwise_are_not_averaged(tmp_path: Path) -> None:
    """Of results that differ in their budgets alone, which answer alike, one counts."""
    short, long = task(0.1, 8, form="latent"), task(0.1, 8, form="latent")
    long["results"] += task(0.3, 64)["results"]
    asked = [task(0.4), task(0.8, samples=4, temperature=0.6), task(0.9, shots=0, fine_tuned=True), short, long]
    shown = table.tasks_table(results(tmp_path, [em_row(tasks=asked)]))
    assert shown is not None
    assert [(cells[2], cells[3], cells[5]) for *_, cells in shown.lines] == [
        ("cot, shots 5", "", "40.0 ± 5.0 %"),
        ("cot, shots 5, samples 4, temperature 0.6", "", "80.0 ± 5.0 %"),
        ("cot, fine-tuned", "", "90.0 ± 5.0 %"),
        ("latent, shots 5", "≤ 8 (4)", "10.0 ± 5.0 %"),
        ("latent, shots 5", "≤ 64 (32)", "30.0 ± 5.0 %"),
    ]


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
        *("accuracy", "accuracy_by_tokens", "accuracy_by_time", "accuracy_by_samples"),
        *("bound", "bound_by_tokens", "bound_by_time", "bound_by_samples"),
        *("accuracy_known", "accuracy_unknown", "cost", "health_shares", "health_draws", "health_gain"),
    } == names
    assert all("style=" not in figure.svg and "currentColor" in figure.svg for figure in drawn)


def texts_of(figure: Any) -> set[str]:
    """Every text of a figure that was drawn; none of them begins or ends outside."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    places = [text.get_window_extent(canvas.get_renderer()) for text in shown]
    assert all(place.x0 > 0 and place.x1 <= figure.bbox.width for place in places)
    return {text.get_text() for text in shown}


def test_small_gains_and_single_iterations_can_be_read(tmp_path: Path) -> None:
    found = results(tmp_path, [em_row(gain_per_token=0.0032)])
    chart = next(f for f in parts.figures(found) if f.name == "health_gain")
    shown = texts_of(plots.draw(chart))
    assert "● 0.0032  gain" in shown
    assert {"0.00320", "1"} <= shown and not [text for text in shown if text.startswith(("0.9", "1."))]
    several = results(tmp_path, [row("warm_start"), *(em_row(iteration=n) for n in (1, 2))])
    shown = texts_of(plots.draw(next(f for f in parts.figures(several) if f.name == "accuracy")))
    assert {"start", "1", "2", "100 %"} <= shown and "0.5" not in shown


def test_a_single_cost_has_three_digits(tmp_path: Path) -> None:
    for tokens, shown in ((1_234_567, "1.23"), (12_345_678, "12.3"), (3_000_000, "3"), (1_234_567_890, "1235")):
        assert shown in drawn(tmp_path, "accuracy_by_tokens", [em_row(train_tokens=tokens)])


def drawn(tmp_path: Path, name: str, rows: list[dict[str, Any]]) -> set[str]:
    """The texts of one figure."""
    found = next(figure for figure in parts.figures(results(tmp_path, rows)) if figure.name == name)
    return texts_of(plots.draw(found))


def test_accuracies_that_round_alike_are_told_apart(tmp_path: Path) -> None:
    shown = drawn(tmp_path, "accuracy", [row("oracle", accuracy=0.115), em_row(accuracy=0.12), row("raw", accuracy=1)])
    assert {"▲ 11.5 %  oracle thoughts", "● 12.0 %  EM", "● 100.0 %  raw text"} <= shown


def test_few_right_answers_have_a_scale_of_their_own(tmp_path: Path) -> None:
    few = [row("warm_start", accuracy=0.03, accuracy_n=1000), em_row(accuracy=0.05, accuracy_n=1000)]
    assert {"0.0 %", "4.5 %"} <= drawn(tmp_path, "accuracy", few)
    assert "100 %" in drawn(tmp_path, "accuracy", [*few, row("oracle", accuracy=0.3)])
    assert {"0.00 %", "1.00 %"} <= drawn(tmp_path, "accuracy", [em_row(accuracy=0.0)])


def test_many_iterations_begin_where_the_first_is(tmp_path: Path) -> None:
    many = [em_row(iteration=n) for n in range(1, 41)]
    shown = drawn(tmp_path, "accuracy", many)
    assert {"5", "40"} <= shown and not {"start", "0"} & shown
    assert {"start", "5", "40"} <= drawn(tmp_path, "accuracy", [row("warm_start"), *many])


def test_figures_that_stand_together_have_the_same_decimals(tmp_path: Path) -> None:
    bounds = {"1": -1.0, "2": -1.05, "4": -0.5, "8": -0.25, "16": -0.125}
    shown = drawn(tmp_path, "bound", [em_row(iteration=n, bound_per_token=bounds) for n in (1, 2)])
    assert {"▼ −1.00  EM, L₁", "▲ −1.05  EM, L₂", "● −0.12  EM, L₁₆", "× −1.25  EM, no thought"} <= shown
    assert len({len(text) for text in shown if re.fullmatch(r"−[\d.]+", text)}) == 1


def test_methods_that_share_a_colour_differ_in_dash_or_marker() -> None:
    looks = [(look.colour, look.marker) for look in METHODS.values()]
    assert len(set(looks)) == len(looks)
    assert set(METHODS) == set(em.METHODS)


@pytest.mark.parametrize("name", ["tasks", "cost"])
def test_long_names_keep_their_first_letters(tmp_path: Path, name: str) -> None:
    model = "m" * 40
    rows = [row(m, tasks=[task(0.3)]) for m in ("warm_start_matched", model)]
    chart = next(f for f in parts.figures(results(tmp_path, rows)) if f.name == name)
    shown = texts_of(plots.draw(chart))
    assert any(text.endswith("m" * 30) for text in shown)


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


@pytest.mark.parametrize("held", [[], {"rows": {}}, {"rows": ["em", 1]}, {"rows": [None]}])
def test_results_that_are_none_are_named(tmp_path: Path, held: Any) -> None:
    (tmp_path / "results.json").write_text(json.dumps(held))
    with pytest.raises(UserError, match=r"results\.json holds no rows"):
        write(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    run = save(tmp_path, [em_row()])
    add_texts(run)
    (run / "prepare" / "corpus-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"corpus-00000\.parquet is damaged"):
        write(run)


def test_a_demo_shows_every_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [em_row(seed=s, iteration=n, accuracy=0.5 + s / 10) for s in (0, 1) for n in (1, 2)]
    save(tmp_path, rows, seeds=[0, 1])
    for seed in (0, 1):
        add_texts(tmp_path / f"seed_{seed}")
    add_texts(tmp_path / "seed_7")  # of an earlier demo, not of these results
    write(tmp_path)
    assert [seed["name"] for seed in Page(tmp_path / "report.html").seeds] == ["seed 0", "seed 1"]
    shown = capsys.readouterr().out
    assert "55.0 ± 5.0 %" in shown and "report.html" in shown
