"""The claims that an experiment set out to test, as its verdict.json tells them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from latent_thoughts.store import read_json
from latent_thoughts.types import UserError


@dataclass(frozen=True, slots=True)
class Claim:
    """`difference` with its 95 % interval, over `seeds` seeds."""

    name: str
    holds: bool
    difference: float
    low: float
    high: float
    seeds: int


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
            f"{path} is no verdict ({error}): it holds claims, each with holds, difference, ci95 and n_seeds"
        ) from None


def _claim(name: str, claim: dict[str, Any]) -> Claim:
    low, high = map(float, claim["ci95"])
    figures = float(claim["difference"]), low, high
    if not all(map(math.isfinite, figures)):
        raise ValueError(f"{name} has a figure that is not finite")
    return Claim(name.replace("_", " ").capitalize(), bool(claim["holds"]), *figures, claim["n_seeds"])


def cards(claims: list[Claim]) -> str:
    """HTML: every claim with its verdict, and its interval on an axis that all of them share."""
    if not claims:
        return ""
    ends = [0.0, *(end for claim in claims for end in (claim.low, claim.high))]
    low, high = min(ends), max(ends)
    pad = 0.06 * (high - low or 1.0)
    return f'<ul class="claims">{"".join(_card(claim, low - pad, high + pad) for claim in claims)}</ul>'


def _card(claim: Claim, low: float, high: float) -> str:
    kind, word = ("holds", "holds") if claim.holds else ("fails", "not shown")
    interval = f"95 % interval {signed(claim.low)} to {signed(claim.high)}"
    seeds = "1 seed" if claim.seeds == 1 else f"{claim.seeds} seeds"
    return (
        f'<li class="claim {kind}"><p class="said"><b>{escape(claim.name)}</b><span class="verdict">{word}</span></p>'
        f'<p class="gap">{signed(claim.difference)}</p>{_axis(claim, low, high)}'
        f'<p class="over">{interval} · {seeds}</p></li>'
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


def signed(value: float) -> str:
    """+0.412; shares and nats alike are shown as the verdict has them."""
    return f"{value:+.3f}".replace("-", "−")
