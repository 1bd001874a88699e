"""The command line. Heavy imports stay inside the commands, so that --help is quick."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from latent_thoughts import __version__, places
from latent_thoughts.types import Interrupted, UserError

if TYPE_CHECKING:
    from latent_thoughts.em import Loop, Run

    Anywhere = Path
else:

    class Anywhere:
        """A path or a URL, which `places.place` makes of it: one is a Path, the other has a Path's methods."""

        def __init__(self, path: str):
            raise AssertionError("cyclopts takes the converter instead")

    Anywhere.__name__ = "Path"  # what --help calls it


app = App(
    name="latent-thoughts",
    version=__version__,
    help_format="plaintext",  # markdown would load a parser first
    help="Train language models on the thoughts behind the text. Every command resumes when it is run again.",
)

Place = Annotated[
    Anywhere, Parameter(converter=lambda _, tokens: places.place(tokens[0].value), accepts_keys=False, n_tokens=1)
]
Out = Annotated[
    Place, Parameter(name=["--out", "-o"], help="The run folder, here or in a store (s3://, gs://, hf://).")
]
RecipePath = Annotated[Place, Parameter(help="A YAML recipe (see recipes/).")]
Overrides = Annotated[list[str] | None, Parameter(help="Settings that replace the recipe's: train.lr=3e-4 ...")]
Limit = Annotated[int | None, Parameter(help="Read at most so many documents (data.limit).")]
Yes = Annotated[bool, Parameter(name=["--yes", "-y"], negative="", help="Ask the teacher without a question before.")]
Iteration = Annotated[int, Parameter(name="--iteration", help="EM iteration; 0 is the warm start.")]


def _run(
    recipe: Path, out: Path, overrides: list[str] | None, limit: int | None = None, processes: bool = False
) -> Run:
    """The run of a recipe, with torch's threads set. Raises UserError where torchrun started `processes` of a
    command that runs in one."""
    from latent_thoughts.config import load_recipe
    from latent_thoughts.em import Run
    from latent_thoughts.model import set_up_torch
    from latent_thoughts.parallel import launched

    if launched() > 1 and not processes:
        raise UserError("of the commands train alone runs in several processes: start this one without torchrun")
    limits = [] if limit is None else [f"data.limit={limit}"]
    loaded = load_recipe(recipe, [*(overrides or []), *limits])
    set_up_torch(loaded.threads)
    return Run(loaded, out)


def _record(run: Run, made: Path) -> None:
    """Leaves the recipe in the run folder, before its stage `made` is made."""
    from latent_thoughts.provenance import record_recipe

    if told := record_recipe(run.recipe, run.folder, made):
        print(f"latent-thoughts: {told}", file=sys.stderr)


def _loop(run: Run, iteration: int, first: int = 0) -> Loop:
    """The run's EM. Raises UserError for an iteration before `first`."""
    from latent_thoughts.em import Loop

    if iteration < first:
        raise UserError(f"--iteration is {first} or more here, not {iteration} (0 is the warm start)")
    return Loop(run, "em", run.recipe.sample, run.folder)


@app.command
def demo(
    *,
    out: Out = Path("runs/demo"),
    seeds: Annotated[
        str, Parameter(help="Comma-separated seeds; as many as there are cores (or GPUs) run side by side.")
    ] = "0,1",
    samples: Annotated[str, Parameter(help="Further numbers of draws K, for both presets: 1,4,16")] = "",
    recipe: Annotated[str, Parameter(help="castle, hindsight or stories: a recipe of a built-in world.")] = "castle",
    set_: Annotated[list[str] | None, Parameter(name="--set", help="Overrides of the recipe.")] = None,
) -> None:
    """Bootstrap a small model on a built-in world and compare it with every baseline."""
    from latent_thoughts.demo import demo as run

    run(out, _integers(seeds, "--seeds"), _integers(samples, "--samples"), set_ or [], recipe)


@app.command
def experiment(
    name: Annotated[str, Parameter(help="methods, bootstrap, samples, ablations, data, or a YAML file like theirs.")],
    overrides: Overrides = None,
    *,
    size: Annotated[
        Literal["tiny", "small", "paper"],
        Parameter(help="tiny: the castle, on a laptop; small: SmolLM2-135M on GSM8K; paper: planned, not run."),
    ] = "tiny",
    seeds: Annotated[str, Parameter(help="Comma-separated; a verdict needs two at least.")] = "0,1,2",
    out: Annotated[Place | None, Parameter(name=["--out", "-o"], help="The run folder; paper needs none.")] = None,
    limit: Limit = None,
) -> None:
    """Run one of the paper's experiments for several seeds: tables, figures, a report, and verdict.json."""
    from latent_thoughts import experiment as experiments

    limits = [] if limit is None else [f"data.limit={limit}"]
    changes, numbers = [*(overrides or []), *limits], _integers(seeds, "--seeds")
    if size == "paper":
        from latent_thoughts.scale.estimate import estimate, show

        show(estimate(experiments.named(name).recipe(size, changes)), None)
        return
    if out is None:
        raise UserError(f"--out is missing: name a folder for the runs of size {size}")
    experiments.experiment(name, size, numbers, out, changes)


