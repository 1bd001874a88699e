"""The result in plain words. It claims no more than the figures carry: a difference counts as settled
only when zero lies outside its 95 % interval over seeds. A single seed's interval is over its answers, and what is
said of it is said of these answers alone."""

from __future__ import annotations

from dataclasses import dataclass

from latent_thoughts.stages.report.differences import Difference, difference
from latent_thoughts.stages.report.methods import of
from latent_thoughts.stages.report.summary import Line, Mean, Results, percents

# Whom EM is measured against first: longer training on the same given thoughts explains most lookalikes.
RIVALS = ("warm_start_matched", "raw_flops", "raw_tokens", "warm_start")


@dataclass(frozen=True, slots=True)
class Headline:
    title: str
    verdicts: list[str]


def headline(results: Results) -> Headline:
    """Title and verdicts. Without accuracy they speak of the bound, and say so."""
    em = results.final("em") or results.final("em_paper")
    metric = _metric(results, em)
    if metric is None:
        return Headline("No model has been evaluated yet", [])
    if em is None or em.mean(metric) is None:
        shown = [line for m in results.methods if (line := results.final(m)) and line.mean(metric)]
        return Headline(_title(shown, metric), ["No EM iteration has been evaluated yet."])
    there = [line for m in RIVALS if (line := results.final(m)) and line.mean(metric)]
    starts = [line for line in there if line.method.startswith("warm")]
    title = _title([em, *starts[:1], *[line for line in there if line.method.startswith("raw")][:1]], metric)
    others = there + [line for m in ("em_paper", "oracle") if (line := results.final(m)) and line.method != em.method]
    verdicts = [v for line in others if (v := verdict(em, line, metric))]
    return Headline(title, verdicts + cautions(results, em, metric))


def _metric(results: Results, em: Line | None) -> str | None:
    lines = [em] if em else [line for m in results.methods if (line := results.final(m))]
    names = ["accuracy", *[f"bound_per_token.{k}" for k in reversed(results.bounds)], "nll_per_token"]
    return next((n for n in names if any(line.mean(n) for line in lines)), None)


def _title(lines: list[Line], metric: str) -> str:
    """EM answers 96 % of held-out questions right, the warm start trained as long 54 %, raw text 12 %."""
    found = [(of(line.method).title, amount(m, metric)) for line in lines if (m := line.mean(metric))]
    (name, first), *others = found
    what = "Loss on held-out text (lower is better)" if metric == "nll_per_token" else "Held-out likelihood"
    begin = f"{name} answers {first} right" if metric == "accuracy" else f"{what}: {name} {first}"
    title = ", ".join([begin, *[f"{name} {value}" for name, value in others]])
    return title[0].upper() + title[1:]


def amount(found: Mean, metric: str) -> str:
    if metric == "accuracy":
        return f"{percents(found.value)} %"
    return f"{found.value:.3f} nats per token".replace("-", "−")


def verdict(em: Line, rival: Line, metric: str) -> str | None:
    """One sentence on EM and one other model; None where they cannot be compared."""
    found = difference(em, rival, metric)
    if found is None:
        return None
    name, sign = of(rival.method).in_words, -1 if metric == "nll_per_token" else 1
    evidence = _evidence(found, metric)
    where = " on these answers, one seed" if found.seeds == 1 and found.interval else ""
    if found.seeds == 2:
        return f"EM against {name}: {_signed(found.value, metric)} ({evidence}; two are too few for an interval)."
    if not found.settled:
        return f"Not settled between EM and {name}{where}: {_signed(found.value, metric)} ({evidence})."
    place = "ahead of" if sign * found.value > 0 else "behind"
    return f"EM is {place} {name}{where}: {_signed(found.value, metric)} ({evidence})."


def _evidence(found: Difference, metric: str) -> str:
    seeds = f"higher in {found.higher} of {found.seeds} seeds" if found.seeds > 1 else "one seed only"
    if found.interval is None:
        return seeds
    low, high = found.interval
    ends = f"{_signed(low, metric, bare=True)} to {_signed(high, metric)}"
    return f"95 % interval {ends}; {seeds}" if found.seeds > 1 else f"95 % interval over the answers {ends}"


def _signed(value: float, metric: str, bare: bool = False) -> str:
    if metric == "accuracy":
        return f"{100 * value:+.1f}{'' if bare else ' points'}".replace("-", "−")
    return f"{value:+.3f}{'' if bare else ' nats per token'}".replace("-", "−")


def cautions(results: Results, em: Line, metric: str) -> list[str]:
    """What a reader should know before believing the figures."""
    found = []
    if results.single("warm_start_matched") is None:
        found.append(
            "No warm start trained as long was run (em.baselines: warm_start_matched): "
            "part of any gain over the warm start may be longer training."
        )
    if metric != "accuracy":
        found.append("Likelihood only (no evaluate.answer): a bound can rise while answers get worse.")
    best = max(results.main(em.method), key=lambda line: m.value if (m := line.mean(metric)) else -1e9)
    lead = difference(best, em, metric)
    if metric == "accuracy" and lead and lead.value > 0.02:
        found.append(f"Iteration {best.iteration} was better than the last: {_signed(lead.value, metric)}.")
    if len(results.seeds) == 1:
        found.append("One seed says little: warm starts differ much from seed to seed.")
    return found
