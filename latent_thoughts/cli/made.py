"""What a stage command says of the stage it made: of the manifest's counts those that a person looks at first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from latent_thoughts.terminal import Grid, bound_name, figure, percent, since

Counts = Mapping[str, object]

WHOLE, SHARE, SECONDS = "", "%", "s"  # units; any other stands behind its figure
NATS = "nats a token"
SHOWN = {  # of a stage: (count, its name, unit). K is the largest that there is
    "train": [
        ("step", "steps", WHOLE),
        ("epoch", "epochs", "of the documents"),
        ("tokens", "tokens", WHOLE),
        ("raw_tokens", "of them text", WHOLE),
        ("thought_tokens", "of them thoughts", WHOLE),
        ("fill", "rows filled", SHARE),
        ("exported_step", "exported step", WHOLE),
        ("seconds", "time", SECONDS),
    ],
    "sample": [
        ("documents", "documents", WHOLE),
        ("left_out_share", "documents left out", SHARE),
        ("chunks", "chunks", WHOLE),
        ("draws", "thoughts drawn", WHOLE),
        ("thought_tokens", "length of a thought", "tokens"),
        ("unfinished_share", "thoughts without an end", SHARE),
        ("mean_distinct", "different thoughts", "a chunk"),
        ("mean_ess", "effective sample size", "thoughts a chunk"),
        ("accepted_share", "chunks with an accepted thought", SHARE),
        ("gain_per_token", "gain of accepted thoughts", NATS),
        ("thought_correct_chosen", "accepted thoughts that are the data's own", SHARE),
        ("seconds", "time", SECONDS),
    ],
    "evaluate": [
        ("documents", "documents", WHOLE),
        ("chunks", "chunks", WHOLE),
        ("accuracy", "right answers", SHARE),
        ("accuracy_known", "where the facts are known", SHARE),
        ("accuracy_unknown", "where one is unknown", SHARE),
        ("nll_per_token", "loss without a thought", NATS),
        ("nll_bits_per_byte", "the same for any tokenizer", "bits a byte"),
        ("bound_K_per_token", "bound L_K", NATS),
        ("bound_K_unfinished", "chunks about which no thought ended", SHARE),
        ("gain_K_per_token", "gain of thinking", NATS),
        ("gain_K_positive", "chunks that thinking helps", SHARE),
        ("seconds", "time", SECONDS),
    ],
}


def table(folder: Path, counts: Counts) -> Grid:
    """A stage's counts in words; all of them where nothing is chosen."""
    chosen = SHOWN.get(folder.name)
    rows = [*_chosen(chosen, counts)] if chosen else [*_all(counts)]
    notes = [f"More figures: {folder / 'manifest.json'}"] if chosen else []
    return Grid(("", ""), rows, words=("",), title=str(folder), notes=notes)


def _chosen(chosen: list[tuple[str, str, str]], counts: Counts) -> Iterator[tuple[str, str]]:
    bounds = [int(name.split("_")[1]) for name in counts if re.fullmatch(r"bound_\d+_per_token", name)]
    most = str(max(bounds, default=0))
    for name, label, unit in chosen:
        known = name.replace("_K_", f"_{most}_")
        value, error = counts.get(known), counts.get(f"{known}_se")
        if isinstance(value, int | float):
            shown = _said(value, error if isinstance(error, float) else None, unit)
            yield label.replace("L_K", bound_name(most)), shown


def _said(value: float, error: float | None, unit: str) -> str:
    if unit == WHOLE:
        return f"{value:,.0f}"
    if unit == SECONDS:
        return since(value)
    if unit == SHARE:
        return percent(value, error)
    behind = "" if error is None else f" ± {error:.2g}"
    return f"{figure(value)}{behind} {unit}"


def _all(counts: Counts) -> Iterator[tuple[str, str]]:
    for name, value in counts.items():
        if not isinstance(value, list | dict):  # those are tables, for the manifest alone
            yield name.replace("_", " "), figure(value) if isinstance(value, int | float) else str(value)