def _integers(text: str, name: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{name} must be whole numbers with commas between them, not {text!r}") from None
    if twice := [number for number in found if found.count(number) > 1]:
        raise UserError(f"{name} has {twice[0]} more than once")
    return found


@app.command
def prepare(recipe: RecipePath, overrides: Overrides = None, *, out: Out, limit: Limit = None) -> None:
    """Read, split, chunk and tokenise a corpus; set up the initial checkpoint."""
    from latent_thoughts.store import run_lock

    with run_lock(out):
        run = _run(recipe, out, overrides, limit)
        _record(run, run.prepared)
        _tell(run.prepared, run.prepare().counts)


@app.command
def synthesize(recipe: RecipePath, overrides: Overrides = None, *, out: Out, yes: Yes = False) -> None:
    """Get the warm start's thoughts, or paraphrases: those that come with the data, or a teacher's.

    Before a teacher behind an endpoint is asked, you are shown what it will take and cost.
    """
    from dataclasses import replace

    from latent_thoughts.approve import approval
    from latent_thoughts.store import run_lock

    with run_lock(out):
        run = replace(_run(recipe, out, overrides), approve=approval(yes))
        folder = run.synthesized(run.recipe.synthesize.method)
        _record(run, folder)
        _tell(folder, run.synthesize().counts)


@app.command
def prompts(folder: Annotated[Place, Parameter(help="Where they go; files that are there stay.")]) -> None:
    """Copy the built-in prompts, to change them and name them in synthesize.prompts."""
    from latent_thoughts.teachers.prompts import copy_to

    for path in copy_to(folder):
        print(path)


@app.command
def sample(recipe: RecipePath, overrides: Overrides = None, *, out: Out, iteration: Iteration = 1) -> None:
    """E-step: infer thoughts for the corpus with the model of the iteration before."""
    from latent_thoughts.store import run_lock

    with run_lock(out):
        run = _run(recipe, out, overrides)
        loop, last = _loop(run, iteration, first=1), run.recipe.em.iterations
        if iteration > last:
            raise UserError(
                f"--iteration {iteration} is beyond em.iterations, which is {last}: K and temperature are laid out "
                f"over them, so set em.iterations={iteration} or more"
            )
        folder = loop.iteration(iteration) / "sample"
        _record(run, folder)
        _tell(folder, loop.sample(iteration).counts)


@app.command
def train(recipe: RecipePath, overrides: Overrides = None, *, out: Out, iteration: Iteration = 0) -> None:
    """M-step: train on documents with their thoughts (iteration 0: the warm start).

    On several GPUs: torchrun --nproc-per-node 8 -m latent_thoughts.cli train RECIPE --out RUN
    """
    from latent_thoughts.store import run_lock

    main = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    with run_lock(out) if main else contextlib.nullcontext():
        run = _run(recipe, out, overrides, processes=True)
        loop = _loop(run, iteration)
        folder = loop.iteration(iteration) / "train"
        if main:
            _record(run, folder)
        manifest = run.train_warm_start() if iteration == 0 else loop.train(iteration)
        if main:
            _tell(folder, manifest.counts)


@app.command
def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    *,
    out: Out,
    iteration: Iteration = 0,
    model: Annotated[
        str | None, Parameter(help="Ask the recipe's tasks of this model instead: a folder, a hub name or a GGUF file.")
    ] = None,
) -> None:
    """Likelihood, bound and answers of an iteration's model on held-out documents, and the recipe's tasks."""
    from rich.console import Console

    from latent_thoughts import examine
    from latent_thoughts.stages.evaluate.shown import places_table
    from latent_thoughts.store import run_lock

    with run_lock(out):
        run = _run(recipe, out, overrides)
        if model is not None:
            _record(run, out / "tasks")
            _tell_tasks(examine.evaluate_model(run.recipe, model, out))
            return
        loop = _loop(run, iteration)
        folder = loop.iteration(iteration) / "evaluate"
        _record(run, folder)
        row, evaluated = loop.evaluate(iteration)
        _tell(folder, evaluated.counts)
        Console().print(places_table(evaluated.counts))
        _tell_tasks(row["tasks"])
        examine.record(run.recipe, out, row)


@app.command
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
    from rich.console import Console

    from latent_thoughts.stages.evaluate.compare import compare as differences
    from latent_thoughts.stages.evaluate.compare import load
    from latent_thoughts.stages.evaluate.shown import comparison_tables

    if len(models) < 2:
        raise UserError("name two folders at least")
    found = [load(folder) for folder in models]
    for table in comparison_tables(found, differences(found)):
        Console().print(table)


@app.command
def em(recipe: RecipePath, overrides: Overrides = None, *, out: Out, limit: Limit = None, yes: Yes = False) -> None:
    """All stages in turn: warm start, EM iterations, baselines, report."""
    from latent_thoughts import em as chain
    from latent_thoughts.approve import approval
    from latent_thoughts.stages.report import report as write
    from latent_thoughts.store import run_lock

    with run_lock(out):
        run = _run(recipe, out, overrides, limit)
        chain.em(run.recipe, out, approval(yes))
        write(out)


