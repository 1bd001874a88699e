"""Every token layout, written out by hand; prompts and training layouts agree token by token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_thoughts.data import format
from latent_thoughts.data.format import Form, Layout, Part, draw_forms, lay_out
from latent_thoughts.data.tokenizer import Controls
from latent_thoughts.types import Chunk, ThoughtDocument, UserError

B, EOS, S, E, P, Q = 1, 2, 91, 92, 93, 94
CONTROLS = Controls(start=S, end=E, prior=P, posterior=Q, bos=B, eos=EOS)
N = format.IGNORE
C, Z, T, X, F = Part.CONTROL, Part.THOUGHT, Part.TARGET, Part.CONTEXT, Part.EOS
Ids = tuple[int, ...]


def document(
    chunks: list[Ids], thoughts: list[Ids | None], target: list[bool] | None = None, name: str = "d"
) -> ThoughtDocument:
    made = tuple(Chunk(name, n, n, "x" * len(ids), ids) for n, ids in enumerate(chunks))
    kept = tuple(() if thought is None else (thought,) for thought in thoughts)
    return ThoughtDocument(name, made, kept, tuple(target or [True] * len(chunks)), "test")


TWO = document([(10, 11), (20,)], [(30,), (40, 41)], [False, True])


def labelled(layout: Layout, loss_on: str) -> np.ndarray:
    return format.labels(np.array(layout.ids), np.array(layout.parts), [0], loss_on)


def laid_out(forms: list[Form], doc: ThoughtDocument = TWO) -> Layout:
    return lay_out(doc, forms, CONTROLS)


def test_prior_layout() -> None:
    layout = laid_out([Form.PRIOR, Form.PRIOR])
    assert layout.ids == [B, S, P, 30, E, 10, 11, S, P, 40, 41, E, 20, EOS]
    assert layout.parts == [C, C, C, Z, Z, X, X, C, C, Z, Z, Z, T, F]


def test_posterior_layout() -> None:
    layout = laid_out([Form.POSTERIOR, Form.POSTERIOR])
    assert layout.ids == [B, S, E, 10, 11, S, Q, 30, E, S, E, 20, S, Q, 40, 41, E, EOS]
    assert layout.parts == [C, C, C, X, X, C, C, Z, Z, C, C, T, C, C, Z, Z, Z, F]


def test_raw_layout() -> None:
    layout = laid_out([Form.RAW, Form.RAW])
    assert layout.ids == [B, 10, 11, 20, EOS]
    assert layout.parts == [C, X, X, T, F]


def test_thoughts_only_layout() -> None:
    layout = laid_out([Form.THOUGHTS, Form.THOUGHTS])
    assert layout.ids == [B, 30, 40, 41, EOS]
    assert layout.parts == [C, Z, Z, Z, F]


def test_forms_mix_within_a_document() -> None:
    assert laid_out([Form.POSTERIOR, Form.PRIOR]).ids == [B, S, E, 10, 11, S, Q, 30, E, S, P, 40, 41, E, 20, EOS]


@pytest.mark.parametrize("form", list(Form))
def test_a_chunk_without_a_thought_is_raw_in_every_form(form: Form) -> None:
    layout = laid_out([form, Form.PRIOR], document([(10,), (20,)], [None, (40,)]))
    assert layout.ids == [B, 10, S, P, 40, E, 20, EOS]
    assert layout.parts == [C, T, C, C, Z, Z, T, F]


def test_every_visit_takes_the_next_of_a_chunks_thoughts() -> None:
    several = replace(document([(10,), (20,)], [(40,), None]), thoughts=(((40,), (), (50,)), ()))
    seen = [lay_out(several, [Form.PRIOR] * 2, CONTROLS, visit).ids for visit in range(4)]
    assert seen == [[B, S, P, *z, E, 10, 20, EOS] for z in ([40], [], [50], [40])]


def test_an_empty_thought_is_a_thought() -> None:
    empty = document([(10,)], [()])
    assert laid_out([Form.PRIOR], empty).ids == [B, S, P, E, 10, EOS]
    assert laid_out([Form.POSTERIOR], empty).ids == [B, S, E, 10, S, Q, E, EOS]


def test_loss_on_all_leaves_out_bos_alone() -> None:
    for forms in ([Form.PRIOR] * 2, [Form.POSTERIOR] * 2, [Form.RAW] * 2):
        layout = laid_out(forms)
        assert labelled(layout, "all").tolist() == [N, *layout.ids[1:]]


def test_loss_on_targets_is_on_thoughts_with_their_end_on_target_text_and_on_eos() -> None:
    prior = labelled(laid_out([Form.PRIOR] * 2), "targets")
    assert prior.tolist() == [N, N, N, 30, E, N, N, N, N, 40, 41, E, 20, EOS]
    posterior = labelled(laid_out([Form.POSTERIOR] * 2), "targets")
    assert posterior.tolist() == [N, N, N, N, N, N, N, 30, E, N, N, 20, N, N, 40, 41, E, EOS]
    raw = labelled(laid_out([Form.RAW] * 2), "targets")
    assert raw.tolist() == [N, N, N, 20, EOS]


def test_prompts() -> None:
    c, x = (B, 10, 11), (20, 21)
    assert format.posterior_prompt(CONTROLS, c, x) == (B, 10, 11, S, E, 20, 21, S, Q)
    assert format.prior_prompt(CONTROLS, c) == (B, 10, 11, S, P)
    assert format.thoughtless_prompt(CONTROLS, c) == (B, 10, 11, S, E)


def test_context_is_the_last_chunks_behind_bos_where_the_document_starts() -> None:
    before = [(10,), (11, 12), (13,)]
    assert format.context(CONTROLS, [], 3) == (B,)
    assert format.context(CONTROLS, before[:1], 3) == (B, 10)
    assert format.context(CONTROLS, before, 3) == (B, 10, 11, 12, 13)
    assert format.context(CONTROLS, before, 2) == (11, 12, 13)
    assert format.context(CONTROLS, before, 1) == (13,)


def test_context_is_truncated_from_the_left_so_that_the_longest_form_fits() -> None:
    c, x, longest = tuple(range(10, 30)), (50, 51, 52), 4
    for limit in range(13, 40):
        fitted = format.fit_context(c, x, longest, limit)
        assert fitted == c[len(c) - len(fitted) :]
        size = len(format.posterior_prompt(CONTROLS, fitted, x)) + longest + 1
        assert size <= limit
        assert len(fitted) == len(c) or size == limit  # no more is cut than must be
        assert len(format.prior_prompt(CONTROLS, fitted)) + longest + 1 + len(x) <= limit
    with pytest.raises(UserError, match=r"chunk of 3 tokens and a thought of 4 do not fit in 12"):
        format.fit_context(c, x, longest, 12)


TOKENS = st.lists(st.integers(10, 80), min_size=1, max_size=5).map(tuple)


@settings(max_examples=100, deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=4), TOKENS)
def test_what_is_scored_is_what_is_trained_on(chunks: list[Ids], thought: Ids) -> None:
    """Context raw, the last chunk with a thought: prompts and continuations are the training sequence."""
    *before, x = chunks
    doc = document(chunks, [*[None] * len(before), thought])
    c = format.context(CONTROLS, before, len(chunks))
    forms = {form: laid_out([form] * len(chunks), doc).ids for form in (Form.PRIOR, Form.POSTERIOR)}
    assert [*format.posterior_prompt(CONTROLS, c, x), *thought, E, EOS] == forms[Form.POSTERIOR]
    assert [*format.prior_prompt(CONTROLS, c), *thought, E, *x, EOS] == forms[Form.PRIOR]
    thoughtless = [*format.thoughtless_prompt(CONTROLS, c), *x]
    assert thoughtless == forms[Form.POSTERIOR][: len(thoughtless)]
    assert [*c, *x, EOS] == laid_out([Form.RAW] * len(chunks), doc).ids


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(TOKENS, st.none() | TOKENS, st.booleans(), st.sampled_from(list(Form))), min_size=1, max_size=5)
)
def test_a_layout_holds_every_token_once(pieces: list[tuple[Ids, Ids | None, bool, Form]]) -> None:
    doc = document([p[0] for p in pieces], [p[1] for p in pieces], [p[2] for p in pieces])
    layout = laid_out([p[3] for p in pieces], doc)
    assert len(layout.ids) == len(layout.parts)
    text = [i for x, z, _, form in pieces for i in x if z is None or form is not Form.THOUGHTS]
    thoughts = [i for _, z, _, form in pieces if z is not None and form is not Form.RAW for i in z]
    found = list(zip(layout.ids, layout.parts, strict=True))
    assert [i for i, part in found if part in (T, X)] == text
    assert [i for i, part in found if part is Z and i != E] == thoughts
    assert {i for i, part in found if part is C} <= {B, S, E, P, Q}
    assert [n for n, (_, part) in enumerate(found) if part is F] == [len(found) - 1]


def test_fixed_layouts_give_every_chunk_their_form() -> None:
    rng = np.random.default_rng(0)
    for name, form in (("prior", Form.PRIOR), ("posterior", Form.POSTERIOR), ("raw", Form.RAW)):
        assert draw_forms(2, name, 0.5, 0.0, 0.0, rng) == [form, form]
    assert draw_forms(2, "thoughts", 0.5, 0.0, 1.0, rng) == [Form.THOUGHTS] * 2
    assert draw_forms(2, "prior", 0.5, 1.0, 0.0, rng) == [Form.RAW] * 2


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_mixed_forms_come_with_their_probability_and_independently(share: float) -> None:
    rng = np.random.default_rng(1)
    drawn = np.array([draw_forms(2, "mixed", share, 0.0, 0.0, rng) for _ in range(4000)]) == Form.POSTERIOR
    assert np.abs(drawn.mean(0) - share).max() < 0.03
    assert abs((drawn[:, 0] & drawn[:, 1]).mean() - share**2) < 0.03


def test_a_share_of_visits_is_raw_as_a_whole() -> None:
    rng = np.random.default_rng(2)
    drawn = np.array([draw_forms(2, "mixed", 0.5, 0.3, 0.0, rng) for _ in range(4000)]) == Form.RAW
    assert abs(drawn[:, 0].mean() - 0.3) < 0.03
    assert (drawn[:, 0] == drawn[:, 1]).all()


@pytest.mark.parametrize("layout", ["mixed", "prior", "posterior"])
def test_a_share_of_chunks_is_raw_each_by_itself(layout: str) -> None:
    rng = np.random.default_rng(3)
    drawn = np.array([draw_forms(2, layout, 0.5, 0.0, 0.3, rng) for _ in range(4000)])
    assert np.abs((drawn == Form.RAW).mean(0) - 0.3).max() < 0.03
    assert abs((drawn == Form.RAW).all(1).mean() - 0.09) < 0.02
    assert abs((drawn == Form.POSTERIOR).mean() - {"mixed": 0.35, "prior": 0.0, "posterior": 0.7}[layout]) < 0.03


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.none() | st.integers(0, 4), st.sampled_from(list(Form))), max_size=5))
def test_extent_is_the_length_of_what_is_laid_out(chunks: list[tuple[int, int | None, Form]]) -> None:
    texts, thoughts = [(9,) * x for x, _, _ in chunks], [None if z is None else (8,) * z for _, z, _ in chunks]
    document = ThoughtDocument(
        "d",
        tuple(Chunk("d", n, 0, "", x) for n, x in enumerate(texts)),
        tuple(() if z is None else (z,) for z in thoughts),
        (True,) * len(chunks),
        "test",
    )
    forms = [form for _, _, form in chunks]
    laid_out = lay_out(document, forms, CONTROLS)
    assert format.extent([x for x, _, _ in chunks], [z for _, z, _ in chunks], forms) == len(laid_out.ids)
