"""The claims that an experiment set out to test, as its verdict.json tells them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from latent_thoughts.stages.report.methods import of
from latent_thoughts.store import read_json
from latent_thoughts.terminal import bound_name
from latent_thoughts.types import UserError

# Of claims' names, which are made of small letters.
SPELT = {"em": "EM", "e step": "E-step", "m step": "M-step", "papers": "paper’s", "k": "K"}


@dataclass(frozen=True, slots=True)
class Claim:
    """`difference` with its 95 % interval, over `seeds` seeds: of model `first` - `second` in `metric`, which is named
    as in results.json."""

    name: str
    first: str
    second: str
    metric: str
    holds: bool
    difference: float
    low: float
    high: float
    seeds: int

    @property
    def unit(self) -> str:
        return "points" if self.metric == "accuracy" else "nats per token"

    @property
    def of(self) -> str:
        """The metric for a reader."""
        bound = self.metric.removeprefix("bound_per_token.")
        return self.metric.capitalize() if bound == self.metric else bound_name(bound)

    def shown(self, value: float) -> str:
        """+41.2 points, of a share; +0.412 nats."""
        return (f"{100 * value:+.1f}" if self.metric == "accuracy" else f"{value:+.3f}").replace("-", "−")


def read(folder: Path) -> list[Claim]:
    """None where the folder has no verdict. Raises UserError where it is not one."""
    path = folder / "verdict.json"
    if not path.exists():
        return []
    found = read_json(path)
    try:
        return [_claim(name, claim) for name, claim in found["claims"].items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is no verdict ({error}): it holds claims, each with holds, difference, ci95, n_seeds, metric, "
            "first and second"
        ) from None


def _claim(name: str, claim: dict[str, Any]) -> Claim:
    low, high = map(float, claim["ci95"])
    figures = float(claim["difference"]), low, high
    if not all(map(math.isfinite, figures)):
        raise ValueError(f"{name} has a figure that is not finite")
    first, second, metric = (str(claim[key]) for key in ("first", "second", "metric"))
    return Claim(_title(name), _model(first), _model(second), metric, bool(claim["holds"]), *figures, claim["n_seeds"])


def _title(name: str) -> str:
    """em_beats_the_papers_e_step: EM beats the paper’s E-step."""
    title = name.replace("_", " ")
    for plain, shown in SPELT.items():
        title = re.sub(rf"\b{plain}\b", shown, title)
    return title[:1].upper() + title[1:]


def _model(name: str) -> str:
    """A model as results.json names it (METHOD, variant NAME or cell NAME, and what is behind it), for a reader."""
    kind, _, rest = name.partition(" ")
    return rest.replace("_", " ") if kind in ("variant", "cell") else f"{of(kind).short} {rest}".rstrip()


def cards(claims: list[Claim]) -> str:
    """HTML: every claim with its verdict, and its interval on an axis that all in the same unit share."""
    if not claims:
        return ""
    return f'<ul class="claims">{"".join(_card(claim, *_ends(claims, claim.unit)) for claim in claims)}</ul>'


def _ends(claims: list[Claim], unit: str) -> tuple[float, float]:
    """Of the axis of the claims in a unit, with room beyond zero and every interval."""
    ends = [0.0, *(end for claim in claims if claim.unit == unit for end in (claim.low, claim.high))]
    pad = 0.06 * (max(ends) - min(ends) or 1.0)
    return min(ends) - pad, max(ends) + pad


def _card(claim: Claim, low: float, high: float) -> str:
    kind, word = ("holds", "holds") if claim.holds else ("fails", "not shown")
    interval = f"95 % interval {claim.shown(claim.low)} to {claim.shown(claim.high)}"
    seeds = "1 seed" if claim.seeds == 1 else f"{claim.seeds} seeds"
    models = f"{claim.of}: {claim.first} − {claim.second}"
    return (
        f'<li class="claim {kind}"><p class="said"><b>{escape(claim.name)}</b><span class="verdict">{word}</span></p>'
        f'<p class="gap">{claim.shown(claim.difference)} <small>{claim.unit}</small></p>{_axis(claim, low, high)}'
        f'<p class="over">{escape(models)}</p><p class="over">{interval} · {seeds}</p></li>'
    )


def _axis(claim: Claim, low: float, high: float) -> str:
    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    return (
        '<svg class="interval" width="100%" height="14" aria-hidden="true">'
        f'<line class="zero" x1="{at(0)}" x2="{at(0)}" y1="0" y2="14"/>'
        f'<line class="range" x1="{at(claim.low)}" x2="{at(claim.high)}" y1="7" y2="7"/>'
        f'<circle cx="{at(claim.difference)}" cy="7" r="4.5"/></svg>'
    )
