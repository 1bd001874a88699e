"""The page in a real browser: it is quick and smooth with 10,000 chunks, is moved by keys, runs nothing that texts
say, asks for nothing from elsewhere, and can be used by everyone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hand_made import add_many, add_texts, em_row, parquet, row, save

from latent_thoughts.data.records import DOCUMENTS
from latent_thoughts.stages.evaluate.held_out import ANSWERS
from latent_thoughts.stages.report import report

pytestmark = pytest.mark.browser

HOSTILE = (
    "<script>document.title='owned'</script></script></textarea><img src=x onerror=\"document.title='owned'\"> "
    "\u202eעברית שלום 🏰 " + "long" * 2500
)
SIZES = [(1280, 900), (390, 844)]
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with 10,000 chunks in three iterations."""
    rows = [row("raw_tokens"), row("warm_start"), *(em_row(iteration=n, samples=4) for n in (1, 2, 3))]
    run = save(tmp_path_factory.mktemp("big"), rows)
    add_many(run, 2500)
    report(run)
    return run / "report.html"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [row("warm_start"), row(HOSTILE), em_row(iteration=1), em_row(iteration=2)]
    run = save(tmp_path_factory.mktemp("hostile"), rows, torch=HOSTILE)
    (run / "recipe.yaml").write_text(f"# {HOSTILE}\n", encoding="utf-8")
    add_texts(run, HOSTILE)
    report(run)
    return run / "report.html"


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a thought of 24,000 characters, which has been cut, about a text as long; and 30 of 60 answers."""
    run = save(tmp_path_factory.mktemp("long"), [row("warm_start"), em_row(iteration=1), em_row(iteration=2)])
    add_texts(run, " ".join(f"step {n:6}" for n in range(2000)), "long")
    answer = {"question": "where?", "thought": "there", "text": "hall", "answer": "hall", "gold": "den", "oracle": None,
              "right": False, "known": None}  # fmt: skip
    answers = [{"doc_id": f"h{n}", **answer} for n in range(60)]
    parquet(run / "iter_02" / "evaluate" / "answers.parquet", answers, ANSWERS)
    (run / "iter_00" / "evaluate" / "answers.parquet").unlink()
    report(run)
    return run / "report.html"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with 40 iterations, and 6 of 10 texts."""
    rows = [row("warm_start"), *(em_row(iteration=n) for n in range(1, 41))]
    run = save(tmp_path_factory.mktemp("many"), rows)
    add_many(run, 5, iterations=40, chunks=2, draws=2)
    report(run, 6)
    return run / "report.html"


@pytest.fixture
def opened(chromium: Any) -> Iterator[Open]:
    """Opens a page; at the end it has logged no error and no violation of its policy, and asked for nothing else."""
    pages: list[tuple[Any, str]] = []
    said: list[str] = []
    asked: list[str] = []

    def open_page(path: Path, size: tuple[int, int] = SIZES[0], scheme: str = "light") -> Any:
        page = chromium.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: asked.append(request.url))
        page.set_default_timeout(10_000)
        pages.append((page, path.as_uri()))
        page.goto(path.as_uri())
        page.wait_for_selector("#reader[data-ready]", timeout=20_000)
        return page

    yield open_page
    for page, _ in pages:
        page.close()
    assert said == []
    assert asked == [address for _, address in pages]


def status(page: Any) -> str:
    return page.inner_text(".status")


def selected(page: Any) -> str:
    return page.inner_text('[role=option][aria-selected="true"] .title')


def test_10_000_chunks_are_a_list_of_few_elements(big: Path, opened: Open) -> None:
    page = opened(big)
    assert status(page) == "10,000 of 10,000 texts"
    assert "Document 0, part 1" in selected(page)
    assert page.locator("[role=option]").count() < 60
    page.focus(".list")
    page.keyboard.press("End")
    page.get_by_text("10,000 of 10,000", exact=True).wait_for()
    assert "Document 2499, part 4" in selected(page)
    page.locator(".document .now.chunk", has_text="Document 2499, part 4").wait_for()
    assert page.locator("[role=option]").count() < 60
    page.evaluate("document.querySelector('.list').scrollTop = 5000 * 58")
    page.locator("[role=option]", has_text="Document 1250, part 1").first.wait_for()


