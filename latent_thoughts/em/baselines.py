"""What EM is compared with. Each takes the run and its EM, which is through, and yields rows of results.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from latent_thoughts.config import Train
from latent_thoughts.data.corpus import Source
from latent_thoughts.em.loop import Loop, Row, row, with_preset
from latent_thoughts.em.run import TRAINING, Run
from latent_thoughts.stages import synthesize as synthesizing
from latent_thoughts.store import read_manifest


def _trained_tokens(run: Run, loop: Loop, unit: str) -> int:
    """Tokens, raw tokens or steps of the whole EM run, warm start included."""
    folders = [loop.iteration(n) / "train" for n in range(run.recipe.em.iterations + 1)]
    return sum(read_manifest(folder).counts[unit] for folder in folders)


def _text_alone(run: Run, method: str, sources: list[Source], config: Train) -> Iterator[Row]:
    """A model of text without thoughts."""
    folder = run.baseline(method)
    yield row(run, method, 0, 0, run.train(config, sources, folder), run.evaluate(folder, thinks=False))


def _raw(run: Run, loop: Loop) -> Iterator[Row]:
    return _text_alone(run, "raw", run.raw(*TRAINING), run.recipe.raw_train)


def _like_em(run: Run, loop: Loop, method: str, unit: str) -> Iterator[Row]:
    """Raw text, for as many `unit` as the whole EM run."""
    config = run.recipe.raw_train.with_budget(unit, _trained_tokens(run, loop, unit))
    return _text_alone(run, method, run.raw(*TRAINING), config)


def _like_warm_start(run: Run, method: str, sources: list[Source]) -> Iterator[Row]:
    """For as many tokens as the warm start."""
    tokens = read_manifest(run.warm_start / "train").counts["tokens"]
    return _text_alone(run, method, sources, run.recipe.raw_train.with_budget("tokens", tokens))


def _repeated(run: Run, loop: Loop, method: str, splits: tuple[str, ...]) -> Iterator[Row]:
    return _like_warm_start(run, method, run.raw(*splits))


def _paraphrased(run: Run, loop: Loop, method: str) -> Iterator[Row]:
    """A teacher's paraphrases of the warm start's documents."""
    run.synthesize(method)
    return _like_warm_start(run, method, [Source(run.synthesized(method), "warm_start")])


def _warm_start_matched(run: Run, loop: Loop) -> Iterator[Row]:
    folder = run.baseline("warm_start_matched")
    trained = run.train_warm_start(folder, _trained_tokens(run, loop, "step"))
    yield row(run, "warm_start_matched", 0, 0, trained, run.evaluate(folder))


def _em_paper(run: Run, loop: Loop) -> Iterator[Row]:
    yield from Loop(run, "em_paper", with_preset(run, "paper"), run.baseline("em_paper")).rows()


def _oracle(run: Run, loop: Loop) -> Iterator[Row]:
    """The upper bound: the data's own thoughts for every document."""
    folder, splits = run.baseline("oracle"), ("warm_start", "corpus")
    synthesizing.synthesize_given(run.recipe, "oracle", run.prepared, run.base, splits, folder / "synthesize")
    sources = [Source(folder / "synthesize", split) for split in splits]
    trained = run.train(run.recipe.train, sources, folder)
    yield row(run, "oracle", 0, 0, trained, run.evaluate(folder))


BASELINES: dict[str, Callable[[Run, Loop], Iterator[Row]]] = {
    "raw": _raw,
    "raw_tokens": partial(_like_em, method="raw_tokens", unit="raw_tokens"),
    "raw_flops": partial(_like_em, method="raw_flops", unit="tokens"),
    "raw_repeat": partial(_repeated, method="raw_repeat", splits=("warm_start",)),
    "raw_fresh": partial(_repeated, method="raw_fresh", splits=TRAINING),
    "warm_start_matched": _warm_start_matched,
    "wrap_baseline": partial(_paraphrased, method="wrap_baseline"),
    "wrap_cot": partial(_paraphrased, method="wrap_cot"),
    "em_paper": _em_paper,
    "oracle": _oracle,
}
