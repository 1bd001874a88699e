"""Makes a plotted SVG fit any page: it takes the page's text colour, and needs no inline style.

The page's Content-Security-Policy forbids style attributes, so they become presentation attributes.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from latent_thoughts.stages.report.methods import INK

NAMESPACE = "http://www.w3.org/2000/svg"
THEME = f"svg{{color:{INK}}}@media(prefers-color-scheme:dark){{svg{{color:#e8eaed;filter:brightness(1.35)}}}}"


def embedded(text: str, label: str, palette: dict[str, str]) -> str:
    """For an HTML page: scales with its column, named for screen readers, in the colours that the page gives to the
    palette's names (its CSS variables), and in its font."""
    root = _themed(text)
    named = {colour: f"var(--{name})" for name, colour in palette.items()}
    for node in root.iter():
        node.attrib.update({k: named[v.strip()] for k, v in node.attrib.items() if v.strip() in named})
        node.attrib.pop("font-family", None)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": label}
    return _string(root)


def standalone(text: str) -> str:
    """For a file: transparent, its text dark or light as the viewer's colour scheme asks."""
    root = _themed(text)
    style = ElementTree.Element(f"{{{NAMESPACE}}}style")
    style.text = THEME
    root.insert(0, style)
    return _string(root)


def _string(root: ElementTree.Element) -> str:
    ElementTree.register_namespace("", NAMESPACE)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(root, encoding="unicode")


def _themed(text: str) -> ElementTree.Element:
    root = ElementTree.fromstring(text)  # noqa: S314 -- our own plot, not a stranger's file
    referenced = set(re.findall(r"#([\w-]+)", text))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
        for declaration in parent.attrib.pop("style", "").split(";"):
            name, _, value = declaration.partition(":")
            if value:
                parent.set(name.strip(), value.strip())
        for name, value in parent.attrib.items():
            if value.strip() == INK:
                parent.set(name, "currentColor")
        if parent.get("id") not in referenced:
            parent.attrib.pop("id", None)  # several figures share one page
    return root
