"""One self-contained page: no network, no inline handlers, no markup from data.

Figures and tables are written here, escaped. Texts of models and corpora travel as JSON and reach the
page through textContent alone. The Content-Security-Policy allows this page's own style and script by
their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from latent_thoughts.stages.report import table, texts
from latent_thoughts.stages.report.headline import headline
from latent_thoughts.stages.report.plots import Drawn
from latent_thoughts.stages.report.summary import LOOPS, Line, Results
from latent_thoughts.store import atomic


def write_page(results: Results, folder: Path, figures: list[Drawn]) -> None:
    """Writes folder/report.html."""
    found = texts.read(folder, results)
    style, script = _asset("page.css"), _asset("views.js") + _asset("page.js")
    said = headline(results)
    parts = {
        "csp": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "title": escape(said.title),
        "verdicts": "".join(f"<li>{escape(v)}</li>" for v in said.verdicts),
        "tiles": "".join(_tile(line) for m in results.methods if (line := results.final(m))),
        "table": _table(table.main_table(results), "Results"),
        "samples": _samples(results),
        "meanings": "".join(
            f'<div class="m-{method}"><dt>{escape(name)}</dt><dd>{escape(meaning)}</dd></div>'
            for method, name, meaning in table.meanings(results)
        ),
        "figures": "".join(f"<figure>{f.svg}<figcaption>{escape(f.caption)}</figcaption></figure>" for f in figures),
        "hidden": "" if found.any else " hidden",
        "recipe": escape(results.recipe_text or "recipe.yaml is missing"),
        "versions": "".join(f"<div><dt>{escape(k)}</dt><dd>{_plain(v)}</dd></div>" for k, v in results.run.items()),
        "data": script_json({"seeds": found.seeds}),
    }
    html = fill(_asset("page.html"), parts)
    with atomic(folder / "report.html") as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))


def fill(template: str, parts: dict[str, str]) -> str:
    """Replaces {{name}} in one pass, so that braces in the parts stay what they are."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def script_json(value: Any) -> str:
    """JSON that cannot end its script element, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    return resources.files("latent_thoughts.stages.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _plain(value: Any) -> str:
    return escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _tile(line: Line) -> str:
    """One model's accuracy in large figures; none where it has no accuracy."""
    found = line.mean("accuracy")
    if found is None:
        return ""
    error = f" ± {100 * found.error:.1f}" if found.error is not None else ""
    after = f", iteration {line.iteration}" if line.method in LOOPS else ""
    return (
        f'<div class="tile m-{escape(line.method)}"><dt>{escape(line.name + after)}</dt>'
        f"<dd>{100 * found.value:.0f}<small>{error} %</small></dd></div>"
    )


def _table(shown: table.Table, label: str) -> str:
    """Scrolls sideways on a small screen, by keyboard too."""
    heads = "".join(f'<th scope="col" title="{escape(hint)}">{escape(head)}</th>' for head, hint in shown.heads)
    rows = []
    for method, emphasis, (name, *cells) in shown.lines:
        kind = f"m-{escape(method)} {emphasis}".strip()
        body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr class="{kind}"><th scope="row"><i></i>{escape(name)}</th>{body}</tr>')
    notes = "".join(f"<li>{escape(note)}</li>" for note in shown.notes)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table><thead><tr>{heads}</tr>'
        f'</thead><tbody>{"".join(rows)}</tbody></table></div><ul class="notes">{notes}</ul>'
    )


def _samples(results: Results) -> str:
    further = table.samples_table(results)
    if further is None:
        return ""
    return f"<h3>More thoughts per text</h3>{_table(further, 'Results by K')}"
