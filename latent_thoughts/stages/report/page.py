"""One self-contained page: no network, no inline handlers, no markup from data.

Figures and tables are written here, escaped. Texts of models and corpora travel as JSON, compressed, and reach the
page through textContent alone. The Content-Security-Policy allows this page's own style and script by their hashes,
and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from latent_thoughts.stages.report import claims, table, texts
from latent_thoughts.stages.report.headline import headline
from latent_thoughts.stages.report.pack import TEXTS, pack
from latent_thoughts.stages.report.plots import Drawn
from latent_thoughts.stages.report.summary import LOOPS, Line, Results
from latent_thoughts.store import atomic

STYLES = ("report.css", "reader.css")
SCRIPTS = ("base.js", "list.js", "thoughts.js", "answers.js", "reader.js")
AGAINST = {"iteration": "iteration", "tokens": "tokens", "time": "time", "samples": "thoughts a text (K)"}


def write_page(results: Results, folder: Path, figures: list[Drawn], kept: int = TEXTS) -> None:
    """Writes folder/report.html with the draws of at most `kept` chunks."""
    packed = pack(texts.read(folder, results), kept)
    style, script = ("".join(map(_asset, names)) for names in (STYLES, SCRIPTS))
    said = headline(results)
    parts = {
        "csp": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "title": escape(said.title),
        "claims": claims.cards(claims.read(folder)),
        "verdicts": "".join(f"<li>{escape(v)}</li>" for v in said.verdicts),
        "tiles": "".join(_tile(line) for m in results.methods if (line := results.final(m))),
        "table": _table(table.main_table(results), "Results"),
        "samples": _titled("More thoughts per text", table.samples_table(results))
        + _titled("Other settings", table.variants_table(results))
        + _figures(f for f in figures if f.group == "variants")
        + _titled("More raw text", table.documents_table(results)),
        "meanings": "".join(
            f'<div class="m-{method}"><dt>{escape(name)}</dt><dd>{escape(meaning)}</dd></div>'
            for method, name, meaning in table.meanings(results)
        ),
        "curves": _curves(figures),
        "tasks": _section("tasks", "Tasks", figures, _titled("", table.tasks_table(results))),
        "health": _section("health", "Cost and health", figures),
        "hidden": "" if packed.any else " hidden",
        "recipe": escape(results.recipe_text or "recipe.yaml is missing"),
        "versions": _versions(results.run),
        "overview": script_json(packed.overview),
        "blocks": "\n".join(
            f'<script type="text/plain" id="block-{n}">{block}</script>' for n, block in enumerate(packed.blocks)
        ),
    }
    parts["links"] = _links(parts, packed.any)
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
    return resources.files("latent_thoughts.stages.report").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _plain(value: Any) -> str:
    return escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _versions(run: dict[str, Any]) -> str:
    """What the run was made with; the seed of the recipe only where no seeds are told."""
    shown = {name: value for name, value in run.items() if name != "seed" or not run.get("seeds")}
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{_plain(v)}</dd></div>" for k, v in shown.items())


def _links(parts: dict[str, str], texts: bool) -> str:
    """The page's parts that there are."""
    there = {
        "results": ("Results", True),
        "curves": ("Curves", bool(parts["curves"])),
        "tasks": ("Tasks", bool(parts["tasks"])),
        "health": ("Cost and health", bool(parts["health"])),
        "thoughts": ("Thoughts", texts),
        "run": ("Recipe", True),
    }
    return "".join(f'<a href="#{name}">{label}</a>' for name, (label, is_there) in there.items() if is_there)


def _tile(line: Line) -> str:
    """One model's accuracy in large figures, as in the table; none where it has no accuracy."""
    found = line.mean("accuracy")
    if found is None:
        return ""
    error = f" ± {100 * found.error:.1f}" if found.error is not None else ""
    after = f", iteration {line.iteration}" if line.method in LOOPS else ""
    return (
        f'<div class="tile m-{escape(line.method)}"><dt>{escape(line.name + after)}</dt>'
        f"<dd>{100 * found.value:.1f}<small>{error} %</small></dd></div>"
    )


def _scroll(wide: str, label: str) -> str:
    """Scrolls sideways on a small screen, by keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{wide}</div>'


def _table(shown: table.Table, label: str) -> str:
    heads = "".join(f'<th scope="col" title="{escape(hint)}">{escape(head)}</th>' for head, hint in shown.heads)
    rows = []
    for method, emphasis, (name, *cells) in shown.lines:
        kind = f"m-{escape(method)} {emphasis}".strip()
        body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr class="{kind}"><th scope="row"><i></i>{escape(name)}</th>{body}</tr>')
    notes = "".join(f"<li>{escape(note)}</li>" for note in shown.notes)
    whole = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'{_scroll(whole, label)}<ul class="notes">{notes}</ul>'


def _titled(title: str, shown: table.Table | None) -> str:
    if shown is None:
        return ""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return f"{head}{_table(shown, title or 'Results of tasks')}"


def _figures(figures: Iterable[Drawn], against: str = "") -> str:
    drawn = "".join(
        f"<figure>{_scroll(f.svg, f.title)}<figcaption>{escape(f.caption)}</figcaption></figure>" for f in figures
    )
    mark = f' data-against="{against}"' if against else ""
    return f'<div class="figures"{mark}>{drawn}</div>' if drawn else ""


def _section(name: str, title: str, figures: list[Drawn], before: str = "") -> str:
    """A part of the page with its figures; none where it has nothing to show."""
    drawn = _figures(f for f in figures if f.group == name)
    if not drawn and not before:
        return ""
    return f'<section id="{name}" aria-labelledby="h-{name}"><h2 id="h-{name}">{title}</h2>{before}{drawn}</section>'


def _curves(figures: list[Drawn]) -> str:
    """Accuracy and likelihood; what they are drawn against is chosen, without a script."""
    there = [axis for axis in AGAINST if any(f.group == axis for f in figures)]
    if not there:
        return ""
    choices = "".join(
        f'<label><input type="radio" name="against" value="{axis}"{" checked" if n == 0 else ""}>'
        f"<span>{AGAINST[axis]}</span></label>"
        for n, axis in enumerate(there)
    )
    drawn = "".join(_figures((f for f in figures if f.group == axis), axis) for axis in there)
    known = _figures(f for f in figures if f.group == "known")
    return (
        '<section id="curves" class="curves" aria-labelledby="h-curves"><h2 id="h-curves">Curves</h2>'
        f'<fieldset class="against"><legend>Drawn against</legend>{choices}</fieldset>{drawn}{known}</section>'
    )
