"""python tests/killing.py LIST ARGUMENTS: runs `latent-thoughts ARGUMENTS`, killed once before every commit.

A commit is a rename that puts a file or folder in its place (shard, checkpoint, model, manifest, results, page), or any
change of an object in a store. Each attempt is a fork that ends itself by SIGKILL just before the first commit that no
attempt has died at; LIST names those. So each stage is killed in its middle, with the work since its last commit lost.
Where KILLED_AT is set, only commits whose names it matches (a regular expression) are died at.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Imported once, before the forks: also what stages import where they need it.
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg  # noqa: F401
import pandas  # noqa: F401
import scipy.stats  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
from transformers.models.llama import LlamaForCausalLM  # noqa: F401

from latent_thoughts import cli, em  # noqa: F401
from latent_thoughts.stages import report  # noqa: F401

FIGURES = re.compile(r"figures/(?!accuracy\.png)")  # one stands for all of them


def attempt(deaths: Path, arguments: list[str]) -> None:
    wanted = re.compile(os.environ.get("KILLED_AT", ""))
    known = set(deaths.read_text().splitlines()) if deaths.exists() else set()

    def commit(target: str) -> None:
        if target not in known and not FIGURES.search(target) and wanted.search(target):
            with deaths.open("a") as file:
                file.write(f"{target}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    _before_renames(commit)
    if any(argument.startswith("s3://") for argument in arguments):
        _before_changes(commit)
    sys.argv[1:] = arguments
    cli.main()


def _before_renames(commit: Callable[[str], None]) -> None:
    replace = os.replace

    def fatal(source: Path, target: Path) -> None:
        commit(str(target))
        replace(source, target)

    os.replace = fatal


def _before_changes(commit: Callable[[str], None]) -> None:
    from s3fs import S3FileSystem

    call = S3FileSystem._call_s3

    async def fatal(self: S3FileSystem, method: str, *rest: Any, **request: Any) -> Any:
        if method in ("put_object", "copy_object", "complete_multipart_upload", "delete_object", "delete_objects"):
            first = request.get("Delete", {}).get("Objects", [{"Key": None}])[0]["Key"]
            # every attempt has a lock of a number of its own, before which it would die for ever
            commit(re.sub(r"/\.lock/\d+", "/.lock/N", f"{method} {request.get('Key', first)}"))
        return await call(self, method, *rest, **request)

    S3FileSystem._call_s3 = fatal


def main() -> int:
    while True:
        if (child := os.fork()) == 0:
            attempt(Path(sys.argv[1]), sys.argv[2:])
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            return status


if __name__ == "__main__":
    sys.exit(main())
