"""Packed rows: nothing lost, nothing repeated, documents kept apart, resumable at every batch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_thoughts.config import Train
from latent_thoughts.data import format
from latent_thoughts.data.corpus import Corpus
from latent_thoughts.data.format import Form, Part, lay_out
from latent_thoughts.data.packing import Batches, by_length, positions
from latent_thoughts.data.tokenizer import Controls
from latent_thoughts.stages.train.loop import learning_rate
from latent_thoughts.types import Chunk, PackedRow, ThoughtDocument

CONTROLS = Controls(start=3, end=4, prior=5, posterior=6, bos=1, eos=2)
FIRST = 10  # of the text tokens; every document has tokens of its own


def document(index: int, text: int, thought: int | None) -> ThoughtDocument:
    ids = tuple(FIRST + index for _ in range(text))
    thoughts = () if thought is None else ((FIRST + index,) * thought,)
    return ThoughtDocument(str(index), (Chunk(str(index), 0, 0, "", ids),), (thoughts,), (True,), "test")


def documents(sizes: list[tuple[int, int | None]], weight: float = 1.0) -> Corpus:
    return Corpus.of((document(n, text, thought) for n, (text, thought) in enumerate(sizes)), weight)


SIZES = st.lists(st.tuples(st.integers(1, 30), st.none() | st.integers(0, 12)), min_size=1, max_size=25)
CONFIGS = st.builds(
    Train,
    sequence_length=st.integers(4, 40),
    rows=st.integers(1, 4),
    layout=st.sampled_from(["mixed", "prior", "posterior", "raw", "thoughts"]),
    raw_share=st.sampled_from([0.0, 0.3]),
    raw_chunks=st.sampled_from([0.0, 0.3]),
    loss_on=st.sampled_from(["all", "targets"]),
)


def next_batch(batches: Batches) -> list[PackedRow]:
    """Every row laid out on its own."""
    return [batches.lay_out([row]) for row in batches.plan()]


def visits(batches: Batches, epochs: int) -> list[list[PackedRow]]:
    """Batches until every visit of the first epochs has left the waiting line."""
    found = []
    while batches.epoch < epochs or any(piece.visit < epochs for piece in batches.waiting + batches.held):
        found.append(next_batch(batches))
    return found


def spans(rows: list[PackedRow]) -> list[tuple[PackedRow, slice]]:
    """Every document of every row."""
    found = []
    for row in rows:
        for number in range(row.document_ids.max() + 1):
            places = np.flatnonzero(row.document_ids == number)
            found.append((row, slice(int(places[0]), int(places[-1]) + 1)))
    return found


@settings(max_examples=100, deadline=None)
@given(SIZES, CONFIGS, st.integers(0, 5))
def test_every_document_is_visited_once_an_epoch_and_no_token_is_lost(
    sizes: list[tuple[int, int | None]], config: Train, seed: int
) -> None:
    config = config.model_copy(update={"layout": "prior", "raw_share": 0.0, "raw_chunks": 0.0})
    batches = Batches(documents(sizes), CONTROLS, config, seed)
    rows = [row for batch in visits(batches, 2) for row in batch]
    expected: Counter[tuple[int, ...]] = Counter()
    for n in range(len(sizes)):
        ids = lay_out(batches.documents[n], [Form.PRIOR], CONTROLS).ids
        parts = [tuple(ids[n : n + config.sequence_length]) for n in range(0, len(ids), config.sequence_length)]
        expected.update(parts)
    found = Counter(tuple(row.ids[span].tolist()) for row, span in spans(rows))
    # Two epochs are complete; of later ones some visits are there already.
    later = {piece: count - 2 * expected[piece] for piece, count in found.items()}
    assert found.keys() <= expected.keys()
    assert min(later.values()) >= 0
    epochs = batches.epoch + 1
    assert all(count <= (epochs - 2) * expected[piece] for piece, count in later.items())


@settings(max_examples=100, deadline=None)
@given(SIZES, CONFIGS, st.integers(0, 5))
def test_rows_are_never_overfull_and_documents_are_kept_apart(
    sizes: list[tuple[int, int | None]], config: Train, seed: int
) -> None:
    for batch in visits(Batches(documents(sizes), CONTROLS, config, seed), 1):
        assert len(batch) == config.rows
        for row in batch:
            arrays = (row.ids, row.labels, row.document_ids, row.parts)
            assert len({array.shape for array in arrays}) == 1
            assert 1 <= len(row.ids) <= config.sequence_length
            assert set(np.diff(row.document_ids).tolist()) <= {0, 1} and row.document_ids[0] == 0
            place = positions(row)
            for _, span in spans([row]):
                text = row.ids[span][row.ids[span] >= FIRST]
                assert len(set(text.tolist())) <= 1
                assert place[span].tolist() == list(range(span.stop - span.start))


@settings(max_examples=50, deadline=None)
@given(SIZES, CONFIGS, st.integers(0, 5))
def test_rows_laid_out_together_are_the_rows_one_behind_the_other(
    sizes: list[tuple[int, int | None]], config: Train, seed: int
) -> None:
    batches = Batches(documents(sizes), CONTROLS, config, seed)
    rows = batches.plan()
    apart, together = [batches.lay_out([row]) for row in rows], batches.lay_out(rows)
    for name in ("ids", "labels", "parts"):
        assert getattr(together, name).tolist() == np.concatenate([getattr(row, name) for row in apart]).tolist()
    assert positions(together).tolist() == np.concatenate([positions(row) for row in apart]).tolist()


@settings(max_examples=50, deadline=None)
@given(SIZES, CONFIGS, st.integers(0, 5))
def test_by_length_the_documents_are_the_same_and_each_at_least_as_long_as_the_last(
    sizes: list[tuple[int, int | None]], config: Train, seed: int
) -> None:
    batches = Batches(documents(sizes), CONTROLS, config, seed)
    row = batches.lay_out(batches.plan())
    arranged = by_length(row)
    before, after = (
        [tuple(getattr(r, name)[span].tobytes() for name in ("ids", "labels", "parts")) for r, span in spans([r])]
        for r in (row, arranged)
    )
    assert sorted(before) == sorted(after)
    assert (np.diff(np.bincount(arranged.document_ids)) >= 0).all() and (np.diff(arranged.document_ids) >= 0).all()


@settings(max_examples=100, deadline=None)
@given(SIZES, CONFIGS, st.integers(0, 5))
def test_labels_are_the_tokens_themselves_and_absent_at_every_border(
    sizes: list[tuple[int, int | None]], config: Train, seed: int
) -> None:
    for row, span in spans(
        [row for batch in visits(Batches(documents(sizes), CONTROLS, config, seed), 1) for row in batch]
    ):
        ids, labels, parts = row.ids[span], row.labels[span], row.parts[span]
        assert labels[0] == format.IGNORE
        carries = labels[1:] != format.IGNORE
        assert (labels[1:][carries] == ids[1:][carries]).all()
        targets = np.isin(parts[1:], (Part.THOUGHT, Part.TARGET, Part.EOS))
        assert (carries == (targets if config.loss_on == "targets" else True)).all()


def flat(batch: list[PackedRow]) -> list[list[Any]]:
    return [[a.tolist() for a in (row.ids, row.labels, row.document_ids, row.parts)] for row in batch]


@settings(max_examples=50, deadline=None)
@given(SIZES, CONFIGS, st.integers(0, 5), st.integers(0, 12))
def test_interrupted_equals_uninterrupted(
    sizes: list[tuple[int, int | None]], config: Train, seed: int, stop: int
) -> None:
    whole = Batches(documents(sizes), CONTROLS, config, seed)
    for _ in range(stop):
        whole.plan()
    state = json.loads(json.dumps(whole.state()))
    resumed = Batches(documents(sizes), CONTROLS, config, seed)
    resumed.load_state(state)
    for _ in range(6):
        assert flat(next_batch(resumed)) == flat(next_batch(whole))


@settings(max_examples=50, deadline=None)
@given(SIZES, CONFIGS, st.sampled_from([1.0, 1.3, 2.5]), st.integers(0, 5))
def test_what_is_passed_of_the_epochs_never_falls_and_is_what_has_left_the_line(
    sizes: list[tuple[int, int | None]], config: Train, weight: float, seed: int
) -> None:
    """However many parts a document is cut into, and however many visits an epoch has."""
    batches = Batches(documents([*sizes, (200, None)], weight), CONTROLS, config, seed)
    assert batches.passed == 0
    gone, before = 0.0, 0.0
    for _ in range(40):
        gone += sum(piece.share for row in batches.plan() for piece in row)
        assert batches.passed >= before - 1e-12
        assert batches.passed == pytest.approx(gone)
        before = batches.passed


@pytest.mark.parametrize(("count", "size"), [(3, 12_800), (20, 2_560), (8, 100), (300, 100), (1000, 40)])
def test_an_epoch_trains_every_token_about_once_and_the_cosine_only_falls(count: int, size: int) -> None:
    config = Train(sequence_length=64, rows=4, layout="raw", epochs=1)
    batches = Batches(documents([(size, None)] * count), CONTROLS, config, 0)
    tokens, rates = 0, []
    while batches.passed < 1:
        rates.append(learning_rate(config, len(rates), batches.passed))
        tokens += sum(piece.size for row in batches.plan() for piece in row)
    # the last part of a document is shorter than the others and counts as much
    short = batches.lookahead * config.sequence_length
    assert tokens == pytest.approx(count * (size + 2), abs=config.rows * config.sequence_length + short)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_epochs_end_with_the_batch_that_holds_their_last_document(rows: int) -> None:
    """One document fills a row. What is added up in floats comes to 2.9999999999999996 epochs of 20."""
    for count in range(1, 60):
        batches = Batches(documents([(6, None)] * count), CONTROLS, Train(sequence_length=8, rows=rows), 0)
        steps = 0
        while batches.passed < 3:
            batches.plan()
            steps += 1
        assert steps == -(-3 * count // rows), count


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from() -> None:
    """There pieces were not told what share of an epoch they are."""
    config = Train(sequence_length=10, rows=2, layout="raw")
    whole = Batches(documents([(200, None), (7, None), (33, None)]), CONTROLS, config, 0)
    whole.plan()
    state = whole.state()
    resumed = Batches(whole.documents, CONTROLS, config, 0)
    resumed.load_state({**state, "waiting": [piece[:4] for piece in state["waiting"]]})
    assert resumed.passed == pytest.approx(whole.passed) and resumed.plan() == whole.plan()


def test_seeds_give_other_orders_and_forms_are_drawn_afresh_at_every_visit() -> None:
    config = Train(sequence_length=64, rows=1)
    one, other = (Batches(documents([(3, 2)] * 50), CONTROLS, config, seed) for seed in (0, 1))
    assert flat(next_batch(one)) != flat(next_batch(other))
    single = Batches(documents([(3, 2)]), CONTROLS, Train(sequence_length=16, rows=1), 0)
    forms = [5 in next_batch(single)[0].ids for _ in range(400)]
    assert 0.4 < np.mean(forms) < 0.6
    changes = np.diff(np.array(forms, int)) != 0
    assert 0.4 < np.mean(changes) < 0.6


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 3.0]), min_size=1, max_size=3), st.integers(0, 5))
def test_documents_are_visited_by_the_weight_of_their_source(weights: list[float], seed: int) -> None:
    """Up to epoch e a document of weight w has been visited e w times, up to less than one, each visit once."""
    weights.append(1.0)
    shards = [
        batch for w in weights for batch in [Corpus.of([document(n, 3, 1) for n in range(40)], w).shards[0].batch]
    ]
    batches = Batches(Corpus(shards), CONTROLS, Train(sequence_length=16, rows=1), seed)
    seen: Counter[int] = Counter()
    numbers: set[tuple[int, int]] = set()
    for epoch in range(4):
        batches.epoch = epoch
        for visit, index in batches._order().tolist():
            seen[index] += 1
            numbers.add((visit, index))
        for index in range(40 * len(weights)):
            assert abs(seen[index] - (epoch + 1) * weights[index // 40]) < 1
    assert len(numbers) == sum(seen.values())
    for n, w in enumerate(weights):
        assert abs(sum(seen[index] for index in range(40 * n, 40 * n + 40)) - 160 * w) < 20


def test_a_document_longer_than_a_row_is_cut_into_parts_that_join_to_it() -> None:
    config = Train(sequence_length=10, rows=2, layout="raw")
    ids = tuple(range(20, 53))
    long = ThoughtDocument("d", (Chunk("d", 0, 0, "", ids),), ((),), (True,), "test")
    batches = Batches(Corpus.of([long]), CONTROLS, config, 0)
    first = sorted(p for _ in range(9) for row in batches.plan() for p in row if p.visit == 0)
    assert [piece.part for piece in first] == [0, 1, 2, 3]
    assert np.concatenate([batches.lay_out([[piece]]).ids for piece in first]).tolist() == [1, *ids, 2]


def test_documents_that_fit_a_row_take_the_rows_that_they_took_before_longer_ones_were_held() -> None:
    """As version 0.1.0 planned them first, so that its trainings come out the same."""
    sizes = [(3 + 7 * n % 23, n % 5 or None) for n in range(60)]
    batches = Batches(documents(sizes), CONTROLS, Train(sequence_length=64, rows=3), 0)
    rows = [[tuple(piece)[:4] for piece in row] for _ in range(30) for row in batches.plan()]
    assert hashlib.sha256(str(rows).encode()).hexdigest()[:16] == "04bcb790fe634b26"


def test_the_parts_of_one_document_are_not_most_of_a_batch() -> None:
    """Lengths as of web pages: 3 tokens of 5 are in documents longer than a row."""
    rng = np.random.default_rng(0)
    lengths = [(int(min(6000, n)) + 1, None) for n in rng.lognormal(np.log(70), 1.2, 1500)]
    batches = Batches(documents(lengths), CONTROLS, Train(sequence_length=200, rows=8), 0)
    shares, fill = [], []
    while batches.passed < 1:
        of_document: Counter[int] = Counter()
        for row in batches.plan():
            for piece in row:
                of_document[piece.document] += piece.size
        shares.append(max(of_document.values()) / of_document.total())
        fill.append(of_document.total() / 1600)
    assert np.mean(np.array(shares) > 0.5) < 0.01 and np.mean(fill) > 0.97


@settings(max_examples=100, deadline=None)
@given(SIZES, CONFIGS, st.sampled_from([1.0, 1.3, 2.5]), st.integers(0, 5), st.integers(1, 3), st.integers(0, 9))
def test_an_end_after_so_many_epochs_leaves_nothing_and_takes_nothing_of_the_next(
    sizes: list[tuple[int, int | None]], config: Train, weight: float, seed: int, epochs: int, stop: int
) -> None:
    """Each piece of each visit once; also with a stop in between."""
    corpus = documents([*sizes, (200, None)], weight)
    batches = Batches(corpus, CONTROLS, config, seed, ends=epochs)
    found: Counter[tuple[int, ...]] = Counter()
    number = 0
    while batches.passed < epochs:
        found.update(piece[:3] for row in batches.plan() for piece in row)
        number += 1
        if number == stop:
            state = json.loads(json.dumps(batches.state()))
            batches = Batches(corpus, CONTROLS, config, seed, ends=epochs)
            batches.load_state(state)
    every, wanted = Batches(corpus, CONTROLS, config, seed), set[tuple[int, ...]]()
    for every.epoch in range(batches.epoch + 1):
        for visit in every._order().tolist():
            wanted |= {piece[:3] for piece in every._pieces(*visit)}
    assert found.keys() == wanted and set(found.values()) <= {1}
    assert not any(batches.plan()) and not len(batches.lay_out(batches.plan()).ids)


def test_rows_are_well_filled_with_documents_as_long_as_word_problems() -> None:
    """Question, thought and answer of GSM8K have about 60, 100 and 8 tokens, with a long tail."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(170), 0.4, 1500)).astype(int).clip(40, 500)
    for size in (1024, 2048):
        config = Train(sequence_length=size, rows=8)
        batches = Batches(documents([(int(n) // 2, int(n) // 2) for n in lengths]), CONTROLS, config, 0)
        rows = [row for batch in visits(batches, 1) for row in batch]
        assert np.mean([len(row.ids) / size for row in rows]) > 0.97
