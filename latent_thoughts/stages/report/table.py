"""The tables: one line a model, and one a K. Plain cells, for the terminal and for the page alike."""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text

from latent_thoughts import terminal
from latent_thoughts.stages.report.differences import difference, points
from latent_thoughts.stages.report.methods import METHODS
from latent_thoughts.stages.report.summary import (
    LOOPS,
    Line,
    Mean,
    Results,
    percents,
)
from latent_thoughts.stages.report.tasks import tasks
from latent_thoughts.terminal import bound_name

LOOSE = f" {terminal.MARK}"


@dataclass(frozen=True, slots=True)
class Table:
    """`heads` are (title, explanation); `lines` are (method, emphasis, cells), emphasis being strong, dim or none."""

    heads: list[tuple[str, str]]
    lines: list[tuple[str, str, list[str]]]
    notes: list[str]


def percent(found: Mean | None, error: bool = True) -> str:
    if found is None:
        return "–"
    return terminal.percent(found.value, found.error if error else None)


def nats(found: Mean | None) -> str:
    return "–" if found is None else f"{found.value:.3f}".replace("-", "−")


def bound(line: Line, k: str) -> str:
    """L_K in nats a token, marked where no thought about some chunks came to an end."""
    unfinished = line.mean(f"bound_unfinished.{k}")
    return nats(line.mean(f"bound_per_token.{k}")) + (LOOSE if unfinished and unfinished.value > 0 else "")


def loose(lines: list[Line], bounds: list[str]) -> list[str]:
    """What the mark of a bound means, where one has it."""
    shares = [m.value for line in lines for k in bounds if (m := line.mean(f"bound_unfinished.{k}")) and m.value > 0]
    if not shares:
        return []
    some = f"About some chunks, up to {percents(max(shares))} %, no thought came to an end"
    return [f"{terminal.MARK} {some}: these count with the bound of the empty thought, which is loose."]


def count(found: Mean | None) -> str:
    return "–" if found is None else terminal.count(found.value)


@dataclass(frozen=True, slots=True)
class Period:
    """The unit of a column of times: what suits the longest of them, as for the charts' axes (curves.py)."""

    head: str
    seconds: float

    @staticmethod
    def of(spent: list[Mean | None]) -> Period:
        longest = max((found.value for found in spent if found), default=0.0)
        if longest >= 7200:
            return Period("Hours", 3600.0)
        return Period("Minutes", 60.0) if longest >= 120 else Period("Seconds", 1.0)

    def shown(self, found: Mean | None) -> str:
        if found is None:
            return "–"
        return f"{found.value:.0f}" if self.seconds == 1 else terminal.figure(found.value / self.seconds)


def lines(results: Results) -> list[tuple[Line, str]]:
    """The table's lines with their emphasis: all of EM's own iterations, of which the last stands out."""
    found: list[tuple[Line, str]] = []
    for method in results.methods:
        if method not in LOOPS:
            line = results.single(method)
            found += [(line, "")] if line else []
            continue
        for samples in results.samples(method):
            loop = results.loop(method, samples)
            own = method == "em" and samples == results.main_samples(method)
            found += [(line, "dim") for line in loop[:-1] if own]
            found.append((loop[-1], "strong" if own else ""))
    return found


def main_table(results: Results) -> Table:
    """Every model: its accuracy, and always beside it the bound, and what it cost."""
    rows = lines(results)
    apart = [n for n in ("known", "unknown") if any(line.mean(f"accuracy_{n}") for line, _ in rows)]
    time = Period.of([line.spent("seconds.sample", "seconds.train") for line, _ in rows])
    heads = [
        ("Method", "How the model was trained"),
        ("Iter.", "EM iteration"),
        ("K", "Thoughts sampled for each text in the E-step"),
        ("Accuracy", "Share of right answers on held-out questions"),
        *[(n.capitalize(), f"Accuracy where the facts are {n} to the warm start") for n in apart],
        *[(bound_name(k), f"Bound on held-out text with {k} thoughts, nats per token") for k in results.bounds],
        ("NLL", "Negative log-likelihood of held-out text without a thought, nats per token"),
        ("Tokens", "Tokens trained on, for EM from the warm start on"),
        ("Steps", "Optimizer steps, for EM from the warm start on"),
        (time.head, "Sampling and training, for EM from the warm start on"),
    ]
    cells = []
    for line, emphasis in rows:
        row = [
            line.name,
            str(line.iteration) if line.method in LOOPS else "",
            str(line.samples) if line.samples else "",
            percent(line.mean("accuracy")),
            *[percent(line.mean(f"accuracy_{n}"), error=False) for n in apart],
            *[bound(line, k) for k in results.bounds],
            nats(line.mean("nll_per_token")),
            count(line.spent("train_tokens")),
            count(line.spent("train_steps")),
            time.shown(line.spent("seconds.sample", "seconds.train")),
        ]
        cells.append((line.method, emphasis, row))
    return Table(heads, cells, main_notes(results, [line for line, _ in rows], bool(apart)))


