"""What of the site is made when it is built: the recipe reference, the list of error messages, and pages that lie in
the root of the repository (mkdocs runs this; see mkdocs.yml)."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import tokenize
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any, get_args

from mkdocs.structure.files import File, Files

from latent_thoughts.config import PRESETS, Recipe
from latent_thoughts.config.base import Section

ROOT = Path(__file__).parent.parent
KINDS = {
    "Positive": "integer, 1 or more",
    "Count": "integer, 0 or more",
    "Seed": "integer, 0 or more",
    "Share": "number from 0 to 1",
    "Fraction": "number from 0 to below 1",
    "Weight": "number, 0 or more",
    "Pattern": "regular expression",
    "Amount": "number",
    "str": "text",
    "bool": "true or false",
    "int": "integer",
    "float": "number",
    "None": "null",
}


def on_files(files: Files, config: Any) -> Files:
    made = {
        "reference/recipe.md": recipe_reference(),
        "reference/messages.md": messages(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def recipe_reference() -> str:
    """Every setting of a recipe: type, default and meaning, read off the models and the comments of their fields."""
    lines = [
        "# Recipe reference",
        "",
        "Every setting there is, made from the source. A recipe names what differs from the defaults;",
        "`section.key=value` on the command line replaces both. An unknown key is an error that names the nearest one.",
        "",
    ]
    for title, model in sections("", Recipe):
        lines += [f"## {title or 'The recipe itself'}", "", *document(model), ""]
        rows = [row for row in fields(title, model)]
        lines += ["| setting | type | default | |", "| --- | --- | --- | --- |", *rows, ""]
        if title == "sample":
            lines += ["The presets:", "", "| preset | sets |", "| --- | --- |"]
            for name, values in PRESETS.items():
                lines.append(f"| `{name}` | {', '.join(f'`{k}: {v}`' for k, v in values.items())} |")
            lines.append("")
    return "\n".join(lines)


def sections(title: str, model: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """A model and, in their order, the models within it, by dotted name."""
    yield title, model
    for name, field in model.model_fields.items():
        if (inner := section_of(field.annotation)) is not None:
            yield from sections(f"{title}.{name}".lstrip("."), inner)


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds: one, a list of them, or none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_of(part)) is not None), None)


def document(model: type[Section]) -> list[str]:
    return inspect.cleandoc(model.__doc__ or "").split("\n")


def fields(title: str, model: type[Section]) -> Iterator[str]:
    """A table row a field."""
    source = textwrap.dedent(inspect.getsource(model))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        name = node.target.id
        inner = section_of(model.model_fields[name].annotation)
        if inner is not None:
            where = f"{title}.{name}".lstrip(".")
            kind = f"[section](#{where.replace('.', '')})"
        else:
            kind = kind_of(node.annotation)
        default = (
            "" if inner is not None and node.value is None else ast.unparse(node.value) if node.value else "required"
        )
        default = {"None": "null", "True": "true", "False": "false"}.get(default, default)
        shown = "" if inner is not None and default.endswith("()") else f"`{default}`"
        comment = comments.get(node.end_lineno or 0, "").replace("|", "\\|")
        yield f"| `{name}` | {kind} | {shown} | {comment} |"


def kind_of(node: ast.expr) -> str:
    """A type in words."""
    text = ast.unparse(node)
    if text in KINDS:
        return KINDS[text]
    if isinstance(node, ast.BinOp):
        return f"{kind_of(node.left)}, or {kind_of(node.right)}"
    if isinstance(node, ast.Subscript):
        outer, parts = ast.unparse(node.value), node.slice
        inner = parts.elts if isinstance(parts, ast.Tuple) else [parts]
        match outer:
            case "Literal":
                return ", ".join(f"`{ast.literal_eval(e)}`" for e in inner)
            case "Annotated":
                bounds = re.findall(r"(g|l)(e|t)=([\d.]+)", ast.unparse(inner[1]))
                words = {("g", "e"): "at least", ("g", "t"): "above", ("l", "e"): "at most", ("l", "t"): "below"}
                limits = " and ".join(f"{words[a, b]} {limit}" for a, b, limit in bounds)
                return " ".join(filter(None, (kind_of(inner[0]) + ("," if limits else ""), limits)))
            case "list":
                return f"list of: {kind_of(inner[0])}"
            case "tuple":
                return f"{len(inner)} of: {kind_of(inner[0])}"
            case "dict":
                return "mapping"
    return f"`{text}`"


def messages() -> str:
    """Every line that the package raises as a user's mistake, as it stands in the source."""
    lines = [
        "# All messages",
        "",
        "Every line that `latent-thoughts` ends with where something can be mended, as it stands in the source (… is",
        "filled in). What to do about the common ones: [Troubleshooting](../troubleshooting.md).",
        "",
    ]
    for path in sorted((ROOT / "latent_thoughts").rglob("*.py")):
        found = list(dict.fromkeys(raised(path)))
        if found:
            room = path.relative_to(ROOT / "latent_thoughts").with_suffix("").as_posix().removesuffix("/__init__")
            lines += [f"## {room}", "", *(f"- `{text.replace('`', chr(39))}`" for text in found), ""]
    return "\n".join(lines)


def raised(path: Path) -> Iterator[str]:
    """The texts of a file's UserErrors and validation errors, with … for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError" and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                yield str(argument.value)
            elif isinstance(argument, ast.JoinedStr):
                yield "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in argument.values)
