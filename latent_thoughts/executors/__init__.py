"""Executors: a stage hands over units of work, and processes of this machine or actors of Ray share them.

A unit is the name of the shard that closes it. Workers write shards themselves and tell the driver only what a
manifest needs; the driver alone writes the manifest. What is there is not made again, by whichever worker, so that a
lost worker, a unit that is tried again and a driver that is started again all come to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from latent_thoughts.config import Recipe
from latent_thoughts.executors import local
from latent_thoughts.executors.work import Result, Told, Work
from latent_thoughts.machine import give_gpu_memory_back

__all__ = ["Result", "Told", "Work", "calls", "in_order", "run", "together"]

T = TypeVar("T")


def run(recipe: Recipe, work: Work, units: Mapping[str, float], told: Told) -> Iterator[Result]:
    """Does every unit once; yields results in the units' order. `units` maps names to sizes.

    `told` hears of (amount done, counts), finer than units where the work happens in this process. Raises UserError
    for a mistake that a worker met, and for a worker that is lost too often.
    """
    give_gpu_memory_back()
    return in_order(_any_order(recipe, work, units, told), units)


def _any_order(recipe: Recipe, work: Work, units: Mapping[str, float], told: Told) -> Iterator[Result]:
    if recipe.executor.kind == "local" and recipe.executor.workers == 1:
        yield from local.alone(work, units, told)
        return
    if recipe.executor.kind == "ray":
        from latent_thoughts.executors import on_ray

        found = on_ray.run(recipe, work, list(units))
    else:
        found = local.processes(recipe, work, units)
    for result in found:
        told(units[result.unit], result.counts)
        yield result


def in_order(results: Iterable[Result], units: Iterable[str]) -> Iterator[Result]:
    """Sums of floating-point figures depend on their order, which must not depend on the workers. What came before
    its turn is held; that is little, since units are handed out in order."""
    early, found = dict[str, Result](), iter(results)
    for unit in units:
        while unit not in early:
            result = next(found)
            early[result.unit] = result
        yield early.pop(unit)


def calls(recipe: Recipe, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> list[T]:
    """The results of calls that do not know of each other: each in a worker of Ray, or one after the other here."""
    if recipe.executor.kind == "local":
        return [function(*each) for each in arguments]
    from latent_thoughts.executors import on_ray

    return on_ray.calls(recipe, function, arguments)


def together(recipe: Recipe, function: Callable[..., T], *arguments: Any) -> T:
    """A call that `train_workers` processes make at the same time, as ranks of one process group; the first's result.

    Here it is made in this process, which may itself be one of several under torchrun.
    """
    if recipe.executor.kind == "local":
        return function(*arguments)
    from latent_thoughts.executors import on_ray

    return on_ray.together(recipe, function, arguments)