def test_filters_search_and_order(big: Path, opened: Open) -> None:
    page = opened(big)
    page.select_option("#choose-show", "rejected")
    assert status(page) == f"{4 * 833:,} of 10,000 texts"  # every third document
    page.select_option("#choose-show", "known")
    assert status(page) == "5,000 of 10,000 texts"
    page.select_option("#choose-show", "all")
    page.fill("#search", "thought 17.3")
    assert status(page) == "1 of 10,000 texts · still searching"
    page.locator(".status", has_text=re.compile("^1 of 10,000 texts$")).wait_for()
    page.fill("#search", "no such words")
    assert status(page) == "0 of 10,000 texts"
    assert page.inner_text(".place b") == "Nothing matches"
    page.fill("#search", "")
    page.click(".toggle")
    page.fill("[aria-label='Gain, nats a token, at least']", "0.5")  # n % 11 = 10
    assert status(page) == f"{4 * 227:,} of 10,000 texts"
    page.fill("[aria-label='Effective draws, at most']", "1")
    some = int(status(page).split(" ")[0].replace(",", ""))
    assert some == 4 * len([n for n in range(2500) if n % 11 == 10 and n % 4 == 0])
    page.fill("[aria-label='Thought, tokens, at least']", "6")  # m + iteration of draw m, the third iteration
    assert status(page) == f"{len(accepted_and_long())} of 10,000 texts"
    page.click(".filters .last button")
    assert status(page) == "10,000 of 10,000 texts"
    page.select_option("#choose-order", "length down")
    page.locator(".draw.chosen .origin", has_text=re.compile("6 tokens$")).wait_for()


def accepted_and_long() -> list[tuple[int, int]]:
    """Texts that the three ranges of the test leave: chunk `at` chose draw at % 4 where any was accepted."""
    left = [n for n in range(2500) if n % 11 == 10 and n % 4 == 0 and n % 3 != 2]
    return [(n, at) for n in left for at in range(1, 5) if at % 4 + 3 >= 6]


def test_keys(big: Path, opened: Open) -> None:
    page = opened(big)
    place = page.locator(".place b")
    for key, shown in (("j", "2"), ("j", "3"), ("k", "2"), ("G", "10,000"), ("g", "1"), ("k", "1")):
        page.keyboard.press(key)
        assert place.inner_text() == f"{shown} of 10,000"
    assert page.input_value("#turn") == "2"
    page.keyboard.press("h")
    assert page.input_value("#turn") == "1"
    page.keyboard.press("/")
    page.keyboard.type("gj document 7,")
    assert page.input_value("#search") == "gj document 7,"
    page.keyboard.press("Escape")
    assert page.input_value("#search") == ""
    assert page.evaluate("document.activeElement.className") == "list"
    page.keyboard.press("PageDown")
    assert int(place.inner_text().split(" ")[0]) > 5
    page.keyboard.press("?")
    assert page.locator("dialog[open] kbd").count() >= 8
    page.keyboard.press("j")  # not behind the dialog's back
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0


def test_slider_shows_the_same_text_in_another_iteration(big: Path, opened: Open) -> None:
    page = opened(big)
    page.keyboard.press("j")
    page.locator(".thought.now", has_text=re.compile(r"thought 0\.2 2 2 2$")).wait_for()
    chunk = page.inner_text(".document .now.chunk")
    page.focus("#turn")
    page.keyboard.press("Home")
    page.locator(".thought.now", has_text=re.compile(r"thought 0\.2 2$")).wait_for()
    assert page.inner_text(".document .now.chunk") == chunk
    assert page.get_attribute("#turn", "aria-valuetext") == "Iteration 1"
    page.click(".through button >> nth=1")
    page.locator(".thought.now", has_text=re.compile(r"thought 0\.2 2 2$")).wait_for()
    assert page.input_value("#turn") == "1"
    assert page.locator(".through mark").all_inner_texts() == ["2", "2"]  # what either iteration added