def main_notes(results: Results, rows: list[Line], apart: bool) -> list[str]:
    """What stands behind the ± and the columns."""
    notes = []
    found = [m for line in rows if (m := line.mean("accuracy")) and m.error is not None]
    seeds = sorted({m.n for m in found if m.over == "seeds"})
    answers = sorted({m.n for m in found if m.over == "answers"})
    if seeds:
        notes.append(f"± is the standard error over seeds (n = {' or '.join(map(str, seeds))}).")
    if answers:
        which = "where there is one seed only, ±" if seeds else "One seed: ±"
        notes.append(f"{which} is the binomial standard error over {' or '.join(map(str, answers))} answers.")
    if apart:
        notes.append("Known: every fact a question needs occurs in the warm start’s thoughts. Unknown: one does not.")
    if results.bounds:
        names = f"{bound_name(results.bounds[-1])}: lower bound on log p(text) with {results.bounds[-1]} thoughts"
        notes.append(f"{names}, higher is better; NLL: without a thought, lower is better. Nats per token.")
        notes += loose(rows, results.bounds)
    if any(line.method in LOOPS for line in rows):
        notes.append("Tokens, steps and time of EM count from the warm start on.")
    ended = results.run.get("ended")
    return notes + [f"Without a row: {told}." for told in ended or []]


def samples_table(results: Results) -> Table | None:
    """Final accuracy and E-step cost by K; None where only one K was run."""
    if not results.has_sample_comparison:
        return None
    ends = []
    for method, samples in ((m, k) for m in LOOPS for k in results.samples(m)):
        *before, last = results.loop(method, samples)
        ends.append(Line(method, last.iteration, samples, last.rows, tuple(before)))  # without the warm start
    time = Period.of([line.spent("seconds.sample") for line in ends])
    heads = [
        ("E-step", "How thoughts are sampled and accepted"),
        ("K", "Thoughts sampled for each text"),
        ("Final accuracy", "Share of right answers on held-out questions, last iteration"),
        ("Tokens sampled", "In all E-steps"),
        (f"E-step {time.head.lower()}", "In all E-steps"),
    ]
    cells = []
    for line in ends:
        row = [
            {"em": "default", "em_paper": "paper"}[line.method],
            str(line.samples),
            percent(line.mean("accuracy")),
            count(line.spent("sample_tokens")),
            time.shown(line.spent("seconds.sample")),
        ]
        cells.append((line.method, "", row))
    return Table(heads, cells, [])


