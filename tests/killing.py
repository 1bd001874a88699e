"""python tests/killing.py LIST ARGUMENTS: runs `latent-thoughts ARGUMENTS`, killed once before every commit.

A commit is a rename that puts a file or folder in its place (shard, checkpoint, model, manifest, results, page).
Each attempt is a fork that ends itself by SIGKILL just before the first commit that no attempt has died at; LIST
names those. So every stage is killed in its middle, with the work since its last commit lost.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

# Imported once, before the forks.
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
from transformers.models.llama import LlamaForCausalLM  # noqa: F401

from latent_thoughts import cli, em  # noqa: F401
from latent_thoughts.stages import report  # noqa: F401


def attempt(deaths: Path, arguments: list[str]) -> None:
    replace, known = os.replace, set(deaths.read_text().splitlines()) if deaths.exists() else set()

    def fatal(source: Path, target: Path) -> None:
        if str(target) not in known and not str(target).endswith(".svg"):  # a figure comes as PNG and SVG
            with deaths.open("a") as file:
                file.write(f"{target}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = fatal
    sys.argv[1:] = arguments
    cli.main()


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
