"""The recipe: one YAML file, dotted overrides, unknown keys refused with the nearest known name."""

from __future__ import annotations

import copy
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from latent_thoughts.config.base import (
    BAD_YAML,
    Positive,
    Section,
    Seed,
    nested,
    parse,
    read_yaml,
    read_yaml_file,
)
from latent_thoughts.config.base import Dumper as Dumper
from latent_thoughts.config.data import Chunking, Data
from latent_thoughts.config.data import World as World
from latent_thoughts.config.em import EM
from latent_thoughts.config.evaluate import Benchmark as Benchmark
from latent_thoughts.config.evaluate import Evaluate
from latent_thoughts.config.evaluate import FineTune as FineTune
from latent_thoughts.config.executor import Executor
from latent_thoughts.config.sample import OWN_RAW_MODEL as OWN_RAW_MODEL
from latent_thoughts.config.sample import PRESETS as PRESETS
from latent_thoughts.config.sample import Sample
from latent_thoughts.config.synthesize import Contamination, Synthesize
from latent_thoughts.config.train import BUDGETS as BUDGETS
from latent_thoughts.config.train import UNREAD as UNREAD
from latent_thoughts.config.train import Train
from latent_thoughts.places import holds_keys
from latent_thoughts.types import UserError


class Model(Section):
    """The base model: a hub name, a folder, `package:NAME/FILE.gguf`, a GGUF file, or a config."""

    base: str | dict[str, Any] = "HuggingFaceTB/SmolLM2-135M"
    tokenizer: str | None = None  # default: the base model's; `world` for a built-in world's words
    new_tokens: Literal["apart", "mean"] = "apart"  # the four's embeddings: around the old ones' mean, or all at it
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    attention: str | None = None  # attn_implementation of transformers; default: its own choice
    trust_remote_code: bool = False  # run the code that a model brings: read it first
    allow_pickle: bool = False  # load weights that are no safetensors, by torch's reader for weights alone


class Engine(Section):
    """The sampling and scoring engine, and its limits; those that are not set suit the device."""

    kind: Literal["torch", "vllm"] = "torch"
    scorer: Literal["torch", "vllm"] = "torch"  # where vllm samples; vllm scores draws at temperature 1 alone
    sequences: Positive | None = None  # decoded at a time; default: 256, on a GPU 1024, of vllm its own
    tokens: Positive | None = None  # key-value positions of contexts, and again of draws; default: 65536, or by the GPU
    pass_tokens: Positive | None = None  # encoded in one pass; default: 4096, on a GPU 16384
    logits: Positive | None = None  # held at a time (positions x vocabulary); default: 2**26, on a GPU 2**28
    graphs: bool = True  # on a GPU draws are replayed CUDA graphs, where the model's passes can be recorded
    vllm_memory: Annotated[float, Field(gt=0, le=1)] = 0.5  # share of the device's memory that vllm may take
    vllm_parallel: Positive = 1  # GPUs that one vllm spreads its model over (tensor parallel)


class Plan(Section):
    """What `latent-thoughts plan` is told, and what it assumes where it cannot know."""

    device: Literal["auto", "h200", "h100", "a100", "l40s", "rtx4090"] = "auto"  # auto: this machine, measured
    devices: Positive = 1
    price: Annotated[float, Field(ge=0)] | None = None  # of a device and hour; default: an assumption
    currency: str = "USD"
    documents: Positive | None = None  # of a corpus that cannot be counted here
    tokens: Positive | None = None  # its raw tokens; with both, the corpus is not read
    chunk_tokens: Positive = 180  # of such a corpus: eight sentences
    thought_ratio: Annotated[float, Field(gt=0)] = 2.3  # thought tokens a raw token, where none are known (the paper's)
    model: dict[str, Any] | None = None  # the shape of a base model that is not at hand, as in model.base


VARIED = ("sample", "train", "em", "engine")  # what an EM run may have of its own: all that comes after the warm start
SHARED = {"warm_start", "baselines", "samples", "variants"}  # what of `em` is none of a variant's