def test_a_document_shows_all_its_thoughts_and_leads_to_their_draws(big: Path, opened: Open) -> None:
    page = opened(big)
    assert page.locator(".document .thought").count() == 4
    assert page.locator(".document .chunk").count() == 5
    page.locator(".thought .go").last.click()
    page.locator(".place b", has_text="4 of 10,000").wait_for()
    draws = page.locator(".draw")
    assert draws.count() == 4
    page.locator(".draw.chosen .text", has_text=re.compile(r"^thought 0\.4 0 0 0$")).wait_for()
    assert "1 × posterior · −0.50 nats a token (−5.0) · 3 tokens" in draws.first.inner_text()
    assert draws.first.get_attribute("class") == "draw chosen tinted loss"


@pytest.mark.parametrize("size", SIZES)
def test_hostile_texts_are_shown_and_run_nothing(hostile: Path, opened: Open, size: tuple[int, int]) -> None:
    page = opened(hostile, size)
    title = page.title()
    assert "owned" not in title and title.startswith("EM answers")
    page.locator(".document .thought .more").click()
    assert page.text_content(".document .thought .text") == HOSTILE
    assert page.locator("#reader :is(img, script, textarea, iframe)").count() == 0
    page.locator(".tabs button", has_text="Held-out answers").click()
    page.locator(".models li").first.wait_for()
    assert "</textarea><img" in page.text_content(".document .text")
    assert page.title() == title
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_a_right_to_left_thought_runs_from_the_right(tmp_path: Path, opened: Open) -> None:
    run = save(tmp_path, [row("warm_start"), em_row(iteration=1), em_row(iteration=2)])
    add_texts(run, "שלום עולם 🏰")
    report(run)
    page = opened(run / "report.html")
    thought = page.locator(".draw .text").first
    assert thought.text_content() == "שלום עולם 🏰"
    assert thought.evaluate("node => getComputedStyle(node).direction") == "rtl"


def test_a_right_to_left_document_does_too(tmp_path: Path, opened: Open) -> None:
    run = save(tmp_path, [row("warm_start"), em_row(iteration=1), em_row(iteration=2)])
    add_texts(run, "שלום")
    words = [{"start": n, "text": "שלום עולם 🏰 ", "ids": [1], "target": n > 0, "thoughts": []} for n in (0, 1)]
    document = {"id": "שלום", "source": "raw", "meta": "{}", "chunks": words}
    parquet(run / "prepare" / "corpus-00000.parquet", [document], DOCUMENTS)
    report(run)
    page = opened(run / "report.html")
    place = "node => node.getBoundingClientRect()"
    whole = page.locator(".document").evaluate(place)
    for part in (page.locator(".document .chunk").last, page.locator(".document .thought .text")):
        assert whole["right"] - part.evaluate(place)["right"] < 20
    label = page.locator(".document .thought .label").evaluate("node => getComputedStyle(node).direction")
    assert label == "ltr"


def test_a_cut_thought_says_so_and_is_found_by_what_is_not_shown(long: Path, opened: Open) -> None:
    page = opened(long)
    thoughts = page.locator(".through .text")
    assert thoughts.count() == 2
    for shown in thoughts.all_inner_texts():
        assert shown.startswith("step      0") and len(shown) < 1700
        assert re.search(r"… 18,\d{3} more characters$", shown)
    page.fill("#search", "step   1500")  # behind the beginnings that the index has
    page.locator(".status", has_text=re.compile("^1 of 1 texts$")).wait_for()
    page.fill("#search", "step   1999")  # was cut away
    assert status(page) == "0 of 1 texts"


def test_the_page_says_of_how_much_it_carries_a_part(long: Path, many: Path, opened: Open) -> None:
    page = opened(many)
    assert status(page) == "6 of 6 texts here, of 10 thought about"
    page = opened(long)
    assert status(page) == "1 of 1 texts"
    page.locator(".tabs button", has_text="Held-out answers").click()
    page.locator(".models li").first.wait_for()
    assert status(page) == "30 of 30 questions here, of 60 asked"
    assert page.locator(".legend").is_hidden()  # of gains; here the colours are of right and wrong
    page.locator(".tabs button", has_text="Thoughts").click()
    page.locator(".document .thought").first.wait_for()
    assert page.locator(".legend").is_visible()


