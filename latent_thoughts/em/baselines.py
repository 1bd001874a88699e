"""What EM is compared with. Each takes the run and its EM, which is through, and yields rows of results.json."""

from __future__ import annotations

from collections.abc import Iterator

from latent_thoughts.data.corpus import Source
from latent_thoughts.em.loop import Loop, Row, row, with_preset
from latent_thoughts.em.run import TRAINING, Run
from latent_thoughts.stages import synthesize as synthesizing
from latent_thoughts.store import read_manifest


def _trained_tokens(run: Run, loop: Loop, unit: str) -> int:
    """Tokens, raw tokens or steps of the whole EM run, warm start included."""
    folders = [loop.iteration(n) / "train" for n in range(run.recipe.em.iterations + 1)]
    return sum(read_manifest(folder).counts[unit] for folder in folders)


def _text_alone(
    run: Run, method: str, sources: list[Source], unit: str | None = None, amount: int = 0
) -> Iterator[Row]:
    """A model of text without thoughts, trained on `amount` raw tokens, or tokens in all; else as `em.raw` says."""
    config = run.recipe.raw_train
    trained = run.train(config.with_budget(unit, amount) if unit else config, sources, run.baseline(method))
    yield row(run, method, 0, 0, trained, run.evaluate(run.baseline(method), thinks=False))


def _raw(run: Run, loop: Loop) -> Iterator[Row]:
    return _text_alone(run, "raw", run.raw(*TRAINING))


def _raw_tokens(run: Run, loop: Loop) -> Iterator[Row]:
    amount = _trained_tokens(run, loop, "raw_tokens")
    return _text_alone(run, "raw_tokens", run.raw(*TRAINING), "raw_tokens", amount)


def _raw_flops(run: Run, loop: Loop) -> Iterator[Row]:
    return _text_alone(run, "raw_flops", run.raw(*TRAINING), "tokens", _trained_tokens(run, loop, "tokens"))


def _like_warm_start(run: Run, method: str, sources: list[Source]) -> Iterator[Row]:
    """For as many tokens as the warm start."""
    return _text_alone(run, method, sources, "tokens", read_manifest(run.warm_start / "train").counts["tokens"])


def _raw_repeat(run: Run, loop: Loop) -> Iterator[Row]:
    return _like_warm_start(run, "raw_repeat", run.raw("warm_start"))


def _raw_fresh(run: Run, loop: Loop) -> Iterator[Row]:
    return _like_warm_start(run, "raw_fresh", run.raw(*TRAINING))


def _paraphrased(run: Run, method: str) -> Iterator[Row]:
    """A teacher's paraphrases of the warm start's documents."""
    run.synthesize(method)
    return _like_warm_start(run, method, [Source(run.synthesized(method), "warm_start")])


def _wrap_baseline(run: Run, loop: Loop) -> Iterator[Row]:
    return _paraphrased(run, "wrap_baseline")


def _wrap_cot(run: Run, loop: Loop) -> Iterator[Row]:
    return _paraphrased(run, "wrap_cot")


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


BASELINES = {
    "raw": _raw,
    "raw_tokens": _raw_tokens,
    "raw_flops": _raw_flops,
    "raw_repeat": _raw_repeat,
    "raw_fresh": _raw_fresh,
    "warm_start_matched": _warm_start_matched,
    "wrap_baseline": _wrap_baseline,
    "wrap_cot": _wrap_cot,
    "em_paper": _em_paper,
    "oracle": _oracle,
}
