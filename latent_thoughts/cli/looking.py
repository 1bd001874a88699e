"""The commands that look at what was made, or hand it out."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from latent_thoughts import places
from latent_thoughts.cli.options import Anywhere, Iteration, Place
from latent_thoughts.types import UserError


def report(
    run: Annotated[Place, Parameter(help="A run folder with results.json.")],
    *,
    texts: Annotated[int, Parameter(help="Chunks whose draws the page carries, at most.")] = 10_000,
) -> None:
    """Table, plots and one HTML page of a finished run, with its thoughts to read."""
    from latent_thoughts.stages.report import report as write

    if texts < 0:
        raise UserError(f"--texts is a number of chunks, not {texts}")
    write(run, texts)


def watch(
    run: Annotated[Place, Parameter(help="A run folder, or one that holds several.")],
    *,
    every: Annotated[float, Parameter(help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, Parameter(help="Look once, and end.")] = False,
) -> None:
    """See how far a run is: stages, rate, time left, loss, health. It reads the run's files and changes none."""
    from latent_thoughts.watch import watch as look

    if every <= 0:
        raise UserError(f"--every is a number of seconds, not {every:g}")
    look(run, every, once)


def compare(
    models: Annotated[
        list[Anywhere],
        Parameter(
            converter=lambda _, tokens: [places.place(token.value) for token in tokens],
            accepts_keys=False,
            help="Two folders or more in which something was evaluated: RUN/iter_01 ...",
        ),
    ],
    /,
) -> None:
    """Compare evaluated models on the same questions and texts, and say which differences are real."""
    from latent_thoughts.stages.evaluate.compare import compare as differences
    from latent_thoughts.stages.evaluate.compare import load
    from latent_thoughts.stages.evaluate.shown import comparison_tables
    from latent_thoughts.terminal import output

    if len(models) < 2:
        raise UserError("name two folders at least")
    found = [load(folder) for folder in models]
    for table in comparison_tables(found, differences(found)):
        output().print(table)


def doctor(
    run: Annotated[Place, Parameter(help="A run folder.")],
    *,
    repair: Annotated[bool, Parameter(help="Take away what is damaged (into RUN/damaged).")] = False,
) -> None:
    """Check every file of a run: manifests, shards, models, checkpoints, journals, replies, and who holds it.

    With --repair what is damaged is taken away, and the run's own command makes it again. Ends with code 1 where
    something stays wrong.
    """
    from latent_thoughts.doctor import doctor as examine

    if not examine(run, repair):
        sys.exit(1)


def prompts(folder: Annotated[Place, Parameter(help="Where they go; files that are there stay.")]) -> None:
    """Copy the built-in prompts, to change them and name them in synthesize.prompts."""
    from latent_thoughts.teachers.prompts import copy_to

    for path in copy_to(folder):
        print(path)


def export(
    run: Annotated[Place, Parameter(help="A run folder.")],
    target: Annotated[str, Parameter(help="A file, a folder, or a name on the hub.")],
    *,
    format: Annotated[
        str | None,
        Parameter(help="jsonl, parquet, dataset (load_from_disk) or hub (push_to_hub); else as the file's name ends."),
    ] = None,
    iteration: Iteration = 0,
    stage: Annotated[
        Place | None, Parameter(help="Another stage folder, such as RUN/baselines/wrap_cot/synthesize.")
    ] = None,
    license: Annotated[str, Parameter(help="Of the texts, for the dataset card.")] = "unknown",
    held_out: Annotated[bool, Parameter(help="Of prepare: the held-out documents, not the others.")] = False,
    public: Annotated[bool, Parameter(help="On the hub, for everyone to see.")] = False,
) -> None:
    """Write documents with their thoughts as text, for other software."""
    from latent_thoughts.export import export as write
    from latent_thoughts.export import kind_of

    name = "synthesize" if iteration == 0 else "sample"
    folder = stage or run / f"iter_{iteration:02}" / name
    count = write(folder, run, target, format or kind_of(target), license, not public, held_out)
    print(f"{count:,} documents in {target}")


def ask(
    model: Annotated[Place, Parameter(help="A model folder, or a run's train stage.")],
    question: Annotated[str, Parameter(help="The text that the answer is to follow, as in training.")],
    *,
    seed: Annotated[int, Parameter(help="Of the draws, where there is a temperature.")] = 0,
    temperature: Annotated[float, Parameter(help="Of thought and answer; 0: always the likeliest token.")] = 0.0,
    max_thought_tokens: Annotated[int, Parameter(help="At which a thought is cut.")] = 256,
    max_answer_tokens: Annotated[int, Parameter(help="At which an answer is cut.")] = 128,
) -> None:
    """Let a trained model think about a question and answer it; the thought is printed dimmed."""
    from rich.console import Console
    from rich.text import Text

    from latent_thoughts.ask import ask as think
    from latent_thoughts.model import set_up_torch
    from latent_thoughts.terminal import printable

    set_up_torch(None)
    thought, answer = think(model, question, seed, temperature, max_thought_tokens, max_answer_tokens)
    console = Console()
    console.print(Text(printable(thought), style="dim"))
    console.print(Text(printable(answer)))
