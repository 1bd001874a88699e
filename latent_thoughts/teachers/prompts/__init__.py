"""Prompts: versioned YAML files beside this one, which a user can copy, change and name in `synthesize.prompts`.

    latent-thoughts prompts FOLDER      (copies them)

A file holds `name`, `version`, `messages` (role and content) and `nothing`, which stands for an empty context.
`{chunk}` and `{context}` (latent_thoughts), or `{document}` (paraphrases), are filled in; `{{` is a brace.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from latent_thoughts.config.base import Section, parse, read_yaml_file
from latent_thoughts.places import place
from latent_thoughts.store import fingerprint
from latent_thoughts.types import UserError

FOLDER = Path(__file__).parent
BUILT_IN = {
    "latent_thoughts": ["latent_thoughts"],
    "wrap_baseline": ["wrap_easy", "wrap_hard", "wrap_wikipedia", "wrap_qa"],
    "wrap_cot": ["wrap_cot"],
}
FIELDS = {
    "latent_thoughts": ("chunk", "context"),
    "wrap_baseline": ("document",),
    "wrap_cot": ("document",),
}  # the first is needed


class Message(Section):
    role: Literal["system", "user", "assistant"]
    content: str


class Prompt(Section):
    name: str
    version: int
    messages: list[Message]
    nothing: str = "(nothing: the text begins here)"

    @cached_property
    def hash(self) -> str:
        """Of all that a teacher is shown."""
        return fingerprint([m.model_dump() for m in self.messages], self.nothing)

    def fill(self, fields: Mapping[str, str]) -> list[dict[str, str]]:
        """The messages with the fields in their places. What a field holds is text, braces and all."""
        values = {name: text or (self.nothing if name == "context" else "") for name, text in fields.items()}
        return [{"role": m.role, "content": m.content.format(**values)} for m in self.messages]


def load(method: str, paths: Sequence[str]) -> list[Prompt]:
    """The prompts of a method, or those in the files. Raises UserError for a file that is missing or no good prompt."""
    files = [place(path) for path in paths] or [FOLDER / f"{name}.yaml" for name in BUILT_IN[method]]
    return [_load(path, FIELDS[method]) for path in files]


def _load(path: Path, known: Sequence[str]) -> Prompt:
    values = read_yaml_file(path, "prompt")
    if not isinstance(values, dict):
        raise UserError(f"prompt {path} must be a mapping with name, version and messages")
    prompt = parse(Prompt, values, f"prompt {path}")
    used = {field for message in prompt.messages for field in _fields(message.content, path)}
    if unknown := sorted(used - set(known)):
        names = ", ".join(f"{{{name}}}" for name in known)
        raise UserError(f"prompt {path}: unknown field {{{unknown[0]}}} (known: {names}; write {{{{ for a brace)")
    if known[0] not in used:
        raise UserError(f"prompt {path} does not show the teacher its text: put {{{known[0]}}} in a message")
    return prompt


def _fields(content: str, path: Path) -> list[str]:
    try:
        parts = list(string.Formatter().parse(content))
    except ValueError as error:
        raise UserError(f"prompt {path}: {error} (write {{{{ and }}}} for braces)") from None
    return [
        name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        for _, name, spec, conversion in parts
        if name is not None
    ]


def copy_to(folder: Path) -> list[Path]:
    """Copies the built-in prompts; those that were not there already."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for source in sorted(FOLDER.glob("*.yaml")):
        target = folder / source.name
        if not target.exists():
            target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
            made.append(target)
    return made