def variants_table(results: Results) -> Table | None:
    """EM with other settings beside the recipe's own, after the last iteration; None where there are none."""
    own = results.final("em")
    if own is None or not results.variants:
        return None
    shown = [("as the recipe says", own), *((n.replace("_", " "), results.variant(n)[-1]) for n in results.variants)]
    time = Period.of([line.spent("seconds.sample", "seconds.train") for _, line in shown])
    heads = [
        ("Setting", "What was changed"),
        ("Accuracy", "Share of right answers on held-out questions, last iteration"),
        ("Difference", "To the recipe's own settings, of the same seeds, with its 95 % interval"),
        ("Unknown", "Accuracy where the facts are unknown to the warm start"),
        *[(bound_name(k), f"Bound on held-out text with {k} thoughts, nats per token") for k in results.bounds[-1:]],
        ("Tokens sampled", "In all E-steps"),
        (time.head, "Sampling and training, from the warm start on"),
    ]
    cells = []
    for name, line in shown:
        found = difference(line, own, "accuracy") if line is not own else None
        row = [
            name,
            percent(line.mean("accuracy")),
            points(found),
            percent(line.mean("accuracy_unknown"), error=False),
            *[bound(line, k) for k in results.bounds[-1:]],
            count(Line("em", 0, 0, line.rows, tuple(h for h in line.history if h.iteration)).spent("sample_tokens")),
            time.shown(line.spent("seconds.sample", "seconds.train")),
        ]
        cells.append(("em", "strong" if line is own else "", row))
    marked = loose([line for _, line in shown], results.bounds[-1:])
    return Table(heads, cells, ["Each setting is changed alone; all begin with the same warm start.", *marked])


def documents_table(results: Results) -> Table | None:
    """Raw text of more and more documents beside EM; None where it was not run."""
    if not results.cells:
        return None
    heads = [
        ("Method", "How the model was trained"),
        ("Documents", "That there were to train on"),
        ("Tokens", "Tokens trained on, for EM from the warm start on"),
        ("Accuracy", "Share of right answers on held-out questions"),
        ("Unknown", "Accuracy where the facts are unknown to the warm start"),
    ]
    own = results.final("em")
    cells = []
    for line in [*results.cells, *([own] if own else [])]:
        row = [line.name, f"{line.documents:,.0f}", count(line.spent("train_tokens")), percent(line.mean("accuracy"))]
        cells.append((line.method, "strong" if line is own else "", [*row, percent(line.mean("accuracy_unknown"))]))
    return Table(heads, cells, [])


def tasks_table(results: Results) -> Table | None:
    """Every task that was asked: a line a model and budget of thought tokens; None where none was."""
    heads = [
        ("Method", "How the model was trained"),
        ("Task", "Of the evaluation harness"),
        ("Form", "Direct, chain of thought, or with thoughts of the model"),
        ("Thought tokens", "Allowed, and in brackets used in the mean"),
        ("n", "Questions asked, or seeds of the run"),
        ("Accuracy", "Share of right answers"),
    ]
    cells = []
    for task in tasks(results):
        for model in task.models:
            for r in model.results:
                used = "" if r.thought_tokens is None else f" ({r.thought_tokens:.0f})"
                budget = "" if r.budget is None else f"≤ {r.budget}{used}"
                asked = f"{r.accuracy.n} {r.accuracy.over}"
                row = [model.name, task.name, task.form, budget, asked, percent(r.accuracy)]
                cells.append((model.method, "", row))
    notes = ["± is the standard error: over questions and their samples, over seeds where the run has several."]
    return Table(heads, cells, notes) if cells else None


def meanings(results: Results) -> list[tuple[str, str, str]]:
    """(method, name, what it is) of the methods that were run."""
    return [(m, METHODS[m].name, METHODS[m].meaning) for m in results.methods if m in METHODS]


def show(results: Results) -> None:
    """Prints the tables."""
    console = terminal.output()
    console.print(grid(main_table(results)))
    for _, name, meaning in meanings(results):
        console.print(Text.assemble((name, "bold"), f": {meaning}."))
    for further in (samples_table(results), variants_table(results), documents_table(results)):
        if further is not None:
            console.print()
            console.print(grid(further))


def grid(shown: Table) -> terminal.Grid:
    """For the terminal. Where it is narrow costs go first; the iteration (what else tells EM's lines apart?), accuracy
    and the last bound stay."""
    heads = [head for head, _ in shown.heads]
    bounds = [head for head in heads if head.startswith("L")]
    drop = ["Steps", "Tokens", *bounds[:-1], "Seconds", "Minutes", "Hours", "NLL", "Known", "Unknown", "K"]
    styles = {"strong": "bold", "dim": "dim"}
    rows = [[Text(cell, styles.get(emphasis, "")) for cell in cells] for _, emphasis, cells in shown.lines]
    return terminal.Grid(heads, rows, words=heads[:1], drop=drop, notes=shown.notes)