@pytest.mark.parametrize("size", SIZES)
def test_40_iterations_have_room_on_the_slider(many: Path, opened: Open, size: tuple[int, int]) -> None:
    page = opened(many, size)
    marks = page.locator(".marks span")
    seen = "marks => marks.filter(m => getComputedStyle(m).visibility === 'visible').map(m => m.textContent)"
    for chosen, told in (("20", ["1", "21", "40"]), ("38", ["1", "39"]), ("0", ["1", "40"])):
        page.fill("#turn", chosen)
        assert marks.evaluate_all(seen) == told
        assert page.locator(".marks .now").text_content() == str(int(chosen) + 1)
    slider, reader = (page.locator(name).bounding_box() for name in ("#turn", "#reader"))
    assert slider["x"] + slider["width"] <= reader["x"] + reader["width"]


def test_buttons_in_texts_look_as_they_should(big: Path, opened: Open) -> None:
    page = opened(big)
    look = "(node, name) => getComputedStyle(node)[name]"
    go = page.locator(".thought .go").first
    assert (go.evaluate(look, "color"), go.evaluate(look, "fontSize")) == ("rgb(31, 92, 184)", "13.44px")
    page.select_option("#choose-show", "rejected")
    none = page.locator(".thought.now.none")
    assert none.evaluate(look, "borderLeftStyle") == "dotted" and none.evaluate(look, "borderTopWidth") == "0px"
    page.click(".toggle")
    ends = page.locator("[data-name=length] input").all()
    assert [end.get_attribute("placeholder") for end in ends] == ["3", "6"]  # tokens are whole
    assert page.locator("[data-name=gain] input").first.get_attribute("placeholder") == "−0.50"


@pytest.mark.parametrize("size", [(320, 640), SIZES[1]])
def test_figures_can_be_read_on_a_phone(big: Path, opened: Open, size: tuple[int, int]) -> None:
    """By scrolling them, not the page."""
    page = opened(big, size)
    figure = page.locator("figure:visible").first
    assert figure.locator("svg").bounding_box()["width"] >= 520
    assert figure.bounding_box()["width"] < size[0]
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    region = figure.get_by_role("region")
    region.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(300)  # it glides
    assert region.evaluate("node => node.scrollLeft") > 0


def test_tables_are_whole_in_print(tmp_path: Path, opened: Open) -> None:
    run = save(tmp_path, [row("warm_start"), em_row(accuracy_known=0.5, accuracy_unknown=0.25)])
    add_texts(run)
    report(run)
    page = opened(run / "report.html", (700, 900))
    page.emulate_media(media="print")
    for table in page.locator("table").all():
        assert table.bounding_box()["width"] <= 664


def test_the_policy_forbids_what_the_page_never_does(big: Path, chromium: Any) -> None:
    page = chromium.new_page()
    page.goto(big.as_uri())
    asked = "fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')"
    refused = "new Promise(end => document.addEventListener('securitypolicyviolation', e => end(e.violatedDirective)))"
    assert page.evaluate(f"Promise.all([{refused}, {asked}])") == ["connect-src", "refused"]
    page.close()


def test_curves_are_drawn_against_what_is_chosen(big: Path, opened: Open) -> None:
    page = opened(big)
    shown = lambda: page.locator(".curves figure:visible svg").first.get_attribute("aria-label")  # noqa: E731
    first = page.locator(".curves .figures:visible").get_attribute("data-against")
    assert first == "iteration"
    assert "Held-out answers" in shown()
    page.get_by_label("tokens", exact=True).check(force=True)
    assert page.locator(".curves .figures:visible").get_attribute("data-against") == "tokens"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing_serious(
    big: Path, hostile: Path, opened: Open, size: tuple[int, int], scheme: str, tmp_path: Path
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    def check(page: Any) -> None:
        found = Axe().run(page).response["violations"]
        assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == [], found

    page = opened(big, size, scheme)
    page.click(".toggle")
    page.locator(".document .thought").first.wait_for()
    check(page)
    page.evaluate("document.querySelector('.help').showModal()")
    check(page)
    page = opened(hostile, size, scheme)
    page.locator(".tabs button", has_text="Held-out answers").click()
    page.locator(".models li").first.wait_for()
    check(page)