@app.command
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    *,
    json: Annotated[Place | None, Parameter(help="Write the plan to this file too.")] = None,
) -> None:
    """What a run of a recipe will cost: tokens, FLOPs, hours, money and disk of every stage, before it starts."""
    from latent_thoughts.config import load_recipe
    from latent_thoughts.model import set_up_torch
    from latent_thoughts.scale.estimate import estimate, show

    loaded = load_recipe(recipe, overrides)
    set_up_torch(loaded.threads)
    show(estimate(loaded), json)


@app.command
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


@app.command
def watch(
    run: Annotated[Place, Parameter(help="A run folder, or one that holds several.")],
    *,
    every: Annotated[float, Parameter(help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, Parameter(negative="", help="Look once, and end.")] = False,
) -> None:
    """See how far a run is: stages, rate, time left, loss, health. It reads the run's files and changes none."""
    from latent_thoughts.watch import watch as look

    if every <= 0:
        raise UserError(f"--every is a number of seconds, not {every:g}")
    look(run, every, once)


@app.command
def doctor(
    run: Annotated[Place, Parameter(help="A run folder.")],
    *,
    repair: Annotated[bool, Parameter(negative="", help="Take away what is damaged (into RUN/damaged).")] = False,
) -> None:
    """Check every file of a run: manifests, shards, models, checkpoints, journals, replies, and who holds it.

    With --repair what is damaged is taken away, and the run's own command makes it again. Ends with code 1 where
    something stays wrong.
    """
    from latent_thoughts.doctor import doctor as examine

    if not examine(run, repair):
        sys.exit(1)


@app.command
def export(
    run: Annotated[Place, Parameter(help="A run folder.")],
    target: Annotated[str, Parameter(help="A file, a folder, or a name on the hub.")],
    *,
    format: Annotated[str, Parameter(help="jsonl, parquet, dataset (load_from_disk) or hub (push_to_hub).")] = "jsonl",
    iteration: Iteration = 0,
    stage: Annotated[
        Place | None, Parameter(help="Another stage folder, such as RUN/baselines/wrap_cot/synthesize.")
    ] = None,
    license: Annotated[str, Parameter(help="Of the texts, for the dataset card.")] = "unknown",
    public: Annotated[bool, Parameter(negative="", help="On the hub, for everyone to see.")] = False,
) -> None:
    """Write documents with their thoughts as text, for other software."""
    from latent_thoughts.export import export as write

    name = "synthesize" if iteration == 0 else "sample"
    folder = stage or run / f"iter_{iteration:02}" / name
    count = write(folder, run / "base", run / "recipe.yaml", target, format, license, not public)
    print(f"{count:,} documents in {target}")


@app.command
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
    from latent_thoughts.progress import printable

    set_up_torch(None)
    thought, answer = think(model, question, seed, temperature, max_thought_tokens, max_answer_tokens)
    console = Console()
    console.print(Text(printable(thought), style="dim"))
    console.print(Text(printable(answer)))


def _tell(folder: Path, counts: dict[str, object]) -> None:
    """Prints a stage's counts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = Text(str(folder), "table.title")  # as text: what stands in a path's brackets is no markup
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in counts.items():
        if isinstance(value, list | dict):  # tables of their own: the manifest has them
            continue
        table.add_row(Text(name), Text(f"{value:,.4g}" if isinstance(value, float) else str(value)))
    Console().print(table)


def _tell_tasks(results: list[dict[str, object]]) -> None:
    from rich.console import Console

    from latent_thoughts.stages.evaluate.shown import tasks_table

    if results:
        Console().print(tasks_table(results))


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # no bars beside our own: transformers has one for GGUF files that its own setting does not reach
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app()
    except (UserError, *places.errors()) as error:
        _end(_no_space(error) or " ".join(str(error).split()))
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            command = shlex.join(["latent-thoughts", *sys.argv[1:]])
            print(f"latent-thoughts: {stop}; resume with: {command}", file=sys.stderr)
    except KeyboardInterrupt:
        print("latent-thoughts: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except BaseException as error:  # torch's of a checkpoint is no Exception
        if isinstance(error, SystemExit) or not (line := _no_space(error)):
            raise
        _end(line)


def _no_space(error: BaseException) -> str | None:
    """What to say where an error comes of a full disk, else None."""
    from latent_thoughts.files import out_of_space

    if not out_of_space(error):
        return None
    named = getattr(error, "filename", None)
    return (
        f"no space left to write{f' {named}' if named else ''}: make room and run the same command again; "
        "what is finished is kept"
    )


def _end(line: str) -> None:
    from latent_thoughts.progress import printable

    print(f"latent-thoughts: {printable(line)}", file=sys.stderr)  # an error may quote a line of a corpus
    sys.exit(1)


if __name__ == "__main__":
    main()
