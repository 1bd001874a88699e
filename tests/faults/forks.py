"""Commands of `latent-thoughts` in forks of a process that has imported what they need: each begins in milliseconds."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

# Imported once, before the forks.
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
from transformers.models.llama import LlamaForCausalLM  # noqa: F401

from latent_thoughts import cli, em  # noqa: F401
from latent_thoughts.stages import report  # noqa: F401


def start(arguments: Sequence[str], log: Path) -> int:
    """The number of a new process that runs the command; what it says goes to `log`."""
    if pid := os.fork():
        return pid
    code = 70  # of a traceback
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv[1:] = arguments
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """The exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def open_stage(run: Path) -> str:
    """What a run is at: the stage that is begun and not complete, or what comes before, between and after stages."""
    begun = [path.parent for path in run.rglob("stage.json")]
    working = [folder for folder in begun if not (folder / "manifest.json").exists()]
    if working:
        return str(max(working, key=lambda folder: (folder / "stage.json").stat().st_mtime).relative_to(run))
    if (run / "results.json").exists():
        return "report"
    return "between" if begun else "start"
