"""The question before a teacher is asked: how much, and for how much."""

from __future__ import annotations

import sys

from latent_thoughts.progress import console
from latent_thoughts.stages.synthesize.asking import Approve, Estimate
from latent_thoughts.terminal import Grid
from latent_thoughts.types import UserError


def approval(yes: bool) -> Approve:
    """Shows an estimate and asks whether to go on; with `yes`, or a model in this process, it only shows it.

    Raises UserError where the answer is no, or nobody is there to answer.
    """

    def approve(estimate: Estimate) -> None:
        console.print(table(estimate))
        if yes or estimate.local:
            return
        if not sys.stdin.isatty():
            raise UserError("nobody is there to agree to what the teacher will cost: give --yes")
        if console.input("Ask? \\[y/N] ").strip().lower() not in ("y", "yes"):
            raise UserError("nothing was asked")

    return approve


def table(estimate: Estimate) -> Grid:
    answered = estimate.units - estimate.open
    replies = f"about {estimate.reply_tokens:,}, at most {estimate.most_reply_tokens:,}"
    rows = [
        ("teacher", estimate.teacher),
        (estimate.what, f"{estimate.units:,}" + (f", {answered:,} of them answered" if answered else "")),
        ("prompt tokens", f"about {estimate.prompt_tokens:,}"),
        ("reply tokens", replies),
    ]
    if estimate.prices.input or estimate.prices.output:
        rows.append(("cost", f"about {estimate.cost:,.2f}, at most {estimate.most:,.2f} without second attempts"))
        rows += [("spent already", f"{estimate.spent:,.2f}")] if estimate.spent else []
        rows.append(("cap", "none" if estimate.cap is None else f"{estimate.cap:,.2f}"))
    elif not estimate.local:
        rows.append(("cost", "unknown: set synthesize.prices.input and output (per million tokens)"))
    return Grid(("", ""), rows, words=("",), title="Before the teacher is asked")
