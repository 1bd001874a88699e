"""python tests/teachers/forking.py ARGUMENTS: for every line on stdin a fork runs `latent-thoughts ARGUMENTS`.

Prints the fork's process id, and its exit status (negative: a signal) when it ends. What takes seconds to import is
imported once.
"""

from __future__ import annotations

import os
import sys

import aiolimiter  # noqa: F401
import httpx2  # noqa: F401
import openai  # noqa: F401
from transformers import AutoTokenizer  # noqa: F401

from latent_thoughts import approve, cli, em  # noqa: F401
from latent_thoughts.teachers import openai_api  # noqa: F401

if __name__ == "__main__":
    for _ in sys.stdin:
        if (child := os.fork()) == 0:
            os.dup2(2, 1)  # what it prints is not for whoever reads the numbers
            cli.main()
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
