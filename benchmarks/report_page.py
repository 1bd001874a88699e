"""How long the page of a run takes to load with 10,000 chunks, in headless Chromium; and its screenshots.

    python benchmarks/report_page.py [--json FILE]
    python benchmarks/report_page.py --screenshots docs/images --page runs/demo/report.html

Loaded is what can be read and answers keys: from the navigation to the first text with its draws, as the page itself
notes it. Every repeat is a new browser, without a cache. `search` looks through all
texts, `iteration` is a step of the slider.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "stages" / "report"))
import common
from hand_made import add_many, em_row, row, save

from latent_thoughts.stages.report import report

REPEATS = 7
SIZES = [(1280, 860), (390, 844)]
LOADED = "#reader[data-ready] .draw"
TIMED = """async (change) => {
  const began = performance.now();
  change();
  await new Promise((end) => requestAnimationFrame(() => setTimeout(end)));
  return performance.now() - began;
}"""


def launch(playwright: Any) -> Any:
    names = ("chromium", "chromium-browser", "google-chrome")
    system = next((path for name in names if (path := shutil.which(name))), None)
    return playwright.chromium.launch(executable_path=system, args=["--no-sandbox"])


def measure(playwright: Any, page_path: Path) -> dict[str, float]:
    """Milliseconds of one fresh browser."""
    browser = launch(playwright)
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    page.goto(page_path.as_uri(), wait_until="commit")
    page.wait_for_selector(LOADED)
    found = {"loaded": float(page.get_attribute("#reader", "data-ready"))}
    for name, change in (
        ("search", "() => { const s = document.getElementById('search'); s.value = 'thought 2400'; s.oninput(); }"),
        ("all again", "() => { const s = document.getElementById('search'); s.value = ''; s.oninput(); }"),
        ("iteration", "() => { const t = document.getElementById('turn'); t.value = '0'; t.oninput(); }"),
    ):
        found[name] = page.evaluate(f"({TIMED})({change})")
    browser.close()
    return found


def screenshots(playwright: Any, path: Path, folder: Path) -> None:
    """The top of the page and the reader, in both schemes and sizes."""
    browser = launch(playwright)
    for width, height in SIZES:
        for scheme in ("light", "dark"):
            scale = 1 if width > 400 else 2
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=scale
            )
            page.goto(path.as_uri())
            page.wait_for_selector(LOADED)
            page.screenshot(path=folder / f"report-{scheme}-{width}.png")
            page.select_option("#choose-show", "changed")
            page.evaluate("document.querySelector('#thoughts').scrollIntoView()")
            page.wait_for_timeout(200)
            page.screenshot(path=folder / f"reader-{scheme}-{width}.png")
            page.close()
    browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--screenshots", type=Path)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        if arguments.screenshots:
            screenshots(playwright, arguments.page.resolve(), arguments.screenshots)
            return
        run = save(Path(folder), [row("warm_start"), *(em_row(iteration=n, samples=16) for n in (1, 2, 3))])
        add_many(run, 2500, draws=16)
        report(run)
        page = run / "report.html"
        found = [measure(playwright, page) for _ in range(REPEATS)]
        rows = [common.row("page", name, "ms", [f[name] for f in found]) for name in found[0]]
        rows.append(common.row("page", "size", "MB", [page.stat().st_size / 1e6]))
        common.finish("report_page", common.machine(), rows, {}, arguments.json)


if __name__ == "__main__":
    main()
