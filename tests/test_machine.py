"""The cores that a process may use, and the memory that it gives back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from latent_thoughts.machine import cores, free_memory, give_gpu_memory_back


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to a core")
def test_a_process_pinned_to_one_core_has_one() -> None:
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{one}]); from latent_thoughts.machine import cores; print(cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"1"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says so")
def test_free_memory_is_a_part_of_what_there_is() -> None:
    assert 0 < free_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_process_that_has_used_no_gpu_does_not_ask_for_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it forks afterwards, as vLLM may, could use none."""

    def asked() -> bool:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "is_available", asked)
    monkeypatch.setattr(torch.cuda, "empty_cache", asked)
    give_gpu_memory_back()
