"""The rates of this machine: of a small model by running the recipe's own stages, else from its matrix peak."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from latent_thoughts import model as models
from latent_thoughts.config import BUDGETS, Recipe
from latent_thoughts.config.executor import Executor
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.em import Loop, Run
from latent_thoughts.progress import sent_to
from latent_thoughts.scale.plan import CPU_SHARES, DEVICES, MATRIX_CPU_SHARES, SHARES, Device, Shape, works
from latent_thoughts.scale.survey import Survey, survey

SMALL = 5 * 10**7  # parameters up to which overheads, and not matrix products, decide
STEPS, DOCUMENTS = 100, 300  # of the run that is measured


def device(recipe: Recipe, found: Survey, shape: Shape) -> Device:
    """The device that `plan.device` names; with `auto`, this machine. Raises KeyError for an unknown name."""
    name, price = recipe.plan.device, recipe.plan.price
    if name != "auto":
        given = DEVICES[name]
    elif found.known_thoughts and recipe.synthesize.method == "oracle" and shape.parameters < SMALL:
        given = run(recipe)
    else:
        given = _by_peak(recipe)
    return given if price is None else Device(given.name, given.train, given.encode, given.decode, price, given.source)


def _by_peak(recipe: Recipe) -> Device:
    where = models.device_of(recipe.model)
    peak = models.matmul_peak(where, getattr(torch, recipe.model.dtype))
    shares = SHARES
    if where.type == "cpu":  # vector units have at most twice the products in bf16 that they have in float32
        matrices = peak > 4 * models.matmul_peak(where, torch.float32)
        shares = MATRIX_CPU_SHARES if matrices else CPU_SHARES
    of_it = "{:.0%} train, {:.0%} encode, {:.0%} decode".format(*shares)
    source = f"matrix products measured now, {peak / 1e9:,.0f} GFLOP/s; of that, assumed, {of_it}"
    return Device.with_shares(f"this machine ({where.type})", peak, *shares, 0.0, source)


def run(recipe: Recipe) -> Device:
    """Trains and samples with the recipe's model on a few of its documents, in a folder that is then removed."""
    small = _few(recipe)
    with tempfile.TemporaryDirectory() as folder, sent_to(lambda _: None):
        em = Run(small, Path(folder))
        em.prepare()
        em.synthesize()
        trained = em.train_warm_start().counts
        sampled = Loop(em, "em", small.sample, Path(folder)).sample(1).counts
        tokenizer, _ = models.load_tokenizer(em.base / "model")
        shape = Shape.of(models.load(em.base / "model", small.model))
        done = {work.stage: work for work in works(small, survey(small, Codec(tokenizer)), shape)}
    train = done["iter_00/train"].train_flops / done["iter_00/train"].train_tokens * trained["tokens"]
    sample = done["iter_01/sample"].flops / sampled["seconds"]
    source = f"measured now: {STEPS} steps and an E-step over {sampled['chunks']:,.0f} chunks"
    return Device("this machine", train / trained["seconds"], sample, sample, 0.0, source)


def _few(recipe: Recipe) -> Recipe:
    def changed(section: Any, **values: Any) -> Any:
        return section.model_copy(update=values)

    warm_start = {name: value for name, value in recipe.em.warm_start.items() if name not in BUDGETS}
    world = changed(recipe.data.world, documents=min(DOCUMENTS, recipe.data.world.documents))
    limit = None if recipe.data.source.startswith("world:") else min(DOCUMENTS, recipe.data.limit or DOCUMENTS)
    return changed(
        recipe,
        data=changed(recipe.data, world=world, limit=limit),
        executor=Executor(),
        train=changed(recipe.train.with_budget("steps", STEPS), tracker="none", held_out=0, export="last"),
        em=changed(recipe.em, iterations=1, baselines=[], samples=[], variants={}, warm_start=warm_start),
    )
