"""The engine that a recipe names, with a model that a train stage exported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from latent_thoughts import machine
from latent_thoughts import model as models
from latent_thoughts.config import Recipe
from latent_thoughts.engines.base import Engine
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.transfer import local
from latent_thoughts.types import UserError


@contextlib.contextmanager
def loaded_engine(recipe: Recipe, folder: Path, longest: int | None = None) -> Iterator[Engine]:
    """`longest` is the longest sequence that will be asked for; by default that of the run's own chunks. Raises
    UserError where the engine is not installed, or the model does not suit it."""
    if recipe.engine.kind == "torch":
        yield _torch(recipe, folder, longest)
        return
    _refuse_too_few_gpus(recipe.engine.vllm_parallel)
    scorer = _torch(recipe, folder, longest) if recipe.engine.scorer == "torch" else None
    from latent_thoughts.engines.vllm_engine import VllmEngine

    longest = longest or _longest(recipe)[0]
    limits: dict[str, Any] = {"gpu_memory_utilization": recipe.engine.vllm_memory, "seed": recipe.seed % 2**31}
    if recipe.engine.sequences:
        limits["max_num_seqs"] = recipe.engine.sequences
    if recipe.engine.vllm_parallel > 1:  # processes of its own, also where it runs in an actor of Ray
        limits |= {"tensor_parallel_size": recipe.engine.vllm_parallel, "distributed_executor_backend": "mp"}
    with contextlib.closing(VllmEngine(local(folder), recipe.model.dtype, longest, scorer, **limits)) as engine:
        yield engine


@contextlib.contextmanager
def loaded_scorer(recipe: Recipe, folder: Path) -> Iterator[Engine]:
    """For a model that only scores, at temperature 1: vLLM is not started where the torch engine does that."""
    if "torch" in (recipe.engine.kind, recipe.engine.scorer):
        yield _torch(recipe, folder)
        return
    with loaded_engine(recipe, folder) as engine:
        yield engine


def _torch(recipe: Recipe, folder: Path, longest: int | None = None) -> TorchEngine:
    model = models.load(folder, recipe.model)
    own, setting = _longest(recipe)
    models.check_positions(model, longest or own, setting)
    engine = TorchEngine(model, recipe.engine)
    if longest is None:  # else it is what a prompt might be, and the engine looks at those that come
        engine.passes.check_length(own, setting)
    return engine


def _longest(recipe: Recipe) -> tuple[int, str]:
    """The longest sequence of the run's own chunks, and what sets it. (An answer may outgrow the chunk it is for.)"""
    if recipe.evaluate.answer is None:
        return recipe.sample.max_tokens, "sample.max_tokens"
    return recipe.sample.max_tokens + recipe.evaluate.answer_tokens, "sample.max_tokens + evaluate.answer_tokens"


def _refuse_too_few_gpus(parallel: int) -> None:
    """vLLM takes a share of a GPU's memory for itself, and dies where another process has taken it."""
    found = torch.cuda.device_count()
    if found and (found < parallel or machine.gpu_shared):
        raise UserError(
            f"vllm wants GPUs of its own for every worker (engine.vllm_parallel: {parallel}), and there are too few: "
            "lower executor.workers or engine.vllm_parallel"
        )
