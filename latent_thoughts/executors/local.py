"""This process, or several of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection, forkserver
from multiprocessing.util import Finalize
from typing import Any

import torch

from latent_thoughts import machine
from latent_thoughts.config import Recipe
from latent_thoughts.executors.work import Opened, Result, Told, Work
from latent_thoughts.machine import cores, without_main
from latent_thoughts.types import UserError

SAVING = 10.0  # seconds that a worker which is told to end has for it


def alone(work: Work, units: Mapping[str, float], told: Told) -> Iterator[Result]:
    with contextlib.closing(Opened(work)) as opened:
        for unit, size in units.items():
            if (there := work.stage.done(unit)) is not None:
                told(size, there)
            yield opened(unit, told)


def processes(recipe: Recipe, work: Work, units: Mapping[str, float]) -> Iterator[Result]:
    """Hands units to `workers` processes, two ahead for each. Raises UserError where one is killed."""
    workers, waiting = min(recipe.executor.workers, len(units)), iter(units)
    context = multiprocessing.get_context("forkserver")  # it imports once what every worker of every stage needs
    context.set_forkserver_preload([type(work).__module__])
    numbers, threads = context.Value("i", 0), recipe.threads or max(1, cores() // workers)
    start = (work, threads, numbers, workers, gpus())
    _start_server()
    with ProcessPoolExecutor(workers, context, _start, start) as pool:
        try:
            pending, done = set[Future[Result]](), range(2 * workers)
            while True:
                with without_main():
                    pending |= {pool.submit(_do, unit) for unit in islice(waiting, len(done))}
                if not pending:
                    break
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from map(Future.result, done)
        except KeyboardInterrupt:
            end_now(pool)
            raise
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (for want of memory?): what is finished is kept; run again to go on, "
                "with fewer executor.workers if it was memory"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def gpus() -> list[str]:
    """Those that this process may use, by the names that CUDA_VISIBLE_DEVICES knows them by."""
    count = torch.cuda.device_count()
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (visible or [str(n) for n in range(count)])[:count]


_opened: Any = None  # this process's work


def _start(work: Work, threads: int, numbers: Any, workers: int, names: list[str]) -> None:
    """Sets a worker process up: with GPUs of its own as far as there are any, and with the end of its driver."""
    global _opened
    take_gpus(numbers, workers, names)
    live_with_driver()
    _opened = Opened(work, threads)
    Finalize(None, _opened.close, exitpriority=10)


def _do(unit: str) -> Result:
    return _opened(unit)


def take_gpus(numbers: Any, workers: int, names: list[str]) -> None:
    """This process's part of the GPUs, before torch looks for any: neighbours, or one with others where there are
    fewer than `workers`. `numbers` is the workers' count of those that have taken theirs."""
    with numbers.get_lock():
        number, numbers.value = numbers.value, numbers.value + 1
    if names:
        count, machine.gpu_shared = len(names), workers > len(names)
        own = slice(number * count // workers, (number + 1) * count // workers)
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number % count] if machine.gpu_shared else ",".join(names[own])


def live_with_driver() -> None:
    """A worker whose driver was killed must not go on writing to the run. It is the driver's own end that is waited
    for: the server that forked the worker lives as long as one of its workers does. Ctrl-C is the driver's to hear."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    driver = multiprocessing.parent_process()
    assert driver is not None

    def watch() -> None:
        connection.wait([driver.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_now(pool: ProcessPoolExecutor) -> None:
    """Where a driver is interrupted, nothing waits for what its workers are at, but for a checkpoint being saved."""
    pool.shutdown(wait=False, cancel_futures=True)
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(SAVING)


def _start_server() -> None:
    """Starts what workers are forked from, which else Ctrl-C would end with a traceback while it imports."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        return  # where Python has no say in it
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
