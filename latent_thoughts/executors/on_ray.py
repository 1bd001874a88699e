"""Ray: Ray Data streams units to actors, Ray Train starts the processes of one training (extra `ray`).

The work itself knows nothing of Ray. Only names and counts travel; models, documents and thoughts are read from and
written to the run folder, which every node must see under the same name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from latent_thoughts import parallel, progress
from latent_thoughts.config import Recipe
from latent_thoughts.executors.work import Opened, Result, Work
from latent_thoughts.machine import out_of_memory
from latent_thoughts.model import set_up_torch
from latent_thoughts.types import UserError

T = TypeVar("T")
OBJECTS = 2**29  # bytes of shared memory for a cluster of our own, through which only names and counts go
PARTS, TOGETHER = 64, 16  # a worker's share of many units is handed out in so many parts, of so many units at most


def session(recipe: Recipe) -> Any:
    """The `ray` package, joined to the cluster that the recipe names; else to one that starts now and ends with this
    process. Raises UserError where Ray is not installed, or no cluster answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong for good arrives as an exception
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    address = recipe.executor.address or os.environ.get("RAY_ADDRESS", "local")
    if address == "local":  # nothing but the loopback interface, as Ray does by itself on laptops of other makes
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError("executor.kind: ray needs an extra: pip install 'latent-thoughts[ray]'") from None
    if ray.is_initialized():
        return ray
    if address.startswith("ray://"):  # Ray's client, over which Ray Data does not run
        raise UserError(
            f"executor.address: {address} is no place to run Ray Data from: start the command on a node of the cluster "
            "with address auto, or by `ray job submit` (ray[default])"
        )
    settings: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if address == "local":
        settings |= {"include_dashboard": False, "object_store_memory": OBJECTS}
    try:
        if address not in ("local", "auto"):  # which Ray would wait a quarter of an hour for
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), 10).close()
        ray.init(address, **settings)
    except (OSError, ValueError) as error:
        raise UserError(f"executor.address: no Ray cluster answers at {address} ({error})") from None
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # such as a cluster that has no room for the actors
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    return ray


