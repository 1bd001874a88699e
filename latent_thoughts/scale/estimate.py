"""A plan from a recipe, and how it is shown."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.filesize import decimal
from rich.text import Text

from latent_thoughts import model as models
from latent_thoughts.config import Recipe
from latent_thoughts.data.tokenizer import Codec, add_control_tokens
from latent_thoughts.scale import measure
from latent_thoughts.scale.plan import Device, Shape, Work, works
from latent_thoughts.scale.survey import MOST, Survey, assumed, survey
from latent_thoughts.store import write_json
from latent_thoughts.terminal import Grid, count, output

KINDS = {"Trained": "train", "Encoded": "encode", "Drawn": "decode"}


@dataclass(frozen=True, slots=True)
class Plan:
    recipe: Recipe
    found: Survey
    shape: Shape
    device: Device
    works: list[Work]

    def hours(self, work: Work) -> float:
        """Device-hours."""
        return work.seconds(self.device) / 3600


def estimate(recipe: Recipe) -> Plan:
    """Surveys the corpus and counts the work. Raises UserError where corpus or model are not at hand and not told."""
    tokenizer = None
    if recipe.plan.documents and recipe.plan.tokens:
        found = assumed(recipe)
    else:
        seed = recipe.seed if recipe.data.world.seed is None else recipe.data.world.seed
        tokenizer = models.base_tokenizer(recipe.model, recipe.data.source, seed)
        add_control_tokens(tokenizer)
        found = survey(recipe, Codec(tokenizer))
    config = recipe.model
    if recipe.plan.model is not None:
        config = config.model_copy(update={"base": recipe.plan.model})
    shape = Shape.of(models.outline(config, 32000 if tokenizer is None else len(tokenizer)))
    return Plan(recipe, found, shape, measure.device(recipe, found, shape), works(recipe, found, shape))


def show(plan: Plan, json: Path | None = None) -> None:
    """Prints the table and what it stands on; writes it as JSON where asked to."""
    settings, groups = plan.recipe.plan, _alike(plan.works)
    hours = {name: sum(map(plan.hours, group)) for name, group in groups.items()}
    longest = max(hours, key=lambda name: hours[name])
    rows = [
        [Text(cell, "bold" if name == longest else "") for cell in _row(name, group, plan)]
        for name, group in groups.items()
    ]
    rows.append([Text(cell) for cell in _row("in all", plan.works, plan)])
    drop = ("Encoded", "Drawn", "Hours", "Disk", "Trained")
    title = f"{settings.devices} x {plan.device.name}"
    console = output()
    console.print(Grid(_columns(plan), rows, words=("Stage",), drop=drop, title=title))
    console.print("Tokens by stage; hours of a device; time with all of them.", style="dim")
    for line in _assumptions(plan):
        console.print(Text(line, "dim"))  # as text: a teacher's name may have brackets
    if total := sum(hours.values()):
        console.print(f"The longest pole: {longest}, {hours[longest] / total:.0%} of the time.")
    if json is not None:
        write_json(json, as_dict(plan))


def as_dict(plan: Plan) -> dict[str, object]:
    """The plan as JSON (docs/formats.md)."""
    stages = [asdict(w) | {"device_hours": plan.hours(w)} for w in plan.works]
    documents = {name: split.documents for name, split in plan.found.splits.items()}
    raw = {name: split.documents * split.text_length for name, split in plan.found.splits.items()}
    return {
        "device": asdict(plan.device),
        "devices": plan.recipe.plan.devices,
        "currency": plan.recipe.plan.currency,
        "parameters": plan.shape.parameters,
        "documents": documents,
        "raw_tokens": raw,
        "stages": stages,
    }


def _alike(works: list[Work]) -> dict[str, list[Work]]:
    """The iterations of a stage under one short name."""
    groups: dict[str, list[Work]] = {}
    for work in works:
        name = (
            work.stage.removeprefix("baselines/")
            .replace("iter_00", "warm start")
            .replace("evaluate", "eval")
            .replace("synthesize", "teacher")
        )
        groups.setdefault(re.sub(r"iter_\d+", "#", name.replace("/", " ")), []).append(work)
    numbers = {name: f"1-{len(group)}" if len(group) > 1 else "1" for name, group in groups.items()}
    return {re.sub("^#", "EM #", name).replace("#", numbers[name]): group for name, group in groups.items()}


def _columns(plan: Plan) -> list[str]:
    """Device-hours stand beside the time where there are several devices, money where there is a price."""
    settings = plan.recipe.plan
    several = ["Hours"] if settings.devices > 1 else []
    priced = [settings.currency] if plan.device.price or any(work.money for work in plan.works) else []
    return ["Stage", "Trained", "Encoded", "Drawn", *several, "Time", *priced, "Disk"]


def _row(name: str, parts: list[Work], plan: Plan) -> list[str]:
    hours = sum(map(plan.hours, parts))
    tokens = {kind: sum(getattr(w, f"{field}_tokens") for w in parts) for kind, field in KINDS.items()}
    cells = {kind: count(number) if number else "" for kind, number in tokens.items()}
    cells |= {"Stage": name, "Hours": _figures(hours), "Time": _time(hours * 3600 / plan.recipe.plan.devices)}
    cells |= {plan.recipe.plan.currency: _figures(hours * plan.device.price + sum(w.money for w in parts))}
    stored = sum(w.bytes for w in parts)
    cells |= {"Disk": decimal(round(stored)) if stored else ""}
    return [cells[column] for column in _columns(plan)]


def _figures(value: float) -> str:
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value else ""


def _time(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} s" if seconds else ""


def _assumptions(plan: Plan) -> list[str]:
    found, recipe = plan.found, plan.recipe
    sizes = [(name, s.documents, s.documents * s.text_length) for name, s in found.splits.items() if s.documents]
    listed = ", ".join(f"{name} {count(number)} ({count(tokens)} tokens)" for name, number, tokens in sizes)
    read = sum(split.read for split in found.splits.values())
    told = recipe.plan.documents and recipe.plan.tokens
    how = "as plan.documents and plan.tokens say" if told else f"from {min(read, MOST):,} documents that were read"
    thoughts = "as long as those that come with the data" if found.known_thoughts else (
        f"{recipe.plan.thought_ratio} x the raw tokens, up to {recipe.sample.max_thought_tokens} a thought (assumed)"
    )  # fmt: skip
    figures = ("asked_tokens", "replied_tokens", "money")
    asked, replied, money = (sum(getattr(work, name) for work in plan.works) for name in figures)
    spent = f"{_figures(money)} {recipe.plan.currency}" if money else "nothing"
    teacher = (
        f"Teacher: {recipe.synthesize.teacher.model} reads {count(asked)} tokens and writes {count(replied)} for "
        f"{spent} (synthesize.prices)."
    )
    return [
        *([teacher] if asked else []),
        f"Documents, {how}: {listed}.",
        f"Model: {count(plan.shape.parameters)} parameters. Thoughts: {thoughts}; every draw counted as different.",
        f"Rates: {plan.device.source}.",
    ]
