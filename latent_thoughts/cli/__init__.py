"""The command line. Heavy imports stay inside the commands, so that --help is quick."""

from __future__ import annotations

import os
import shlex
import sys

from cyclopts import App, Parameter

from latent_thoughts import __version__, places
from latent_thoughts.cli import looking, runs, stages
from latent_thoughts.types import Interrupted, UserError

app = App(
    name="latent-thoughts",
    version=__version__,
    help_format="plaintext",  # markdown would load a parser first
    suppress_keyboard_interrupt=False,  # it is told below
    default_parameter=Parameter(negative=""),  # neither --no-yes nor --empty-overrides
    help="Train language models on the thoughts behind the text. Every command resumes when it is run again.",
)
for command in (
    *(runs.demo, runs.experiment, runs.em, runs.plan),
    *(stages.prepare, stages.synthesize, stages.train, stages.sample, stages.evaluate),
    *(looking.report, looking.watch, looking.compare, looking.doctor, looking.prompts, looking.export, looking.ask),
):
    app.command(command)


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # no bars beside our own: transformers has one for GGUF files that its own setting does not reach
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app()
    except (UserError, *places.errors()) as error:
        _end(_no_room(error) or " ".join(str(error).split()))
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            command = shlex.join(["latent-thoughts", *sys.argv[1:]])
            if os.environ.get("WORLD_SIZE", "1") != "1":
                command = f"the same torchrun command ({command})"
            print(f"latent-thoughts: {stop}; resume with: {command}", file=sys.stderr)
    except KeyboardInterrupt:
        print("latent-thoughts: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except BaseException as error:  # torch's of a checkpoint is no Exception
        if isinstance(error, SystemExit) or not (line := _no_room(error)):
            raise
        _end(line)


def _no_room(error: BaseException) -> str | None:
    """What to say where an error comes of a full disk, of no memory or of the system's limits, else None."""
    from latent_thoughts.files import out_of_space
    from latent_thoughts.machine import out_of_memory, out_of_threads

    if out_of_space(error):
        named = getattr(error, "filename", None)
        trouble = f"no space left to write{f' {named}' if named else ''}: make room"
    elif out_of_threads(error):
        trouble = "the system lets this process start no more threads: raise its limits (ulimit -u, ulimit -v)"
    elif out_of_memory(error):
        trouble = "out of memory: free some, or use a machine with more"
    else:
        return None
    return f"{trouble} and run the same command again; what is finished is kept"


def _end(line: str) -> None:
    from latent_thoughts.terminal import printable

    print(f"latent-thoughts: {printable(line)}", file=sys.stderr)  # an error may quote a line of a corpus
    sys.exit(1)