def run(recipe: Recipe, work: Work, units: Sequence[str]) -> Iterator[Result]:
    """Results as they come. Ray restarts lost actors and repeats what they were at; units that are done are skipped.

    Raises UserError for a worker's mistake, and where an actor is lost more than `retries` times.
    """
    ray, config = session(recipe), recipe.executor
    if not units:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # a task costs the driver some milliseconds, which many units share
    size = min(TOGETHER, max(1, len(units) // (config.workers * PARTS)))
    groups = [{"units": list(units[n : n + size])} for n in range(0, len(units), size)]
    # what an actor was at is repeated as often as it restarts: tries while nobody knows yet that its node is gone would
    # use a number of their own up at once
    retried = {"max_restarts": config.retries, "max_task_retries": -1}
    with warnings.catch_warnings():
        # Ray 2.64 will not take max_restarts any more (pyproject.toml), and 2.60 has nothing in its place
        warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")
        found = ray.data.from_items(groups, override_num_blocks=len(groups)).map(
            Actor,
            fn_constructor_args=(work, _threads(recipe), str(Path.cwd())),
            # one at a time: units take long, and what waits behind one could be done by another actor
            compute=ray.data.ActorPoolStrategy(size=min(config.workers, len(groups)), max_tasks_in_flight_per_actor=1),
            num_cpus=config.cpus,
            num_gpus=config.gpus,
            ray_remote_args_fn=lambda: retried,
        )
    with _named_losses(recipe):
        for row in found.iter_rows():
            for unit, counts, shards, error in json.loads(row["results"]):
                if error is not None:
                    raise UserError(error)
                yield Result(unit, counts, shards)


class Actor:
    """The work in an actor. A UserError travels as a value, so that it is not mistaken for a crash and tried again."""

    def __init__(self, work: Work, threads: int | None, here: str):
        _set_up(here)
        self.opened = Opened(work, threads)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        results: list[tuple[Any, ...]] = []
        try:
            results += [(*self.opened(unit), None) for unit in row["units"]]
        except UserError as error:
            results.append(("", {}, {}, str(error)))
        return {"results": json.dumps(results)}

    def __del__(self) -> None:
        self.opened.close()


def calls(recipe: Recipe, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> list[T]:
    ray, config = session(recipe), recipe.executor
    options = {"num_cpus": config.cpus, "num_gpus": config.gpus, "max_retries": config.retries}
    call, here, threads = ray.remote(**options)(_call), str(Path.cwd()), _threads(recipe)
    with _named_losses(recipe):
        return ray.get([call.remote(function, each, threads, here) for each in arguments])


def _call(function: Callable[..., T], arguments: tuple[Any, ...], threads: int | None, here: str) -> T:
    _set_up(here)
    set_up_torch(threads)
    return function(*arguments)


def together(recipe: Recipe, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    """Ray Train's group of processes. A lost one has all of them start again, from the last checkpoint in the stage's
    folder. Raises UserError as the function does, and where processes are lost more than `retries` times."""
    session(recipe)
    import ray.train.torch as torch_on_ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.util.queue import Queue

    config = recipe.executor
    events, threads, here = Queue(actor_options={"num_cpus": 0}), _threads(recipe), str(Path.cwd())

    def each(_: Any = None) -> tuple[Any, str | None]:
        _set_up(here)
        set_up_torch(threads)
        with progress.sent_to(events.put):
            try:
                return function(*arguments), None
            except UserError as error:
                if config.train_workers > 1 and out_of_memory(error.__cause__):
                    raise  # one process may meet it alone, and the others would wait for it
                return None, str(error)

    resources = {"CPU": config.cpus, **({"GPU": config.gpus} if config.gpus else {})}
    scaling = ScalingConfig(num_workers=config.train_workers, use_gpu=config.gpus > 0, resources_per_worker=resources)
    # our checkpoints are ours: Ray keeps nothing, but wants a place for it
    with tempfile.TemporaryDirectory() as unused, _named_losses(recipe), _shown(events):
        trainer = torch_on_ray.TorchTrainer(
            each,
            torch_config=torch_on_ray.TorchConfig(backend=parallel.backends(config.gpus > 0)),
            scaling_config=scaling,
            run_config=RunConfig(storage_path=unused, failure_config=FailureConfig(max_failures=config.retries)),
        )
        found = trainer.fit().return_value  # the first process's
    assert found is not None
    value, error = found
    if error is not None:
        raise UserError(error)
    return value


def _set_up(here: str) -> None:
    """A worker of another machine stands where the driver stands, so that relative paths mean the same."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if Path(here).is_dir():
        os.chdir(here)


def _threads(recipe: Recipe) -> int:
    return recipe.threads or max(1, int(recipe.executor.cpus))


@contextlib.contextmanager
def _named_losses(recipe: Recipe) -> Iterator[None]:
    """One line instead of Ray's report where work was lost for good, or met a mistake of the user's."""
    from ray.exceptions import RayError, RayTaskError
    from ray.train import ControllerError, TrainingFailedError

    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    except ControllerError as error:  # before any process began: its group, or its place in the cluster
        *_, last = str(error.controller_failure).strip().splitlines() or [repr(error.controller_failure)]
        raise UserError(
            f"Ray could not set up training: {last.strip()} (executor.gpus and executor.train_workers must fit the "
            "cluster); what is finished is kept, and the same command goes on"
        ) from error
    except (RayError, TrainingFailedError) as error:
        cause = next(iter(getattr(error, "worker_failures", {}).values()), error)
        lines = [line for line in str(cause).splitlines() if line.strip()] or [repr(cause)]
        raise UserError(
            f"a worker was lost more often than executor.retries = {recipe.executor.retries} allows; what is finished "
            f"is kept, and the same command goes on ({lines[-1 if 'Traceback' in str(cause) else 0]})"
        ) from error


@contextlib.contextmanager
def _shown(events: Any) -> Iterator[None]:
    """Progress that workers tell of is shown here."""
    from ray.util.queue import Empty

    ended = threading.Event()

    def show() -> None:
        with progress.sent_here() as show:
            while not (ended.is_set() and events.empty()):
                with contextlib.suppress(Empty):
                    show(events.get(timeout=0.5))

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        events.shutdown()
