"""Packed rows: nothing lost, nothing repeated, documents kept apart, resumable at every batch."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_thoughts.config import Train
from latent_thoughts.data import format
from latent_thoughts.data.format import Form, Part, lay_out
from latent_thoughts.data.packing import Batches, positions
from latent_thoughts.data.tokenizer import Controls
from latent_thoughts.types import Chunk, PackedRow, ThoughtDocument

CONTROLS = Controls(start=3, end=4, prior=5, posterior=6, bos=1, eos=2)
FIRST = 10  # of the text tokens; every document has tokens of its own


def document(index: int, text: int, thought: int | None) -> ThoughtDocument:
    ids = tuple(FIRST + index for _ in range(text))
    thoughts = () if thought is None else ((FIRST + index,) * thought,)
    return ThoughtDocument(str(index), (Chunk(str(index), 0, 0, "", ids),), (thoughts,), (True,), "test")


def documents(sizes: list[tuple[int, int | None]]) -> list[ThoughtDocument]:
    return [document(n, text, thought) for n, (text, thought) in enumerate(sizes)]


SIZES = st.lists(st.tuples(st.integers(1, 30), st.none() | st.integers(0, 12)), min_size=1, max_size=25)
CONFIGS = st.builds(
    Train,
    sequence_length=st.integers(4, 40),
    rows=st.integers(1, 4),
    layout=st.sampled_from(["mixed", "prior", "posterior", "raw"]),
    loss_on=st.sampled_from(["all", "targets"]),
)


def visits(batches: Batches, epochs: int) -> list[list[PackedRow]]:
    """Batches until every visit of the first epochs has left the waiting line."""
    found = []
    while batches.epoch < epochs or any(piece.epoch < epochs for piece in batches.waiting):
        found.append(batches.next_batch())
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
    batches = Batches(documents(sizes), CONTROLS, config.model_copy(update={"layout": "prior"}), seed)
    rows = [row for batch in visits(batches, 2) for row in batch]
    expected: Counter[tuple[int, ...]] = Counter()
    for doc in batches.documents:
        ids = lay_out(doc, [Form.PRIOR], CONTROLS).ids
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
        assert 1 <= len(batch) <= config.rows
        for row in batch:
            arrays = (row.ids, row.labels, row.document_ids, row.parts)
            assert all(array.shape == (config.sequence_length,) for array in arrays)
            used = row.document_ids >= 0
            assert not used[int(used.sum()) :].any()  # padding is at the end
            assert (row.parts[~used] == Part.PADDING).all() and (row.parts[used] != Part.PADDING).all()
            assert (row.labels[~used] == format.IGNORE).all()
            assert set(np.diff(row.document_ids[used]).tolist()) <= {0, 1} and row.document_ids[0] == 0
            place = positions(row)
            for _, span in spans([row]):
                text = row.ids[span][row.ids[span] >= FIRST]
                assert len(set(text.tolist())) <= 1
                assert place[span].tolist() == list(range(span.stop - span.start))
            assert place[~used].tolist() == list(range(int((~used).sum())))


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
        whole.next_batch()
    state = json.loads(json.dumps(whole.state()))
    resumed = Batches(documents(sizes), CONTROLS, config, seed)
    resumed.load_state(state)
    for _ in range(6):
        assert flat(resumed.next_batch()) == flat(whole.next_batch())


def test_seeds_give_other_orders_and_forms_are_drawn_afresh_at_every_visit() -> None:
    config = Train(sequence_length=64, rows=1)
    one, other = (Batches(documents([(3, 2)] * 50), CONTROLS, config, seed) for seed in (0, 1))
    assert flat(one.next_batch()) != flat(other.next_batch())
    single = Batches(documents([(3, 2)]), CONTROLS, Train(sequence_length=16, rows=1), 0)
    forms = [5 in single.next_batch()[0].ids for _ in range(400)]
    assert 0.4 < np.mean(forms) < 0.6
    changes = np.diff(np.array(forms, int)) != 0
    assert 0.4 < np.mean(changes) < 0.6


def test_a_document_longer_than_a_row_is_cut_into_parts_that_join_to_it() -> None:
    config = Train(sequence_length=10, rows=2, layout="raw")
    ids = tuple(range(20, 53))
    long = ThoughtDocument("d", (Chunk("d", 0, 0, "", ids),), ((),), (True,), "test")
    batches = Batches([long], CONTROLS, config, 0)
    pieces = [row.ids[span] for row, span in spans(batches.next_batch() + batches.next_batch())]
    assert np.concatenate(pieces[:4]).tolist() == [1, *ids, 2]


def test_rows_are_well_filled_with_documents_as_long_as_word_problems() -> None:
    """Question, thought and answer of GSM8K have about 60, 100 and 8 tokens, with a long tail."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(170), 0.4, 1500)).astype(int).clip(40, 500)
    batches = Batches(
        documents([(int(n) // 2, int(n) // 2) for n in lengths]), CONTROLS, Train(sequence_length=2048, rows=8), 0
    )
    rows = [row for batch in visits(batches, 1) for row in batch]
    assert np.mean([(row.document_ids >= 0).mean() for row in rows]) > 0.97


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_packed_document_has_the_losses_it_has_alone(kind: str) -> None:
    """With the call that training makes: positions that restart and no attention mask."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, dict[str, Any]] = {
        "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=60, bos_token_id=1, eos_token_id=2, **sizes[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)  # attention that looks far, so that a leak would show

    @torch.no_grad()
    def losses(ids: np.ndarray, place: np.ndarray) -> torch.Tensor:
        """Loss at every token but the first of a row, shape (rows, T - 1)."""
        tokens = torch.from_numpy(ids)
        logits = model(input_ids=tokens, position_ids=torch.from_numpy(place), use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")

    sizes_of = [(5, 3), (9, 4), (1, None), (4, 0), (12, 2), (3, 3), (7, None), (2, 1)]
    rng = np.random.default_rng(0)
    docs = []
    for n, (text, thought) in enumerate(sizes_of):
        x = tuple(rng.integers(FIRST, 60, text).tolist())
        z = () if thought is None else (tuple(rng.integers(FIRST, 60, thought).tolist()),)
        docs.append(ThoughtDocument(str(n), (Chunk(str(n), 0, 0, "", x),), (z,), (True,), "test"))
    batch = Batches(docs, CONTROLS, Train(sequence_length=48, rows=2), 0).next_batch()
    together = losses(np.stack([row.ids for row in batch]), np.stack([positions(row) for row in batch]))
    compared = 0
    for packed, row in zip(together, batch, strict=True):
        assert row.document_ids.max() > 0
        for _, span in spans([row]):
            ids = row.ids[span][None]
            alone = losses(ids, np.arange(ids.shape[1])[None])[0]
            assert torch.allclose(packed[span.start : span.stop - 1], alone, atol=1e-5)
            compared += len(alone)
    assert compared > 40
