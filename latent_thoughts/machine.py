"""This machine: its cores and GPUs, and the memory that the C library and torch keep or give back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

gpu_shared = False  # this process's GPU with other workers of an executor, which has then set it


def cores() -> int:
    """Those that this process may use (os.process_cpu_count of Python 3.13)."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Processes that are started meanwhile do not import the program's main module. None of ours needs it, and a
    program without `if __name__ == "__main__"` would begin anew in each."""
    main = sys.modules["__main__"].__dict__
    hidden = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)


def free_memory() -> int:
    """Bytes that Linux still has for processes; 0 elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return 0


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for what comes next (nothing elsewhere).

    By default it gives large blocks back to the system and gets them anew, page by page: on a CPU a third of the
    time of the training loss (docs/log.md).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt, most = ctypes.CDLL(None).mallopt, 2**31 - 1
        mallopt(-3, most)  # M_MMAP_THRESHOLD: from which size blocks come straight from the system
        mallopt(-1, most)  # M_TRIM_THRESHOLD: how much that is free may lie at the heap's end


def give_freed_memory_back() -> None:
    """Has glibc give whole free pages back to the system, wherever they lie (nothing elsewhere); some 30 ms."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether no memory was found, a GPU's or this machine's."""
    torch = sys.modules.get("torch")  # not loaded for an error that cannot be its own
    kinds = (MemoryError, torch.OutOfMemoryError) if torch else MemoryError
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def out_of_threads(error: BaseException) -> bool:
    """Whether the system let this process start no thread: Python has no error of its own for it."""
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)


def give_gpu_memory_back() -> None:
    """Has torch give back what it keeps of GPUs after a training, which other processes, and vLLM, find missing.

    Nothing where this process has not used one: to ask whether there are any would be to use the driver, and what is
    forked after that cannot.
    """
    import torch

    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
