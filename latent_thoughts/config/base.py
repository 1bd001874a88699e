"""What the recipe's sections are made of: one kind of model, its YAML, and errors that name the nearest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from latent_thoughts.types import UserError

T = TypeVar("T", bound="Section")
T_ = TypeVar("T_")
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]


class Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number, where YAML 1.1 asks for 1.0e-5 and takes all else for text, and refuses a key that stands
    twice, of which YAML would keep the last with all it holds."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set[tuple[str, str]]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (name := (key.tag, key.value)) in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} stands here twice", problem_mark=key.start_mark)
                seen.add(name)
        return node


class Dumper(yaml.SafeDumper):
    """Quotes what Loader would read as a number."""


for _kind in (Loader, Dumper):
    _scientific = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _scientific, list("-+0123456789"))


# Besides its own errors yaml lets through those of dates and numbers that there are not, and of nesting without end.
BAD_YAML = (yaml.YAMLError, ValueError, RecursionError)


def read_yaml(text: str) -> Any:
    return yaml.load(text, Loader)  # noqa: S506  (Loader is a SafeLoader)


def read_yaml_file(path: Path, what: str) -> Any:
    """What a YAML file holds. Raises UserError, which calls the file `what`, where it cannot be read."""
    try:
        return read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except BAD_YAML as error:
        raise UserError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())}") from None


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    return pattern


def _distinct(values: list[T_]) -> list[T_]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} stands there twice")
    return values


Pattern = Annotated[str, AfterValidator(_compiles)]
Distinct = AfterValidator(_distinct)  # of a list


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, values: Any) -> Any:
        """YAML reads `yes` and `on` as true, which would be taken for 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            kinds = list(_parts(cls.model_fields[name].annotation)) if name in cls.model_fields else []
            if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
                raise ValueError(f"{name} is a number, and no true or false (yes and on are read as true)")
        return values


def nested(values: Any, name: str = "", known: dict[int, bool] | None = None) -> Iterator[tuple[str, Any]]:
    """Values and all that they hold, by dotted names. What stands in several places (YAML's aliases) is gone into once,
    since a few lines can name it billions of times. Raises RecursionError for what holds itself."""
    known = {} if known is None else known  # by identity: whether it is being gone into
    yield name, values
    if not isinstance(values, dict | list):
        return
    if known.get(id(values)):
        raise RecursionError
    if id(values) not in known:
        known[id(values)] = True
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from nested(value, f"{name}.{key}".lstrip("."), known)
        known[id(values)] = False


def parse(model: type[T], values: dict[str, Any], where: str) -> T:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {'; '.join(_explain(model, e) for e in error.errors())}") from None
    except RecursionError:
        raise UserError(f"{where} is nested without end") from None


def _explain(model: type[Section], error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path)
    if error["type"] != "extra_forbidden":
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "string_type" and isinstance(error["input"], dict):
            message += " (YAML reads it as a mapping: put a text with braces or a colon in quotes)"
        return f"{name}: {message}" if name else message
    sections = {n: f.annotation for n, f in model.model_fields.items()} if len(path) == 1 else {}
    for section, kind in sections.items():  # one that stands in a section, given without it
        if isinstance(kind, type) and issubclass(kind, Section) and name in kind.model_fields:
            return f"unknown key {name} (did you mean {section}.{name}?)"
    near = difflib.get_close_matches(path[-1], list(_section(model, path[:-1]).model_fields), 1, cutoff=0.0)
    return f"unknown key {name} (did you mean {'.'.join([*path[:-1], near[0]])}?)"


def _section(model: type[Section], path: list[str]) -> type[Section]:
    names = iter(path)
    for name in names:
        annotation = model.model_fields[name].annotation
        if get_origin(annotation) in (list, dict):
            next(names)  # a section's place in a list, or its name among others
        model = next(p for p in _parts(annotation) if isinstance(p, type) and issubclass(p, Section))
    return model


def _parts(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    parts = get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from _parts(part)