class Recipe(Section):
    """Everything a run depends on."""

    seed: Seed = 0
    threads: Positive | None = None  # of one process; default: torch's own choice
    executor: Executor = Executor()
    data: Data = Data()
    chunking: Chunking = Chunking()
    model: Model = Model()
    synthesize: Synthesize = Synthesize()
    engine: Engine = Engine()
    sample: Sample = Sample()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    contamination: Contamination = Contamination()
    em: EM = EM()
    plan: Plan = Plan()

    @model_validator(mode="before")
    @classmethod
    def _without_keys(cls, values: Any) -> Any:
        """Recipes are stored and shown."""
        for name, text in nested(values):
            if isinstance(text, bytes | date | set):  # YAML reads them, and would not write the same
                raise ValueError(f"{name}: YAML reads {text!r} as no text and no number: put it in quotes")
            if isinstance(text, str) and holds_keys(text):
                raise ValueError(f"{name} is a URL that holds keys: give them by environment variables")
        return values

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, values: Any) -> Any:
        """A section whose lines are all commented out is one that is not set."""
        if not isinstance(values, dict):
            return values
        return {k: v for k, v in values.items() if v is not None or k not in cls.model_fields}

    @model_validator(mode="after")
    def _overrides_are_valid(self) -> Recipe:
        _ = self.warm_start_train, self.raw_train  # so that a mistake shows before anything runs
        for name in self.em.variants:
            self.variant(name)
        if self.sample.last_k and self.sample.k in self.em.samples:
            raise ValueError(
                f"em.samples: a run with {self.sample.k} draws throughout cannot be told from the run's own, which "
                f"begins with as many (sample.last_k): leave {self.sample.k} out"
            )
        tempered = self.sample.temperature if self.em.iterations else ()
        temperatures = {*tempered, self.evaluate.bound_temperature}
        if self.engine.kind == self.engine.scorer == "vllm" and temperatures != {1.0}:
            raise ValueError(
                "engine.scorer: vLLM cannot score tempered draws: set it to torch, or sample.temperature to [1, 1] and "
                "evaluate.bound_temperature to 1"
            )
        if {"wrap_baseline", "wrap_cot"} & set(self.em.baselines) and not self.synthesize.teacher.there:
            raise ValueError("em.baselines with paraphrases need a teacher: set synthesize.teacher.model")
        return self

    def variant(self, name: str) -> Recipe:
        """The recipe of one of `em.variants`. A preset in it sets all its values anew."""
        if not re.fullmatch(r"[\w.-]+", name) or set(name) == {"."}:
            raise ValueError(f"em.variants: {name!r} becomes a folder's name: letters, digits, -, _ and . alone")
        values, changes = self.model_dump(), copy.deepcopy(self.em.variants[name])
        for section, settings in changes.items():
            if section not in VARIED or not isinstance(settings, dict):
                raise ValueError(f"em.variants.{name} may change {', '.join(VARIED)}, a mapping each, not {section}")
            if section == "em" and (shared := SHARED & settings.keys()):
                raise ValueError(f"em.variants.{name} cannot change em.{min(shared)}, which is the whole run's")
            if section == "train" and any(budget in settings for budget in BUDGETS):
                values[section] |= dict.fromkeys(BUDGETS)
            if "preset" in settings:
                values[section] = {
                    k: v for k, v in values[section].items() if k not in PRESETS.get(str(settings["preset"]), {})
                }
            values[section] = _merged(values[section], settings)
        values["em"] |= {"variants": {}, "samples": [], "baselines": []}
        return parse(Recipe, values, f"em.variants.{name}")

    @property
    def warm_start_train(self) -> Train:
        return self._train(self.em.warm_start, "em.warm_start")

    @property
    def raw_train(self) -> Train:
        """Raw baselines train on text alone; their budget is set by what they are matched to."""
        return self._train({**self.em.raw, "layout": "raw", "raw_share": 0.0}, "em.raw")

    def _train(self, overrides: dict[str, Any], where: str) -> Train:
        values = self.train.model_dump(exclude_unset=True)
        if any(name in overrides for name in BUDGETS):
            values = {name: value for name, value in values.items() if name not in BUDGETS}
        return parse(Train, {**values, **overrides}, where)


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Changes of a mapping within leave the rest of it as it is."""
    deeper = [k for k, v in changes.items() if isinstance(v, dict) and isinstance(values.get(k), dict)]
    return {**values, **changes, **{k: _merged(values[k], changes[k]) for k in deeper}}


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a YAML recipe and applies `section.key=value` overrides (values are YAML).

    Raises UserError for a missing file, bad YAML, an unknown key or a bad value.
    """
    values = read_yaml_file(path, "recipe") or {}
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} must be a mapping of sections")
    return resolve(values, overrides, str(path))


def resolve(values: dict[str, Any], overrides: list[str] | None = None, where: str = "recipe") -> Recipe:
    """A checked recipe of `values` with the overrides put in; `values` stay as they are."""
    try:
        values = copy.deepcopy(values)
    except RecursionError:
        raise UserError(f"{where} is nested without end") from None
    given = dict[str, Any]()
    for override in overrides or []:
        name, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"override {override!r} must look like section.key=value")
        try:
            value = read_yaml(text)
        except BAD_YAML as error:
            raise UserError(f"override {override!r} is not valid YAML: {' '.join(str(error).split())}") from None
        if repr(value).count("#") < text.count("#"):
            quoted = "'{}'".format(text.replace("'", "''"))
            raise UserError(f"override {override!r} ends at its #, where YAML begins a comment: write {name}={quoted}")
        given[name.strip()] = value
    if isinstance(preset := given.get("sample.preset"), str) and isinstance(before := values.get("sample"), dict):
        values["sample"] = {name: value for name, value in before.items() if name not in PRESETS.get(preset, {})}
    for name, value in given.items():
        _assign(values, name, value)
    return parse(Recipe, values, where)


def _assign(values: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for key in path:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise UserError(f"override {name}: {key} is a value, not a section")
    values[last] = value
