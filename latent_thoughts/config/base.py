"""What the recipe's sections are made of: one kind of model, its YAML, and errors that name the nearest key."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from latent_thoughts.types import UserError

T = TypeVar("T", bound="Section")
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]


class Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number, where YAML 1.1 asks for 1.0e-5 and takes all else for text."""


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


Pattern = Annotated[str, AfterValidator(_compiles)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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
        return f"{name}: {message}" if name else message
    known = list(_section(model, path[:-1]).model_fields)
    near = difflib.get_close_matches(path[-1], known, 1, cutoff=0.0)
    return f"unknown key {name} (did you mean {'.'.join([*path[:-1], near[0]])}?)"


def _section(model: type[Section], path: list[str]) -> type[Section]:
    for name in path:
        if name.isdigit():  # a place in a list of sections
            continue
        annotation = model.model_fields[name].annotation
        annotation = next(iter(get_args(annotation)), annotation)
        assert isinstance(annotation, type) and issubclass(annotation, Section)
        model = annotation
    return model
