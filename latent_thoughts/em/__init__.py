"""EM: chains the stages in one run folder. Running it again resumes.

RUN/recipe.yaml
RUN/base  RUN/prepare                          initial checkpoint, documents
RUN/replies.sqlite                             every reply of a teacher
RUN/iter_00/{synthesize,train,evaluate}        warm start
RUN/iter_01/{sample,train,evaluate} ...        EM
RUN/baselines/METHOD/{train,evaluate}          and iter_.. for em_paper, synthesize for paraphrases
RUN/samples/METHOD_K/iter_..                   further E-steps, where the recipe asks for them
RUN/variants/NAME/iter_..                      EM with other settings, likewise
RUN/results.json  RUN/report.html
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from latent_thoughts.config import Recipe
from latent_thoughts.em.baselines import BASELINES
from latent_thoughts.em.check import check
from latent_thoughts.em.loop import Loop, NoThoughts, Row, row, with_preset
from latent_thoughts.em.run import PARAPHRASES, Run
from latent_thoughts.places import relative
from latent_thoughts.provenance import own_recipe, provenance, save_recipe, settle_recipes
from latent_thoughts.stages.synthesize.asking import Approve
from latent_thoughts.store import write_json
from latent_thoughts.types import UserError

__all__ = ["Loop", "Row", "Run", "em", "row"]

METHODS = (
    *("raw", "raw_tokens", "raw_flops", "raw_repeat", "raw_fresh", "wrap_baseline", "wrap_cot"),
    *("warm_start", "warm_start_matched", "em_paper", "em", "oracle"),
)


def em(recipe: Recipe, folder: Path, approve: Approve | None = None) -> list[Row]:
    """The whole run: warm start, iterations, baselines, results.json. Resumes where it was stopped.

    Of the EM runs beside its own, one whose E-step comes to nothing is left out, and `ended` says so in results.json.
    """
    if recipe.synthesize.method in PARAPHRASES:
        raise UserError(
            f"EM starts from thoughts: set synthesize.method to oracle or latent_thoughts, and put "
            f"{recipe.synthesize.method} among em.baselines"
        )
    save_recipe(recipe, folder)
    run = Run(recipe, folder, approve)
    run.prepare()
    own_recipe(folder, run.prepared).unlink(missing_ok=True)  # of a single command's, which the documents were of
    check(run)
    run.synthesize()
    rows = [row(run, "warm_start", 0, 0, run.train_warm_start(), run.evaluate(run.warm_start))]
    loop = Loop(run, "em", recipe.sample, folder)
    rows += loop.rows()
    ended: list[str] = []
    baselines = (BASELINES[name](run, loop) for name in recipe.em.baselines)
    for further in itertools.chain(baselines, _more_samples(run), _variants(run)):
        try:
            rows += list(further)  # all or none: a row of its last iteration would be taken for its end
        except NoThoughts as error:
            print(f"latent-thoughts: {error}; the run goes on without it", file=sys.stderr)
            ended.append(str(error))
    rows.sort(key=lambda r: (METHODS.index(r["method"]), r.get("variant", ""), r["samples"], r["iteration"]))
    told = {**provenance(recipe), "seeds": [recipe.seed], **({"ended": ended} if ended else {})}
    write_json(folder / "results.json", {"run": told, "rows": rows})
    settle_recipes(folder, lambda made: _went_through(recipe, relative(made, folder)))
    return rows


def _went_through(recipe: Recipe, made: str) -> bool:
    """Whether the whole run makes a stage; others may lie there, of single commands or other settings."""
    kind, _, within = made.partition("/")
    if kind.startswith("iter_"):
        return int(kind[5:]) <= recipe.em.iterations
    samples = {f"{method}_{k}" for method in ("em", "em_paper") for k in recipe.em.samples}
    there = {"baselines": {"raw", *recipe.em.baselines}, "samples": samples, "variants": recipe.em.variants}
    return kind not in there or within.partition("/")[0] in there[kind]


def _more_samples(run: Run) -> Iterator[Iterator[Row]]:
    """EM with every K of `em.samples` and nothing else changed, by the recipe's E-step and by the paper's, a run each;
    what the run has done already is not done again."""
    own, papers = run.recipe.sample, with_preset(run, "paper")
    done = [own, *([papers] if "em_paper" in run.recipe.em.baselines else [])]
    for k in run.recipe.em.samples:
        for method, config in (("em", own), ("em_paper", papers)):
            config = config.model_copy(update={"k": k, "last_k": None})
            if config not in done:
                done.append(config)
                yield Loop(run, method, config, run.folder / "samples" / f"{method}_{k}").rows()


def _variants(run: Run) -> Iterator[Iterator[Row]]:
    """EM with other settings, from the same warm start, a run each; their rows have the `variant`."""
    for name in run.recipe.em.variants:
        recipe, folder = run.recipe.variant(name), run.folder / "variants" / name
        # a raw model of its own (sample.raw_model: raw), where it trains otherwise, must not take the run's place
        home = None if recipe.raw_train == run.recipe.raw_train else folder
        loop = Loop(replace(run, recipe=recipe, home=home), "em", recipe.sample, folder)
        yield _marked(loop.rows(), name)


def _marked(rows: Iterator[Row], variant: str) -> Iterator[Row]:
    return ({**found, "variant": variant} for found in rows)
